"""robustify export: a model folder elsewhere, read back and compared."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robustify import console
from robustify.cli import options


def run(
    source: options.Source,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.")],
    models_dir: options.ModelsDir = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a model into a new folder, as timm reads it.

    The folder appears only when a network built anew from it gives the same logits. A run's card goes along.

    \b
    robustify export runs/digits-wasserstein digits-robust
    """
    with console.status("loading torch"):
        from robustify import api
    target = api.export(source, folder, models_dir=models_dir, allow_pickle=allow_pickle, force=force)
    following = f"robustify evaluate {shlex.quote(str(folder))}"
    if as_json:
        names = sorted(path.name for path in target.iterdir())
        console.result_json({"folder": str(target), "files": names, "next": following})
        return
    console.result(f"model: {folder}")
    console.result(f"next: {following}")
