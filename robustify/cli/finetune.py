"""robustify finetune: harden a model, measure it before and after, export it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from robustify import console
from robustify.cli import ends, evaluate, options
from robustify.errors import UserError

if TYPE_CHECKING:
    from robustify.pipeline import Result
    from robustify.resolve import Resolved

CHECKPOINT = "the last checkpoint is whole"
MUCH = 10.0  # points of clean accuracy: more than a hardened network usually costs, so its user is told


def run(
    context: typer.Context,
    recipe: Annotated[str | None, options.Recipe] = None,
    model: Annotated[str | None, Option(metavar="SOURCE", help="A RobustBench or timm name, or a folder.")] = None,
    method: Annotated[str | None, Option(metavar="NAME", help="One of `robustify ls methods`.")] = None,
    data: options.DataName = None,
    unlabelled: Annotated[
        str | None,
        Option(metavar="DATA", help="More images, without their labels: a name like the above, or rest."),
    ] = None,
    threat: Annotated[
        str | None, Option(metavar="THREAT", help="Linf:8/255, L2:0.5; for wasserstein W2-Linf:8/255.")
    ] = None,
    layers: Annotated[
        str | None, Option(metavar="WHICH", help="last, full, or a pattern on the parameters' names.")
    ] = None,
    epochs: Annotated[int | None, Option(metavar="N", help="Passes over the training set.")] = None,
    max_clean_drop: Annotated[
        float | None,
        Option(metavar="POINTS", help="Go back toward the loaded weights until clean accuracy is at most so much lower."),
    ] = None,
    settings: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any other setting of the recipe; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="DIR", help="The run's folder.  [default: runs/MODEL-METHOD]")
    ] = None,
    processes: options.Processes = 1,
    accelerate_config: Annotated[
        Path | None,
        Option(metavar="FILE", help="Machines and processes, as `accelerate config` or `robustify copy one-machine` wrote."),
    ] = None,
    precision: Annotated[str | None, Option(metavar="TYPE", help="no, bf16 or fp16.")] = None,
    resume: Annotated[
        str,
        Option(metavar="WHEN", help="auto: the unfinished run in the output folder, if any; never; or a run's folder."),
    ] = "auto",
    force: options.Force = False,
    models_dir: options.ModelsDir = None,
    license: options.License = None,
    num_classes: Annotated[
        int | None, Option(metavar="N", help="Put in a new classifier, for so many classes.")
    ] = None,
    allow_pickle: options.AllowPickle = False,
    no_verify: Annotated[
        bool, Option("--no-verify", help="Do not compare clean accuracy with the published one.")
    ] = False,
    seed: options.Seed = None,
    tracker: Annotated[
        str | None, Option(metavar="NAME", help="tensorboard, wandb, or another that accelerate knows.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything, run one batch, print the plan.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Harden a model: measure, train, measure again, export.

    \b
    robustify finetune quickstart
    robustify finetune --model Zhang2019 --data cifar10 --threat W2-Linf:8/255
    robustify finetune --model resnet18 --data folder:pets --num-classes 37
    robustify finetune --model runs/mine --layers last   # the run's data, threat and method, unless others are named
    """
    with console.status("loading torch"):
        from robustify import pipeline
        from robustify.launch import Layout, launched, read_config, relaunch
        from robustify.plan import plan
        from robustify.resolve import resolve
        from robustify.sharding import check_sharded
    flags: dict[str, Any] = {
        "model.source": model,
        "model.num_classes": num_classes,
        "model.models_dir": models_dir and str(models_dir),
        "model.allow_pickle": allow_pickle or None,
        "model.license": license,
        "model.verify": False if no_verify else None,
        "method.name": method,
        "data.name": data,
        "data.unlabelled": unlabelled,
        "threat": threat,
        "train.layers": layers,
        "train.epochs": epochs,
        "train.max_clean_drop": max_clean_drop,
        "train.precision": precision,
        "train.seed": seed,
        "train.tracker": tracker,
    }
    resolved = resolve(recipe, flags, settings or (), evaluate.recipe_of(model) if model else None)
    arguments = options.typed(context)
    layout = read_config(accelerate_config) if accelerate_config and not launched() else Layout(processes)
    if layout.environment:
        check_sharded(resolved.recipe)
    if dry_run:
        with console.Watch() as watch:
            if resolved.note:
                console.note(resolved.note)
            facts = plan(resolved.recipe, processes=layout.processes * layout.machines, listener=watch)
        _show_plan(resolved, facts, options.command(a for a in arguments if a != "--dry-run"), as_json)
        return
    if output and resume not in ("auto", "never"):
        raise UserError(f"--resume {resume} continues in that folder, -o {output} names another", "leave out -o")
    kept = arguments if resume not in ("auto", "never") else options.without(arguments, "--resume")
    again = options.continues(a for a in kept if a != "--force")
    if (processes > 1 or accelerate_config) and not launched():
        with ends.explained(CHECKPOINT, lambda: again):
            raise typer.Exit(relaunch(layout, arguments))
    folder = output or Path("runs") / default_name(resolved.recipe.model.source, resolved.recipe.method.name)
    command = options.command(arguments)
    if resolved.note:
        console.note(resolved.note)
    with ends.explained(CHECKPOINT, lambda: again), console.Watch() as watch:
        result = pipeline.finetune(resolved.recipe, folder, resume=resume, force=force, command=command, listener=watch)
    if console.is_main():  # another machine has no such folder
        _show_result(result, result.folder or folder, arguments, as_json)


def default_name(source: str, method: str) -> str:
    """Return the run's folder name: the source's last part without prefix, then the method."""
    from robustify.sources.options import split

    parts = [part for part in re.split(r"[/\\:]", split(source)[0]) if part not in ("", ".", "..", "model")]
    return re.sub(r"[^\w.-]+", "-", f"{parts[-1] if parts else 'model'}-{method}").strip("-.")


def _show_result(result: Result, folder: Path, arguments: list[str], as_json: bool) -> None:
    from robustify.compare import compare
    from robustify.sources import weights_in

    before, after = result.report
    (found,) = compare([before, after])
    hardened = weights_in(folder, result.recipe.model.source, result.recipe.model.num_classes)
    following = f"robustify evaluate {shlex.quote(hardened)} --attack pgd:steps=50,restarts=5"
    if not result.hardened:
        following = _instead(result, folder, arguments)
    if as_json:
        facts = {"folder": str(folder), "hardened": result.hardened, "best_epoch": result.outcome.best_epoch}
        reports = {"before": before.to_json(), "after": after.to_json()}
        console.result_json({**facts, "comparison": found.to_json(), **reports, "next": following})
        return
    console.changes(found)
    lost = next((-100 * one.difference for one in found.differences if one.attack == "clean"), 0.0)
    if result.hardened and lost > MUCH:
        bound = "--max-clean-drop 2 bounds what robustness may cost, a smaller train.lr often costs less"
        console.note(f"warning: {lost:.1f} points of clean accuracy are lost; {bound}")
    if not result.hardened:
        why = "max_clean_drop went all the way back" if _went_back(result) else "no epoch beat the start on the held-out images"
        console.result(f"not hardened: {why}, so these are the weights that were loaded")
    console.result(f"model: {folder / 'model'}")
    console.result(f"next: {following}")


def _went_back(result: Result) -> bool:
    return result.outcome.best_epoch > 0 and result.recipe.train.max_clean_drop is not None


def _instead(result: Result, folder: Path, arguments: Sequence[str]) -> str:
    """The command that may harden what this run did not: longer; but where `max_clean_drop` went all the way back, with the
    clean accuracy that robustness costs there, or in smaller steps where no point of the line was more robust."""
    from robustify.blend import Point, price

    cost = None
    if _went_back(result):
        cost = price([Point(**point) for point in json.loads((folder / "blend.json").read_text())["points"]])
    if cost is not None:
        kept = options.without(arguments, "--max-clean-drop", "train.max_clean_drop")
        change = ["--max-clean-drop", f"{cost:g}"]
    elif _went_back(result):
        kept = options.without(arguments, "--lr", "train.lr")
        change = ["--set", f"train.lr={result.recipe.train.lr / 3:.2g}"]
    else:
        kept = options.without(arguments, "--epochs", "train.epochs")
        change = ["--epochs", str(2 * result.recipe.train.epochs)]
    return options.command([*(argument for argument in kept if argument != "--force"), *change, "--force"])


def _show_plan(resolved: Resolved, plan: dict[str, Any], following: str, as_json: bool) -> None:
    values = resolved.recipe.to_dict()
    if as_json:
        console.result_json({"recipe": values, "origins": resolved.origins, "plan": plan, "next": following})
        return
    origins = resolved.origins.items()
    console.table([{"setting": key, "value": _value(values, key), "from": origin} for key, origin in origins])
    console.result("")
    console.facts(plan)
    console.result(f"next: {following}")


def _value(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)
