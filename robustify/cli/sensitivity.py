"""robustify sensitivity: Upsilon, how fast the expected loss rises with a distributional attack."""

from __future__ import annotations

import time
from typing import Annotated, Any

from typer import Option

from robustify import console
from robustify.cli import evaluate, options
from robustify.errors import UserError


def run(
    source: options.Source,
    data: options.DataName = None,
    threat: Annotated[
        str | None, Option(metavar="THREAT", help="W2-Linf:8/255.  [default: the run's, or W2-Linf:8/255]")
    ] = None,
    losses: Annotated[
        list[str] | None, Option("--loss", metavar="LOSS", help="ce, dlr or redlr; repeatable.  [default: all three]")
    ] = None,
    n: options.Images = None,
    split: options.SplitName = "test",
    batch_size: options.BatchSize = 256,
    seed: options.Seed = None,
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    as_json: options.AsJson = False,
) -> None:
    """Estimate Upsilon, the loss's sensitivity to a Wasserstein attack.

    Upsilon is (E ||grad_x J||^q)^(1/q) over the images, in the norm dual to the threat's. To first order, a radius
    delta raises the expected loss by delta * Upsilon: an estimate of what an attack can do, never a certificate.

    \b
    robustify sensitivity Zhang2019 --threat W2-Linf:8/255 --loss redlr
    """
    with console.status("loading torch"):
        from robustify import api
        from robustify.data import batches, chunks
        from robustify.distributed import make_accelerator
        from robustify.evaluation import sample
        from robustify.gradients import gradient_norms
        from robustify.losses import LOSSES
        from robustify.sensitivity import conjugate, upsilon
        from robustify.threat import ThreatModel
    for loss in losses or ():
        if loss not in LOSSES:
            raise UserError(f"unknown loss {loss!r}", f"losses: {', '.join(LOSSES)}")
    recipe = evaluate.recipe_of(source)
    given = ThreatModel.parse(threat or (recipe.threat if recipe else api.DEFAULT_RADIUS))
    order = given.p or 2.0
    against = ThreatModel(given.norm, given.eps, order)
    device = make_accelerator().device
    lines: list[dict[str, Any]] = []
    with console.Watch() as watch:
        checkpoint, found = evaluate.load(source, data, recipe, models_dir, allow_pickle, seed, watch)
        images = api.split_named(found, split)
        chosen = sample(len(images), options.count(n, len(images)), seed or 0)
        lists = [[chosen[i] for i in rows] for rows in chunks(len(chosen), batch_size)]
        model = checkpoint.model.to(device)
        for loss in losses or LOSSES:
            begin = time.perf_counter()
            stream = watch.over(batches(images, lists, device, 0), f"gradients of {loss}", len(lists))
            measured = upsilon(gradient_norms(model, stream, loss, against.norm), conjugate(order), len(images))
            lines.append(
                {
                    "loss": loss,
                    "upsilon": measured.value,
                    "standard_error": measured.se,
                    "loss_rise": measured.value * against.eps,
                    "top_1_percent_share": measured.top_share,
                    "n": measured.n,
                    "passes_per_image": {"forward": 1, "backward": 1},
                    "seconds": time.perf_counter() - begin,
                }
            )
    if as_json:
        facts = {"model": checkpoint.base_id, "data": found.name, "split": split, "threat": against.spec}
        console.result_json({**facts, "losses": lines})
        return
    console.table(
        [
            {
                "loss": line["loss"],
                "Upsilon": f"{line['upsilon']:.4g}",
                "standard error": f"{line['standard_error']:.2g}",
                f"loss rise at {against}": f"{line['loss_rise']:.4g}",
                "top 1 % share": f"{100 * line['top_1_percent_share']:.1f} %",
                "n": str(line["n"]),
                "passes per image": "1 forward, 1 backward",
                "seconds": f"{line['seconds']:.1f}",
            }
            for line in lines
        ]
    )
    console.note("the rise is delta * Upsilon, to first order: what an attack can do is estimated, not certified")
