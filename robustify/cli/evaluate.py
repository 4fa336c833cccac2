"""robustify evaluate: what a model holds against."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from robustify import console
from robustify.cli import options
from robustify.errors import UserError

if TYPE_CHECKING:
    from robustify.data import Data
    from robustify.recipe import Recipe
    from robustify.sources import Checkpoint


def run(
    context: typer.Context,
    source: options.Source,
    data: options.DataName = None,
    attacks: Annotated[
        list[str] | None,
        Option("--attack", metavar="ATTACK", help="Repeatable; pgd:steps=50.  [default: clean, fgsm, pgd, w-pgd]"),
    ] = None,
    threats: Annotated[
        list[str] | None,
        Option("--threat", metavar="THREAT", help="Repeatable; W2-Linf:8/255.  [default: the run's, or Linf:8/255]"),
    ] = None,
    n: options.Images = None,
    split: options.SplitName = "test",
    output: Annotated[Path | None, Option("-o", "--output", metavar="FILE", help="Write the report there.")] = None,
    batch_size: options.BatchSize = 256,
    seed: options.Seed = None,
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    processes: options.Processes = 1,
    as_json: options.AsJson = False,
) -> None:
    """Measure clean and robust accuracy, with 95 % intervals.

    Of a run's folder the data and the threat are known.

    \b
    robustify evaluate runs/digits-wasserstein
    robustify evaluate Zhang2019 --attack pgd:steps=50 --threat Linf:8/255
    """
    with console.status("loading torch"):
        from robustify import api
        from robustify.distributed import World, launched, make_accelerator, relaunch
        from robustify.threat import ThreatModel
    against = [ThreatModel.parse(threat) for threat in threats or ()]
    if processes > 1 and not launched():
        raise typer.Exit(relaunch(processes, options.without(options.typed(context), "--processes")))
    accelerator = make_accelerator()
    recipe = recipe_of(source)
    with console.Watch() as watch:
        checkpoint, found = load(source, data, recipe, models_dir, allow_pickle, seed, watch)
        checkpoint.model.to(accelerator.device)
        report = api.evaluate(
            checkpoint, found.to(accelerator.device), attacks=attacks, split=split, batch_size=batch_size,
            threat=against or [recipe.threat if recipe else api.DEFAULT_RADIUS], seed=seed or 0,
            n=options.count(n, len(api.split_named(found, split))),
            model_id=Path(source).resolve().name if Path(source).is_dir() else None,
            world=World(accelerator), listener=watch,
        )
    for note in report.notes:
        console.note(note)
    if output and console.is_main():
        report.save(output)
        console.note(f"report: {output}")
    if as_json:
        console.result_json(report.to_json())
    else:
        console.table(report.table())


def load(
    source: str, data: str | None, recipe: Recipe | None, models_dir: Path | None, allow_pickle: bool, seed: int | None,
    watch: console.Watch,
) -> tuple[Checkpoint, Data]:
    """Return the model, and the data named or else that it was trained on, split as the run did. Raises UserError."""
    from robustify import api
    from robustify import data as datasets
    from robustify.events import Progress

    watch(Progress("loading the model", 0, 1))
    checkpoint = api.load(source, models_dir=models_dir, allow_pickle=allow_pickle)
    how: dict[str, Any] = {"seed": seed or 0}
    if recipe and data in (None, recipe.data.name):
        data, own = recipe.data.name, recipe.data
        how = {"seed": recipe.train.seed, "val_fraction": own.val_fraction, "limit": own.limit}
        how["root"] = Path(own.root) if own.root else None
    data = data or checkpoint.dataset
    if data in (None, "imagenet"):
        raise UserError(f"which data should {source} be measured on?", "name it: --data cifar10, or --data folder:PATH")
    return checkpoint, datasets.load(
        data, input_size=checkpoint.input_size, **how,
        progress=lambda done, total: watch(Progress("reading the data", done, total)),
    )


def recipe_of(source: str) -> Recipe | None:
    """Return the recipe of the run that the source is the folder of, or its model/; else None."""
    from robustify.recipe import resolve

    folder = Path(source.removeprefix("local-dir:")).expanduser()
    for place in (folder, folder.resolve().parent):
        if (place / "recipe.yaml").is_file() and (place / "model").is_dir():
            return resolve(str(place / "recipe.yaml")).recipe
    return None
