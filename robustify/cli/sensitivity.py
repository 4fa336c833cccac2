"""robustify sensitivity: Upsilon, how fast the expected loss rises with a distributional attack, and what follows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from robustify import console
from robustify.cli import evaluate, options
from robustify.errors import UserError

if TYPE_CHECKING:
    from robustify.bounds import Estimates
    from robustify.report import Report
    from robustify.threat import ThreatModel


def run(
    source: options.Source,
    data: options.DataName = None,
    threat: Annotated[
        str | None, Option(metavar="THREAT", help="W2-Linf:8/255.  [default: the run's, or W2-Linf:8/255]")
    ] = None,
    losses: Annotated[
        list[str] | None,
        Option("--loss", metavar="LOSS", help="ce, dlr or redlr; repeatable.  [default: all three; redlr with radii]"),
    ] = None,
    deltas: Annotated[
        str | None, Option(metavar="RADII", help="Estimate the accuracy at these: 2/255,4/255,8/255.")
    ] = None,
    importance: Annotated[
        int | None,
        Option(min=2, metavar="M", help="Gradients of M images only, drawn by the loss's slope at the logits."),
    ] = None,
    figure: Annotated[Path | None, Option(metavar="FILE", help="Draw the estimates into a .png or .svg.")] = None,
    report: Annotated[
        Path | None, Option(metavar="REPORT", help="What attacks achieve, for the figure; of `robustify evaluate`.")
    ] = None,
    n: options.Images = None,
    split: options.SplitName = "test",
    batch_size: options.BatchSize = 256,
    seed: options.Seed = None,
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    as_json: options.AsJson = False,
) -> None:
    """Estimate Upsilon, the sensitivity to a Wasserstein attack.

    Upsilon is (E ||grad_x J||^q)^(1/q) over the images, in the norm dual to the threat's. To first order, a radius
    delta raises the expected loss by delta * Upsilon: an estimate of what an attack can do, never a certificate.

    \b
    robustify sensitivity Zhang2019 --threat W2-Linf:8/255 --loss redlr --importance 64
    robustify sensitivity digits --deltas 0.01,0.02,0.05 --figure estimates.png
    """
    with console.status("loading torch"):
        from robustify import api, plots
        from robustify.bounds import accuracy_estimates
        from robustify.data import batches, chunks
        from robustify.distributed import make_accelerator
        from robustify.evaluation import model_digest, sample
        from robustify.events import Progress
        from robustify.gradients import gradient_norms
        from robustify.importance import draw, logit_slopes
        from robustify.losses import LOSSES
        from robustify.memory import batches_explained
        from robustify.report import Report
        from robustify.sensitivity import conjugate, upsilon
        from robustify.threat import ThreatModel, read_number
    for loss in losses or ():
        if loss not in LOSSES:
            raise UserError(f"unknown loss {loss!r}", f"losses: {', '.join(LOSSES)}")
    if (figure and not deltas) or (report and not figure):
        flags = "--report is for a figure" if report else "--figure shows estimates at several radii"
        raise UserError(flags, "robustify sensitivity SOURCE --deltas 2/255,4/255 --figure estimates.png")
    if importance and deltas:
        raise UserError("--importance estimates Upsilon alone, not accuracies", "leave out --deltas, or --importance")
    if figure:
        plots.check(figure)
    recipe = evaluate.recipe_of(source)
    given = ThreatModel.parse(threat or (recipe.threat if recipe else api.DEFAULT_RADIUS))
    against = ThreatModel(given.norm, given.eps, given.p or 2.0)
    radii = [ThreatModel(against.norm, read_number(part), against.p) for part in (deltas.split(",") if deltas else ())]
    attacked = Report.load(report) if report else None
    device = make_accelerator().device
    lines: list[dict[str, Any]] = []
    estimates: list[Estimates] = []
    with batches_explained(batch_size), console.Watch() as watch:
        checkpoint, found = evaluate.load(source, data, recipe, models_dir, allow_pickle, seed, watch)
        if attacked and attacked.facts.get("model") not in (None, model_digest(checkpoint.model)):
            raise UserError(f"{report} is the report of another model, {attacked.model_id}", "leave out --report")
        images = api.split_named(found, split)
        chosen = sample(len(images), options.count(n, len(images)), seed or 0)
        model = checkpoint.model.to(device)

        def stream(indices: list[int], what: str) -> Any:
            lists = [[indices[i] for i in rows] for rows in chunks(len(indices), batch_size)]
            return watch.over(batches(images, lists, device, 0), what, len(lists))

        for loss in losses or (["redlr"] if radii else LOSSES):
            begin = time.perf_counter()
            passes: dict[str, float] = {"forward": 1 + len(radii), "backward": 1}
            if radii:
                x, y = (part.to(device) for part in images.batch(chosen))
                estimated = accuracy_estimates(
                    model,
                    x,
                    y,
                    [radius.eps for radius in radii],
                    norm=against.norm,
                    p=against.p or 2.0,
                    loss=loss,
                    population=len(images),
                    batch_size=batch_size,
                    tell=lambda done, total, loss=loss: watch(Progress(f"estimates of {loss}", done, total)),
                )
                estimates.append(estimated)
                measured, more = estimated.sensitivity, {"estimates": _estimates(estimated)}
            else:
                q, more, taken = conjugate(against.p or 2.0), {}, chosen
                drawn = None
                if importance:
                    slopes = logit_slopes(model, stream(chosen, f"logits for {loss}"), loss)
                    drawn = draw(slopes, q, importance, seed or 0)
                    taken = [chosen[i] for i in drawn.indices.tolist()]
                norms = gradient_norms(model, stream(taken, f"gradients of {loss}"), loss, against.norm)
                measured = drawn.estimate(norms, len(images)) if drawn else upsilon(norms, q, len(images))
                share = len(taken) / len(chosen)
                passes = {"forward": 1 + share, "backward": share} if drawn else passes
            lines.append(
                {
                    "loss": loss,
                    "upsilon": measured.value,
                    "standard_error": measured.se,
                    "loss_rise": measured.value * against.eps,
                    "top_1_percent_share": measured.top_share,
                    "n": measured.n,
                    "passes_per_image": passes,
                    "seconds": time.perf_counter() - begin,
                    **more,
                }
            )
    if figure:
        _draw(figure, checkpoint.base_id, against, estimates[0], attacked)
        console.note(f"figure: {figure}")
    if as_json:
        facts = {"model": checkpoint.base_id, "data": found.name, "split": split, "threat": against.spec}
        console.result_json({**facts, "losses": lines})
        return
    console.table([_upsilon_line(line, against) for line in lines])
    if radii:
        console.result("")
        console.table([_estimate_line(line["loss"], one) for line in lines for one in line["estimates"]])
    console.note("the rise is delta * Upsilon, to first order: what an attack can do is estimated, not certified")
    if len(chosen) == len(images) and not importance:
        console.note(
            f"the standard error is 0 because all {len(images)} images of the split were used: it tells how much a sample "
            "of them would vary, not how other images would"
        )


def _estimates(found: Estimates) -> list[dict[str, float]]:
    lower, upper = found.kept()
    columns = (found.deltas, found.losses, lower, upper, found.lower, found.upper)
    names = ("delta", "expected_loss", "kept_lower", "kept_upper", "accuracy_lower", "accuracy_upper")
    return [dict(zip(names, map(float, values), strict=True)) for values in zip(*columns, strict=True)]


def _upsilon_line(line: dict[str, Any], against: ThreatModel) -> dict[str, str]:
    passes = line["passes_per_image"]
    return {
        "loss": line["loss"],
        "Upsilon": f"{line['upsilon']:.4g}",
        "standard error": f"{line['standard_error']:.2g}",
        f"loss rise at {against}": f"{line['loss_rise']:.4g}",
        "top 1 % share": f"{100 * line['top_1_percent_share']:.1f} %",
        "n": str(line["n"]),
        "passes per image": f"{passes['forward']:.3g} forward, {passes['backward']:.3g} backward",
        "seconds": f"{line['seconds']:.1f}",
    }


def _estimate_line(loss: str, one: dict[str, float]) -> dict[str, str]:
    return {
        "loss": loss,
        "delta": f"{one['delta']:.4g}",
        "expected loss, estimate": f"{one['expected_loss']:.4g}",
        "R^l, estimate": f"{one['kept_lower']:.4f}",
        "R^u, estimate": f"{one['kept_upper']:.4f}",
        "accuracy, estimated": f"{100 * one['accuracy_lower']:.2f} to {100 * one['accuracy_upper']:.2f} %",
    }


def _draw(path: Path, model: str, against: ThreatModel, found: Estimates, attacked: Report | None) -> None:
    """The estimates against delta, and what the report's attacks achieve in that norm and order."""
    from robustify import curves, plots

    panel = (against.norm, against.p)
    known = curves.panels([attacked]).get(panel, []) if attacked else []
    if attacked and not known:
        raise UserError(
            f"the report has no attack in {against.norm}, order {against.p:g}",
            f"robustify evaluate ... --attack w-pgd --attack knapsack --threat {against.spec}",
        )
    name = known[0].model if known else f"{model} (n = {found.sensitivity.n})"
    at = [0.0, *found.deltas]
    below = plots.Line(name, "first-order lower", at, [found.clean, *found.lower])
    above = plots.Line(name, "first-order upper", at, [found.clean, *found.upper])
    plots.against_radius(path, {panel: [*known, below, above]})
