"""The options that several verbs share, and the arguments as they were typed."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ModelsDir = Annotated[
    Path | None,
    typer.Option("--models-dir", metavar="DIR", help="Folder of RobustBench's weight files (else ROBUSTIFY_MODELS_DIR, ~/.cache)."),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Run the code that a pickled weight file may hold.")]
DataName = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help="digits, cifar10, cifar100, folder:PATH or npz:PATH.")
]
Processes = Annotated[int, typer.Option("--processes", min=1, metavar="N", help="Processes on this machine, one a GPU.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what the output holds.")]


def typed(context: typer.Context) -> list[str]:
    """Return the arguments as they were typed, the verb first."""
    return list((context.obj or {}).get("arguments", sys.argv[1:]))


def without(arguments: Sequence[str], *options: str) -> list[str]:
    """Return the arguments without these options and their values, `--name VALUE` or `--name=VALUE`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept
