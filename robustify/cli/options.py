"""The arguments that several verbs share, and the command line as it was typed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from robustify.errors import UserError

FEW = 1000  # images that a measurement takes, unless the user says how many

Recipe = typer.Argument(metavar="RECIPE", help="A name of `robustify ls recipes`, or a YAML file.")
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A run's folder, a model folder, a RobustBench name, a timm name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ModelsDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of RobustBench's weight files, else ROBUSTIFY_MODELS_DIR or ~/.cache."),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Run the code that a pickled weight file may hold.")]
DataName = Annotated[str | None, typer.Option(metavar="DATA", help="digits, cifar10, cifar100, folder:PATH, npz:PATH.")]
Images = Annotated[str | None, typer.Option("--n", metavar="N|all", help=f"Images to take.  [default: {FEW}]")]
SplitName = Annotated[str, typer.Option(metavar="NAME", help="test, val or train.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images per pass.")]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Of all random numbers.")]
Processes = Annotated[int, typer.Option(min=1, metavar="N", help="Processes on this machine, one a GPU.")]
License = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the base model, where it is not known: mit, apache-2.0, unknown.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what the output holds.")]


def typed(context: typer.Context) -> list[str]:
    """Return the arguments as they were typed, the verb first."""
    return list((context.obj or {}).get("arguments", sys.argv[1:]))


def command(arguments: Iterable[str]) -> str:
    """Return the command to type, for one of several processes on this machine that of all of them."""
    typed = ["robustify", *arguments]
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    told = any(argument.startswith(("--processes", "--accelerate-config")) for argument in typed)
    return shlex.join(typed if told or here == "1" or _machines() else [*typed, "--processes", here])


def continues(arguments: Iterable[str]) -> str:
    """Return the sentence that says which command goes on with a run."""
    where = ", typed on every machine" if _machines() else ""
    return f"this continues the run{where}: {command(arguments)}"


def _machines() -> bool:
    """Whether this is a process of a run on several machines."""
    return int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def without(arguments: Sequence[str], option: str, setting: str | None = None) -> list[str]:
    """Return the arguments without an option and its value, `--name VALUE` or `--name=VALUE`, and without that setting."""
    kept: list[str] = []
    values = iter(arguments)
    for argument in values:
        value = next(values, "") if argument in (option, "--set") else ""
        if argument == "--set" and value.partition("=")[0].strip() != setting:
            kept += [argument, value]
        elif argument not in (option, "--set") and not argument.startswith((f"{option}=", f"--set={setting}=")):
            kept.append(argument)
    return kept


def meant(error: Any) -> str:
    """Return what an unknown option was probably meant to say; "" where that is not known, and of any other error."""
    if not hasattr(error, "possibilities") or error.ctx is None or error.ctx.info_name not in ("finetune", "evaluate", "blend"):
        return ""
    name = error.option_name.lstrip("-").replace("-", "_")
    if name in ("eps", "epsilon", "radius", "norm"):
        return "the threat says norm and radius, --threat Linf:8/255"
    if error.ctx.info_name == "finetune":
        from robustify.methods import METHODS
        from robustify.recipe import TrainSettings

        name = {"learning_rate": "lr", "wd": "weight_decay"}.get(name, name)
        of_methods = {key for method in METHODS.values() for key in method.model_fields} - {"name"}
        section = "train" if name in TrainSettings.model_fields else "method" if name in of_methods else None
        return f"it is a setting of the recipe, --set {section}.{name}=VALUE" if section else ""
    from robustify import attacks

    owner = next((attack for attack in ("pgd", *attacks.ATTACKS) if name in attacks.options(attack)), None)
    return f"it is a setting of an attack, --attack {owner}:{name}=VALUE" if owner else ""


def count(text: str | None, available: int) -> int | None:
    """Read --n: the number of images, None for all of them. Raises UserError."""
    if text is None:
        return min(FEW, available)
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--n {text} is not a number of images", "take --n 500, or --n all")
    return int(text)
