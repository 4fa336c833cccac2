"""robustify card: a model's card, made anew."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robustify import console
from robustify.cli import options
from robustify.errors import UserError


def run(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one that robustify export wrote.")],
    license: options.License = None,
) -> None:
    """Write a model's card anew; what you wrote into it stays.

    \b
    robustify card runs/digits-wasserstein --license mit
    """
    with console.status("loading torch"):
        from robustify import model_folder
    folder = model_folder.find(source)
    if folder is None:
        raise UserError(f"{source} is not the folder of a model", "give a run's folder, or one that robustify export wrote")
    path = model_folder.write_card(folder, license=license)
    console.result(f"card: {path}")
    console.result(f"next: robustify push {shlex.quote(str(source))} OWNER/NAME --dry-run")
