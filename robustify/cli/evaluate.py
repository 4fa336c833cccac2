"""robustify evaluate: what a model holds against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from robustify import console
from robustify.cli import ends, options
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
    split: Annotated[str | None, Option(metavar="NAME", help="test, val or train.  [default: test]")] = None,
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="FILE", help="Write the report there, FILE.partial meanwhile.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with what an interrupted evaluation left.")] = False,
    force: options.Force = False,
    keep: Annotated[
        bool, Option("--keep-adversarials", help="Keep the adversarial images beside the report, for --recheck.")
    ] = False,
    recheck: Annotated[
        Path | None,
        Option("--recheck", metavar="REPORT", help="Classify the images kept beside this report again; 1 on a change."),
    ] = None,
    figure: Annotated[
        Path | None, Option(metavar="FILE", help="Draw accuracy against the radius into a .png or .svg.")
    ] = None,
    surrogate: Annotated[
        str | None, Option(metavar="SOURCE", help="Also try what fools this model of the same classes (transfer).")
    ] = None,
    fast_search: Annotated[
        bool, Option("--fast-search", help="Pointwise attacks search in bfloat16; verdicts stay in full precision.")
    ] = False,
    no_checks: Annotated[bool, Option("--no-checks", help="Do not look for signs of gradient masking.")] = False,
    batch_size: options.BatchSize = 256,
    seed: options.Seed = None,
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    processes: options.Processes = 1,
    as_json: options.AsJson = False,
) -> None:
    """Measure clean and robust accuracy, with 95 % intervals.

    Of a run's or an exported folder the data and the threat are known.

    \b
    robustify evaluate runs/digits-wasserstein
    robustify evaluate Zhang2019 --attack autoattack --threat Linf:8/255 -o report.json
    """
    if recheck:
        _recheck(source, recheck, data, split, models_dir, allow_pickle, seed, as_json)
        return
    with console.status("loading torch"):
        from robustify import api, curves, pieces, plots
        from robustify.distributed import World, make_accelerator
        from robustify.evaluation import model_digest, rows_of
        from robustify.faults import Preempted, peers_watched, same_everywhere, sigterm_noted
        from robustify.launch import Layout, launched, relaunch
        from robustify.memory import batches_explained
        from robustify.report import Report
        from robustify.threat import ThreatModel
    if figure:
        plots.check(figure)
    given = [ThreatModel.parse(threat) for threat in threats or ()]
    recipe = recipe_of(source)
    against = given or [recipe.threat if recipe else ThreatModel.parse(api.DEFAULT_RADIUS)]
    rows_of(attacks or (), against)  # what cannot be measured is told before a model is loaded
    _check_images(data or (recipe.data.name if recipe else None), split, n)
    arguments = options.typed(context)

    def goes_on() -> str:
        if output is None or not _unfinished(output).exists():
            return ""
        again = options.command([*arguments, *([] if resume else ["--resume"])])
        return f"this continues the evaluation: {again}"

    if processes > 1 and not launched():
        with ends.explained("finished batches are kept", goes_on):
            raise typer.Exit(relaunch(Layout(processes), arguments))
    accelerator = make_accelerator()
    world = World(accelerator)
    partial = world.on_main(lambda: _partial(output, resume, force, keep))
    ended = output is not None and output.exists() and not force and not (partial and partial.exists())

    @contextmanager
    def stored_told() -> Iterator[None]:
        try:
            yield
        except Preempted:
            kept_now = "finished batches are kept" if partial and partial.exists() else "nothing is kept yet"
            raise Preempted(kept_now if partial else "nothing is kept without -o FILE") from None

    stopped = ends.explained("finished batches are kept", goes_on)
    with stopped, peers_watched(world), sigterm_noted(), stored_told(), batches_explained(batch_size), console.Watch() as watch:
        checkpoint, found = load(source, data, recipe, models_dir, allow_pickle, seed, watch)
        checkpoint.model.to(accelerator.device)
        if world.size > 1:
            same_everywhere(world, {"weights": model_digest(checkpoint.model), "data": found.digest})
        other = surrogate and api.load(surrogate, models_dir=models_dir, allow_pickle=allow_pickle)
        report = api.evaluate(
            checkpoint,
            found.to(accelerator.device),
            attacks=attacks,
            threat=against,
            n=options.count(n, len(api.split_named(found, split or "test"))),
            split=split or "test",
            batch_size=batch_size,
            seed=seed or 0,
            model_id=Path(source).resolve().name if Path(source).is_dir() else None,
            check=not no_checks,
            fast_search=fast_search,
            resume_folder=partial,
            keep_adversarials=keep,
            finished=Report.load(output) if ended and output else None,
            surrogate=other or None,
            world=world,
            listener=watch,
        )
    for note in report.notes:
        console.note(note)
    if ended:
        console.note(f"report: {output} was finished before")
    elif output and partial and world.is_main:
        report.save(output)
        pieces.finish(partial, kept(output) if keep else None)
        if not keep and kept(output).is_dir():
            pieces.finish(kept(output))  # of the report that was there before
        console.note(f"report: {output}")
    if figure and world.is_main:
        plots.against_radius(figure, curves.panels([report]))
        console.note(f"figure: {figure}")
    if as_json:
        console.result_json(report.to_json())
    else:
        console.table(report.table())
        if settings := report.attacks():
            console.result("")
            console.table(settings)


def kept(report: Path) -> Path:
    """Where the adversarial images of a report are."""
    return report.with_suffix(".adversarials")


def load(
    source: str,
    data: str | None,
    recipe: Recipe | None,
    models_dir: Path | None,
    allow_pickle: bool,
    seed: int | None,
    watch: console.Watch,
) -> tuple[Checkpoint, Data]:
    """Return the model, and the data named or else that it was trained on, split as the run did. Raises UserError."""
    from robustify import api
    from robustify import data as datasets
    from robustify.events import Progress

    if data is not None:
        datasets.check_name(data)
    watch(Progress("loading the model", 0, 1))
    checkpoint = api.load(source, models_dir=models_dir, allow_pickle=allow_pickle)
    how: dict[str, Any] = {"seed": seed or 0}
    if recipe and _is_that(data, recipe.data.name):
        data, own = data or recipe.data.name, recipe.data
        how = {"seed": recipe.train.seed, "val_fraction": own.val_fraction, "limit": own.limit}
        how["root"] = Path(own.root) if own.root else None
    if data is None:
        data = _own_data(source, checkpoint)
    return checkpoint, datasets.load(
        data,
        input_size=checkpoint.input_size,
        **how,
        progress=lambda done, total: watch(Progress("reading the data", done, total)),
    )


def _check_images(data: str | None, split: str | None, n: str | None) -> None:
    """Raise UserError for an --n that is no number, or more than data known by name has."""
    from robustify import data as datasets
    from robustify.evaluation import sample

    known = datasets.TEST_IMAGES.get(data or "") if split in (None, "test") else None
    asked = options.count(n, known or options.FEW)
    if known is not None:
        sample(known, asked, 0)


def _is_that(data: str | None, trained: str) -> bool:
    """Return whether the data named are those of the training, wherever they lie now; unnamed, whether they lie there."""
    kind, colon, place = trained.partition(":")
    if data is None:
        return not colon or Path(place).expanduser().exists()
    named, _, other = data.partition(":")
    return data == trained or (bool(colon) and named == kind and Path(other).name == Path(place).name)


def _own_data(source: str, checkpoint: Checkpoint) -> str:
    """Return the data that the model was made for. Raises UserError when it is not known, or not known where it lies."""
    kind, colon, name = (checkpoint.dataset or "imagenet").partition(":")
    if kind == "imagenet":
        hint = f"name it: --data folder:PATH, a folder of pictures in {checkpoint.num_classes} classes, or --data cifar10"
        raise UserError(f"which data should {source} be measured on?", hint)
    place = Path(name if kind == "folder" else f"{name}.npz")
    if colon and not place.exists():
        hint = f"say where it lies: --data {kind}:PATH/{place}, or name other data of its {checkpoint.num_classes} classes"
        raise UserError(f"{source} was made on {kind}:{place}, and that is not in this folder", hint)
    return f"{kind}:{place}" if colon else kind


def recipe_of(source: str) -> Recipe | None:
    """Return the recipe that made the source: of a run's folder, of one that robustify export wrote, here or on the hub.

    None for anything else, and where the recipe is of a version of robustify that had other settings, which is said.
    """
    from robustify import model_folder
    from robustify.resolve import resolve

    folder = model_folder.made(source)
    path = model_folder.belongings(folder).get(model_folder.RECIPE) if folder else None
    if path is None:
        return None
    try:  # its data and threat are asked for; whether pickles may run, this command's own flag says
        recipe = resolve(str(path), {"model.allow_pickle": False, "model.source": source}).recipe
    except UserError as error:
        console.note(f"warning: the recipe of {source} is not followed: {error.message}")
        return None
    if recipe.data.root and not Path(recipe.data.root).is_dir():  # where they lay where the model was made
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": None})})
    return recipe


def _unfinished(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _partial(output: Path | None, resume: bool, force: bool, keep: bool) -> Path | None:
    """Return the folder of the finished batches, checked; None without a report to write. Raises UserError."""
    if output is not None and output.suffix != ".json" and not output.is_dir():  # its verdicts lie beside it, in .npz
        raise UserError(f"a report is a .json file, not {output.name}", f"name it {output.name}.json")
    if output is None:
        flag = "--resume" if resume else "--keep-adversarials" if keep else None
        if flag:
            raise UserError(f"{flag} needs the report's file", "name it: -o report.json")
        return None
    if output.is_dir():
        raise UserError(f"the report {output} is a folder", f"name a file: -o {output / 'report.json'}")
    if output.exists() and not (resume or force):
        raise UserError(f"there is a report {output}", "--force replaces it, -o names another")
    folder = _unfinished(output)
    if folder.exists() and not resume:
        raise UserError(f"{folder} holds an unfinished evaluation", "--resume continues it, or remove it")
    return folder


def _recheck(
    source: str,
    path: Path,
    data: str | None,
    split: str | None,
    models_dir: Path | None,
    allow_pickle: bool,
    seed: int | None,
    as_json: bool,
) -> None:
    """Classify the adversarial images kept beside a report again; exit with 1 when a verdict is another."""
    with console.status("loading torch"):
        from robustify import api
        from robustify.distributed import make_accelerator
        from robustify.events import Progress
        from robustify.recheck import recheck
        from robustify.report import Report
    report = Report.load(path)
    if not report.verdicts:
        raise UserError(f"the verdicts of {path} are missing", f"they belong beside it, in {path.with_suffix('.npz')}")
    if split not in (None, report.split):
        raise UserError(f"{path} is of the split {report.split}, not {split}", "leave out --split")
    device = make_accelerator().device
    with console.Watch() as watch:
        checkpoint, found = load(
            source, data, recipe_of(source), models_dir, allow_pickle, report.seed if seed is None else seed, watch
        )
        checkpoint.model.to(device)
        changed = recheck(
            checkpoint.model,
            api.split_named(found.to(device), report.split),
            report,
            kept(path),
            tell=lambda stage, done, total: watch(Progress(stage, done, total)),
        )
    if as_json:
        console.result_json({"report": str(path), "changed": changed})
    else:
        rows = {row.key: row for row in report.rows}
        named = [(rows[key], count) for key, count in changed.items()]
        console.table([
            {
                "attack": row.attack,
                "threat": (row.threat or "").replace(":", " "),
                "n": str(row.n),
                "changed verdicts": str(count),
            }
            for row, count in named
        ])  # fmt: skip
    if any(changed.values()):
        console.mistake("not every verdict is reproduced", "another device or version of torch rounds otherwise")
        raise typer.Exit(1)
