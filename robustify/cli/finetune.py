"""robustify finetune: harden a model, measure it before and after, export it."""
from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustify import console
from robustify.cli.options import AllowPickle, AsJson, DataName, Force, ModelsDir, Processes, typed, without
from robustify.report import Headline, Report, Row, paired_difference, percent

if TYPE_CHECKING:
    from robustify.recipe import Resolved


def run(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A YAML file, or a name of `robustify ls recipes`.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="SOURCE", help="A RobustBench or timm name, or a folder.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="wasserstein, trades, pgd-at, fast-at or standard.")
    ] = None,
    data: DataName = None,
    threat: Annotated[
        str | None, typer.Option("--threat", metavar="THREAT", help="Linf:8/255, L2:0.5; W2-Linf:8/255 for wasserstein.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="WHICH", help="last, full, or a pattern on the parameters' names.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the training set.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the recipe; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="The run's folder.  [default: runs/MODEL-METHOD]")
    ] = None,
    processes: Processes = 1,
    precision: Annotated[str | None, typer.Option("--precision", metavar="TYPE", help="no, bf16 or fp16.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume", metavar="WHEN",
            help="auto: continue the unfinished run in the output folder, if there is one; never; or the folder to continue.",
        ),
    ] = "auto",
    force: Force = False,
    models_dir: ModelsDir = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", metavar="N", help="Put in a new classifier for so many classes.")
    ] = None,
    allow_pickle: AllowPickle = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare clean accuracy with the published one.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of all random numbers.")] = None,
    tracker: Annotated[
        str | None, typer.Option("--tracker", metavar="NAME", help="tensorboard, wandb, or another that accelerate knows.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run one batch, print the plan.")] = False,
    as_json: AsJson = False,
) -> None:
    """Harden a model: measure, train, measure again, export.

    \b
    robustify finetune quickstart
    robustify finetune --model Zhang2019 --data cifar10 --threat W2-Linf:8/255
    robustify finetune --model resnet18 --data folder:pets --num-classes 37
    """
    with console.status("loading torch"):
        from robustify import pipeline
        from robustify.distributed import launched, relaunch
        from robustify.recipe import resolve
    resolved = resolve(
        recipe,
        {
            "model.source": model, "method.name": method, "data.name": data, "threat": threat, "train.layers": layers,
            "train.epochs": epochs, "train.precision": precision, "model.num_classes": num_classes, "train.seed": seed,
            "model.models_dir": str(models_dir) if models_dir else None, "model.allow_pickle": allow_pickle or None,
            "model.verify": False if no_verify else None, "train.tracker": tracker,
        },
        settings or (),
    )
    arguments = typed(context)
    if dry_run:
        with console.Watch() as watch:
            plan = pipeline.plan(resolved.recipe, listener=watch)
        _show_plan(resolved, plan, [a for a in arguments if a != "--dry-run"], as_json)
        return
    if processes > 1 and not launched():
        raise typer.Exit(relaunch(processes, without(arguments, "--processes")))
    folder = output or Path("runs") / default_name(resolved.recipe.model.source, resolved.recipe.method.name)
    try:
        with console.Watch() as watch:
            result = pipeline.finetune(
                resolved.recipe, folder, resume=resume, force=force, command=_command(arguments), listener=watch
            )
    except KeyboardInterrupt:
        again = [a for a in without(arguments, "--resume") if a != "--force"]
        console.note(f"interrupted; this continues the run: {_command(again)}")
        raise typer.Exit(130) from None
    _show_result(*result.report, result.folder or folder, as_json)


def default_name(source: str, method: str) -> str:
    """Return the run's folder name: the source's last part without prefix, then the method."""
    parts = [part for part in re.split(r"[/\\:]", source) if part not in ("", ".", "..", "model")]
    return re.sub(r"[^\w.-]+", "-", f"{parts[-1] if parts else 'model'}-{method}").strip("-.")


def compare(before: Report, after: Report) -> list[dict[str, Any]]:
    """Return one line per attack and threat measured both times, worst cases last, as numbers.

    difference: (change, low, high) of the paired accuracies where both reports have verdicts, else None.
    """
    old = {row.key: row for row in before.rows}
    lines = [
        _line(row.attack, old[row.key], row, before.verdicts.get(row.key), after.verdicts.get(row.key))
        for row in after.rows if row.key in old
    ]
    for threat in (threat for threat in after.threats if threat in before.threats):
        new = after.headline(threat)
        if len(new.attacks) > 1:
            lines.append(_line("worst case", before.headline(threat), new, before.held(threat), after.held(threat)))
    return lines


def _line(attack: str, old: Row | Headline, new: Row | Headline, held_before: Any, held_after: Any) -> dict[str, Any]:
    paired = held_before is not None and held_after is not None and len(held_before) == len(held_after)
    return {
        "attack": attack, "threat": new.threat, "before": old.accuracy, "after": new.accuracy,
        "difference": paired_difference(held_before, held_after) if paired else None, "n": new.n,
    }


def _show_result(before: Report, after: Report, folder: Path, as_json: bool) -> None:
    lines = compare(before, after)
    following = f"robustify evaluate {shlex.quote(str(folder))} --attack pgd:steps=50,restarts=5"
    if as_json:
        reports = {"before": before.to_json(), "after": after.to_json()}
        console.result_json({"folder": str(folder), "comparison": lines, **reports, "next": following})
        return
    console.table([
        {
            "attack": line["attack"], "threat": (line["threat"] or "").replace(":", " "), "before": percent(line["before"]),
            "after": percent(line["after"]), "difference in points": _points(line["difference"]), "n": str(line["n"]),
        }
        for line in lines
    ])
    console.result(f"model: {folder / 'model'}")
    console.result(f"next: {following}")


def _points(difference: tuple[float, float, float] | None) -> str:
    if difference is None:
        return ""
    change, low, high = (100 * part for part in difference)
    return f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"


def _show_plan(resolved: Resolved, plan: dict[str, Any], arguments: list[str], as_json: bool) -> None:
    if as_json:
        console.result_json({"recipe": resolved.recipe.to_dict(), "origins": resolved.origins, "plan": plan})
        return
    values = resolved.recipe.to_dict()
    console.table([
        {"setting": key, "value": _value(values, key), "from": origin} for key, origin in resolved.origins.items()
    ])
    console.result("")
    console.facts(plan)
    console.result(f"next: {_command(arguments)}")


def _value(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)


def _command(arguments: list[str]) -> str:
    return shlex.join(["robustify", *arguments])
