"""robustify evaluate: what a model holds against."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustify import console
from robustify.cli.options import AllowPickle, AsJson, DataName, ModelsDir, Processes, typed, without
from robustify.errors import UserError

if TYPE_CHECKING:
    from robustify.data import Data
    from robustify.recipe import Recipe
    from robustify.sources import Checkpoint

FEW = 1000  # images, unless the user says how many


def run(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run's folder, a model folder, a RobustBench or timm name.")],
    data: DataName = None,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack", metavar="ATTACK", help="clean, fgsm, pgd:steps=50,restarts=5 ...; repeatable.  [default: clean, fgsm, pgd, w-pgd]"
        ),
    ] = None,
    threats: Annotated[
        list[str] | None,
        typer.Option("--threat", metavar="THREAT", help="Linf:8/255, W2-Linf:8/255; repeatable.  [default: the run's, or Linf:8/255]"),
    ] = None,
    n: Annotated[str | None, typer.Option("--n", metavar="N|all", help="Images, drawn by the seed.  [default: 1000]")] = None,
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="test, val or train.")] = "test",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report there as JSON.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images per pass.")] = 256,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Draws images and starts.  [default: 0]")] = None,
    models_dir: ModelsDir = None,
    allow_pickle: AllowPickle = False,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Measure clean and robust accuracy, with 95 % intervals.

    \b
    robustify evaluate runs/digits-wasserstein
    robustify evaluate Zhang2019 --attack pgd:steps=50 --threat Linf:8/255
    """
    with console.status("loading torch"):
        from robustify import api
        from robustify.distributed import World, launched, make_accelerator, relaunch
        from robustify.report import Report
        from robustify.threat import ThreatModel
    threats = [ThreatModel.parse(threat).spec for threat in threats or ()]
    if processes > 1 and not launched():
        raise typer.Exit(relaunch(processes, without(typed(context), "--processes")))
    accelerator = make_accelerator()
    recipe = recipe_of(source)
    with console.Watch() as watch:
        checkpoint, held = load(source, data, recipe, models_dir, allow_pickle, seed, watch)
        images = count(n, len(getattr(held, split)) if split in api.SPLITS else FEW)
        checkpoint.model.to(accelerator.device)
        report: Report = api.evaluate(
            checkpoint, held.to(accelerator.device), attacks=attacks, n=images, split=split, batch_size=batch_size, seed=seed or 0,
            threat=threats or [recipe.threat if recipe else api.DEFAULT_RADIUS], world=World(accelerator), listener=watch,
            model_id=Path(source).resolve().name if Path(source).is_dir() else None,
        )
    if output and console.is_main():
        report.save(output)
    if as_json:
        console.result_json(report.to_json())
        return
    console.table(report.table())
    if output:
        console.note(f"report: {output}")


def load(
    source: str, data: str | None, recipe: Recipe | None, models_dir: Path | None, allow_pickle: bool, seed: int | None,
    watch: console.Watch,
) -> tuple[Checkpoint, Data]:
    """Return the model, and the data that it is asked to be measured on, or was trained on. Raises UserError."""
    from robustify import api
    from robustify import data as datasets
    from robustify.events import Progress

    watch(Progress("loading the model", 0, 1))
    checkpoint = api.load(source, models_dir=models_dir, allow_pickle=allow_pickle)
    own = recipe.data if recipe and data in (None, recipe.data.name) else None
    name = data or (own.name if own else checkpoint.dataset)
    if name not in (None, "imagenet"):
        return checkpoint, datasets.load(
            name, input_size=checkpoint.input_size, root=Path(own.root) if own and own.root else None,
            val_fraction=own.val_fraction if own else 0.1, limit=own.limit if own else None,
            seed=seed if seed is not None else recipe.train.seed if recipe and own else 0,
            progress=lambda done, total: watch(Progress("reading the data", done, total)),
        )
    raise UserError(f"which data should {source} be measured on?", "name it: --data cifar10, or --data folder:PATH")


def recipe_of(source: str) -> Recipe | None:
    """Return the recipe of the run that the source is the folder of, or None."""
    from robustify.recipe import resolve

    folder = Path(source.removeprefix("local-dir:")).expanduser()
    for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if path.is_file() and (path.parent / "model").is_dir():
            return resolve(str(path)).recipe
    return None


def count(text: str | None, available: int) -> int | None:
    """Read --n: the number of images, None for all of them. Raises UserError."""
    if text is None:
        return min(FEW, available)
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--n {text} is not a number of images", "take --n 500, or --n all")
    return int(text)
