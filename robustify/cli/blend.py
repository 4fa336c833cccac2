"""robustify blend: the trade-off between a network and what training made of it, from the weights between them."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from robustify import console
from robustify.cli import evaluate, options
from robustify.errors import UserError
from robustify.intervals import percent, percent_interval, wilson
from robustify.intervals import points as points_of_100

if TYPE_CHECKING:
    from robustify.blend import Point


def run(
    context: typer.Context,
    start: Annotated[str, typer.Argument(metavar="A", help="Where the line begins: the network as it was loaded.")],
    end: Annotated[
        str, typer.Argument(metavar="B", help="Where it ends: a run's or an exported folder, or a model of the same kind.")
    ],
    points: Annotated[int, Option(min=2, metavar="N", help="Points to measure, both ends among them.")] = 11,
    max_clean_drop: Annotated[
        float | None,
        Option(min=0, max=100, metavar="POINTS", help="Lose at most so many points of clean accuracy.  [default: any]"),
    ] = None,
    data: options.DataName = None,
    threat: Annotated[
        str | None, Option(metavar="THREAT", help="Linf:8/255, W2-Linf:8/255.  [default: the run's, or W2-Linf:8/255]")
    ] = None,
    attack: Annotated[
        str | None, Option(metavar="ATTACK", help="What measures robustness.  [default: a quick search]")
    ] = None,
    n: options.Images = None,
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="DIR", help="Export the chosen point there.")
    ] = None,
    figure: Annotated[Path | None, Option(metavar="FILE", help="Draw the curve into a .png or .svg.")] = None,
    seed: options.Seed = None,
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure the networks on the line between two, choose one and export it.

    The choice is made on held-out images. Where B is a run's folder, or one that robustify exported, here or on the hub,
    what is exported is measured on its test images with its attacks, and gets a card, if A is the network that B was made from.

    \b
    robustify blend Zhang2019 runs/Zhang2019-wasserstein --max-clean-drop 2 -o zhang-robust
    """
    with console.status("loading torch"):
        import numpy as np

        from robustify import api, files, model_folder, plots
        from robustify.blend import between, choose, curve, few, in_words, quick
        from robustify.blended import export_blended, lacking
        from robustify.compare import compare
        from robustify.evaluation import rows_of
        from robustify.events import Progress
        from robustify.methods import withstood
        from robustify.sources import weights_in
        from robustify.threat import ThreatModel
    recipe = evaluate.recipe_of(end)
    given = ThreatModel.parse(threat or (recipe.threat if recipe else api.DEFAULT_RADIUS))
    threats = withstood(recipe.method, given) if recipe else (given,)
    used = attack or quick(threats)
    rows_of([used], threats)
    options.count(n, options.FEW)
    if max_clean_drop is not None:
        points_of_100(max_clean_drop)
    if figure is not None:
        plots.check(figure)
    reports = None
    if output is not None:
        files.new_folder(output, force)
    with console.Watch() as watch:
        checkpoint, found = evaluate.load(end, data, recipe, models_dir, allow_pickle, seed, watch)
        first = api.load(start, models_dir=models_dir, allow_pickle=allow_pickle)
        model, a, b = checkpoint.model, first.model.net.state_dict(), _copy(checkpoint.model.net.state_dict())
        between(a, b, 0.5)  # refuses networks that differ, before the data is read
        # one number for all channels says the same as one a channel
        if not all(((x - y) == 0).all() for x, y in ((first.model.mean, model.mean), (first.model.std, model.std))):
            hint = "blend a run with the network it began from"
            raise UserError(f"{start} and {end} normalise their images differently", hint)
        place = model_folder.made(end) if output is not None else None
        why = lacking(end, place, recipe, first.model) if output is not None else None
        count = options.count(n, len(found.val)) or len(found.val)
        if (warning := few(count)) is not None:
            whole = "no more were held out when the run was trained (data.val_fraction)" if recipe else "there are no more"
            console.note(f"warning: {warning}; {whole if count == len(found.val) else 'take --n all'}")
        line = curve(
            model,
            a,
            b,
            found.val,
            threats,
            attack,
            points,
            n=count,
            seed=seed or 0,
            tell=lambda done, total: watch(Progress("measuring the line", done, total)),
        )
        chosen = choose(line, max_clean_drop)
        model.net.load_state_dict(between(a, b, chosen.alpha))
        if chosen.alpha == 0:
            console.note(f"warning: the start itself is chosen: nothing of {end} is in it")
        if output is not None and recipe is not None and place is not None and why is None:
            measured_by = f"{used} at {' and '.join(map(str, threats))}"
            said = in_words(chosen, points, count, start, end, measured_by, max_clean_drop)
            command = options.command(options.typed(context))
            reports = export_blended(
                checkpoint, first.model, place, recipe, found, said, command, output, force=force, listener=watch
            )
        elif output is not None:
            api.export(checkpoint, output, force=force)
            console.note(f"no card: {why}, so it is not known what these weights were made of")
    if figure is not None:
        plots.trade_off(
            figure, {f"{start} to {end}": np.array([[p.alpha, p.clean, p.robust] for p in line])}, given, count
        )
        console.note(f"figure: {figure}")

    def told(point: Point) -> dict[str, Any]:
        intervals = {f"{name}_interval": wilson(count * getattr(point, name), count) for name in ("clean", "robust")}
        return {**asdict(point), **intervals}

    def accuracy(share: float) -> str:
        return f"{percent(share)} {percent_interval(wilson(count * share, count))}"

    measured = None
    if reports:
        try:
            measured = compare(reports)[0]
        except UserError as error:  # the run's report is of a version that attacked otherwise; what was made is whole
            console.note(f"warning: before and after are not compared: {error.message}")
    following = f"robustify evaluate {shlex.quote(weights_in(output, end))}" if output else None
    if as_json:
        facts = {"start": start, "end": end, "data": found.name, "split": "val", "n": count}
        console.result_json(
            {
                **facts,
                "threat": given.spec,
                "attack": used,
                "points": [told(point) for point in line],
                "chosen": told(chosen),
                "measured": measured and measured.to_json(),
                "next": following,
            }
        )
        return
    console.table(
        [
            {
                "alpha": f"{point.alpha:g}",
                "clean": accuracy(point.clean),
                f"{used.partition(':')[0]} at {given}": accuracy(point.robust),
                "": "chosen" if point == chosen else "",
            }
            for point in line
        ]
    )
    console.note(
        f"on {count} held-out images of {found.name}, with 95 % intervals; alpha is the way from {start} to {end}"
    )
    if reports and measured:
        console.result("")
        console.changes(measured)
        console.note(f"on {measured.n} images of the {reports[1].split} split; before: {start}, after: the point chosen")
    if following:
        console.result(f"model: {output}")
        console.result(f"next: {following}")


def _copy(weights: Any) -> dict[str, Any]:
    """The weights as they are now: the network goes on to other points."""
    return {name: value.clone() for name, value in weights.items()}
