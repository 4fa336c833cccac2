"""robustify sensitivity: Upsilon, the first-order answer of the loss to a distributional attack."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from robustify import console
from robustify.cli import evaluate
from robustify.cli.options import AllowPickle, AsJson, DataName, ModelsDir
from robustify.errors import UserError

LOSSES = ("ce", "dlr", "redlr")


def run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run's folder, a model folder, a RobustBench or timm name.")],
    data: DataName = None,
    threat: Annotated[
        str | None, typer.Option("--threat", metavar="THREAT", help="W2-Linf:8/255.  [default: the run's, or W2-Linf:8/255]")
    ] = None,
    losses: Annotated[
        list[str] | None, typer.Option("--loss", metavar="LOSS", help="ce, dlr or redlr; repeatable.  [default: all three]")
    ] = None,
    n: Annotated[str | None, typer.Option("--n", metavar="N|all", help="Images, drawn by the seed.  [default: 1000]")] = None,
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="test, val or train.")] = "test",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images per pass.")] = 256,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Draws the images.  [default: 0]")] = None,
    models_dir: ModelsDir = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Estimate Upsilon, how fast the expected loss rises with a Wasserstein attack.

    Upsilon is (E ||grad_x J||_*^q)^(1/q), over the images, in the norm dual to the threat's. To first order a radius delta
    raises the expected loss by delta * Upsilon: an estimate of what an attack can do, never a certificate.

    \b
    robustify sensitivity Zhang2019 --threat W2-Linf:8/255 --loss redlr
    """
    with console.status("loading torch"):
        from robustify import api
        from robustify.data import batches, chunks
        from robustify.distributed import make_accelerator
        from robustify.evaluation import sample
        from robustify.gradients import gradient_norms
        from robustify.sensitivity import conjugate, upsilon
        from robustify.threat import ThreatModel
    unknown = [loss for loss in losses or () if loss not in LOSSES]
    if unknown:
        raise UserError(f"unknown loss {unknown[0]!r}", f"losses: {', '.join(LOSSES)}")
    if split not in api.SPLITS:
        raise UserError(f"unknown split {split!r}", f"splits: {', '.join(api.SPLITS)}")
    recipe = evaluate.recipe_of(source)
    against = ThreatModel.parse(threat) if threat else recipe.threat if recipe else ThreatModel.parse(api.DEFAULT_RADIUS)
    order = against.p or 2.0
    against = ThreatModel(against.norm, against.eps, order)
    device = make_accelerator().device
    lines: list[dict[str, Any]] = []
    with console.Watch() as watch:
        checkpoint, held = evaluate.load(source, data, recipe, models_dir, allow_pickle, seed, watch)
        images = getattr(held, split)
        chosen = sample(len(images), evaluate.count(n, len(images)), seed or 0)
        lists = [[chosen[i] for i in rows] for rows in chunks(len(chosen), batch_size)]
        model = checkpoint.model.to(device)
        for loss in losses or LOSSES:
            begin = time.perf_counter()
            stream = watch.over(batches(images, lists, device, 0), f"gradients of {loss}", len(lists))
            found = upsilon(gradient_norms(model, stream, loss, against.norm), conjugate(order), len(images))
            lines.append({
                "loss": loss, "upsilon": found.value, "standard_error": found.se, "top_1_percent_share": found.top_share,
                "loss_rise": found.value * against.eps, "n": found.n, "passes_per_image": {"forward": 1, "backward": 1},
                "seconds": time.perf_counter() - begin,
            })
    if as_json:
        console.result_json({"model": checkpoint.base_id, "data": held.name, "split": split, "threat": against.spec, "losses": lines})
        return
    console.table([
        {
            "loss": line["loss"], "Upsilon": f"{line['upsilon']:.4g}", "standard error": f"{line['standard_error']:.2g}",
            f"loss rise at {against}": f"{line['loss_rise']:.4g}", "top 1 % share": f"{100 * line['top_1_percent_share']:.1f} %",
            "n": str(line["n"]), "passes per image": "1 forward, 1 backward", "seconds": f"{line['seconds']:.1f}",
        }
        for line in lines
    ])
    console.note("the rise is delta * Upsilon, to first order: an estimate of what an attack can do, never a certificate")
