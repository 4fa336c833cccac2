"""robustify export: a model folder elsewhere, read back and compared."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from robustify import console
from robustify.cli import evaluate, options
from robustify.errors import UserError

if TYPE_CHECKING:
    from robustify.recipe import Recipe
    from robustify.sources.checkpoint import Checkpoint


def run(
    source: options.Source,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.")],
    formats: Annotated[
        list[str] | None, Option("--format", metavar="NAME", help="onnx or pt2 as well, normalisation inside; repeatable.")
    ] = None,
    half: Annotated[bool, Option("--half", help="Round the weights to half precision; measures what that costs.")] = False,
    data: options.DataName = None,
    license: options.License = None,
    robustbench: Annotated[
        str | None, Option(metavar="ID", help="Write RobustBench's entry too, from --report and --paper.")
    ] = None,
    report: Annotated[
        Path | None, Option(metavar="REPORT", help="The full AutoAttack's, of `robustify evaluate -o`.")
    ] = None,
    paper: Annotated[
        Path | None, Option(metavar="FILE", help="YAML: link, name, authors, venue, architecture, additional_data, ...")
    ] = None,
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a model into a new folder, as timm reads it.

    The folder appears only when a network built anew from it gives the same logits. A run's recipe, report and card go
    along. --format and --half look at test images: the run's, or those of --data.

    \b
    robustify export runs/digits-wasserstein digits-robust
    robustify export runs/digits-wasserstein digits-onnx --format onnx
    """
    with console.status("loading torch"):
        from robustify import api, files
        from robustify.compare import compare
        from robustify.formats import check_format
        from robustify.model_folder import HALF
        from robustify.report import load_pair
        from robustify.sources import weights_in
    files.new_folder(folder, force)
    for name in formats or ():
        check_format(name)
    submission = _submission(robustbench, report, paper, half)
    recipe = evaluate.recipe_of(source)
    with console.Watch() as watch:
        images, random_instead = None, ""
        if formats or half:
            try:
                _, images = evaluate.load(source, data, recipe, models_dir, allow_pickle, None, watch)
            except UserError as error:
                if half or data:
                    raise
                random_instead = f"{error.message}: the formats were compared on random images; --data names better ones"
        target = api.export(
            source,
            folder,
            formats=formats or (),
            half=half,
            data=images,
            license=license,
            models_dir=models_dir,
            allow_pickle=allow_pickle,
            force=force,
            beside=submission,
            listener=watch,
        )
    if random_instead:
        console.note(random_instead)
    following = shlex.join(["robustify", "evaluate", weights_in(folder, source), *_data_flag(recipe, data, target)])
    found = compare(load_pair(target / HALF))[0] if half else None
    if as_json:
        names = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
        console.result_json({"folder": str(target), "files": names, "half": found and found.to_json(), "next": following})
        return
    if found:
        console.table(found.table(("single precision", "rounded")))
        console.note(f"n = {found.n}; differences in points, with 95 % intervals")
    console.result(f"model: {folder}")
    console.result(f"next: {following}")


def _submission(
    model_id: str | None, report: Path | None, paper: Path | None, half: bool
) -> Callable[[Checkpoint], dict[str, str]] | None:
    """What makes RobustBench's files by name; None when they are not asked for. Raises UserError for what lacks."""
    from robustify import evaluation, leaderboard
    from robustify.report import Report

    if model_id is None:
        if report or paper:
            raise UserError(f"{'--report' if report else '--paper'} is for RobustBench's entry", "--robustbench ID writes it")
        return None
    if half:
        hint = "export without --half; or export with it, evaluate that folder, and export it anew with --robustbench"
        raise UserError("--half rounds the weights, so --report is not of the model that is written", hint)
    if report is None or paper is None:
        hint = "--report REPORT of a full AutoAttack, --paper FILE with what no report knows; docs/export.md shows both"
        raise UserError("--robustbench needs --report and --paper", hint)
    measured, facts = Report.load(report), leaderboard.read_paper(paper)
    return lambda made: leaderboard.submission(model_id, measured, facts, evaluation.model_digest(made.model))


def _data_flag(recipe: Recipe | None, data: str | None, target: Path) -> list[str]:
    """What `evaluate` must be told to find images: nothing where the folder says it, by name."""
    from robustify.model_folder import read_config

    known = data or (recipe.data.name if recipe else read_config(target)["robustness"].get("dataset"))
    named = known is not None and ":" not in known and known != "imagenet"
    if named and known == read_config(target)["robustness"].get("dataset"):
        return []
    return ["--data", known if known and (named or data or recipe) else "folder:PATH"]
