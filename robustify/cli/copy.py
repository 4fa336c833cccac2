"""robustify copy: a recipe, or an accelerate config, to edit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robustify import console, files, shelf
from robustify.cli import options
from robustify.errors import UserError


def run(
    recipe: Annotated[str, options.Recipe],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; a folder keeps the recipe's name.")],
    force: options.Force = False,
) -> None:
    """Copy a recipe to a file to edit, or an accelerate config.

    \b
    robustify copy quickstart mine.yaml
    robustify copy several-machines machines.yaml
    """
    config = recipe in shelf.configs()
    text = shelf.config_text(recipe) if config else shelf.text(recipe, [*shelf.names(), *shelf.configs()])
    target = file / f"{Path(recipe).stem}.yaml" if file.is_dir() else file
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"such a file ends in .yaml, not {target.name!r}", f"take {target.with_suffix('.yaml')}")
    if target.exists() and not force:
        raise UserError(f"{target} exists", "--force replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, text)
    following = f"RECIPE --accelerate-config {shlex.quote(str(target))}" if config else shlex.quote(str(target))
    console.result(f"next: robustify finetune {following}")
