"""robustify export: a model folder elsewhere, read back and compared."""
from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robustify import console
from robustify.cli.options import AllowPickle, AsJson, Force, ModelsDir


def run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run's folder, a model folder, a RobustBench or timm name.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.")],
    models_dir: ModelsDir = None,
    allow_pickle: AllowPickle = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model into a new folder as timm reads it, card included.

    The folder appears only when a network built anew from it gives the same logits.

    \b
    robustify export runs/digits-wasserstein digits-robust
    """
    with console.status("loading torch"):
        from robustify import api
    target = api.export(source, folder, models_dir=models_dir, allow_pickle=allow_pickle, force=force)
    if as_json:
        console.result_json({"folder": str(target), "files": sorted(path.name for path in target.iterdir())})
        return
    console.result(f"model: {folder}")
    console.result(f"next: robustify evaluate {shlex.quote(str(folder))}")
