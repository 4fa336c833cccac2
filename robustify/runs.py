"""The run folder: opened anew or continued, never overwritten, and what is written into it first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from robustify import checkpoints, files
from robustify.errors import UserError
from robustify.recipe import Recipe, build
from robustify.report import environment


def open_run(folder: Path, recipe: Recipe, resume: str, force: bool) -> Path | None:
    """Decide between a new run and a continued one. Returns the checkpoint to continue from, or None."""
    if resume not in ("auto", "never"):
        found = checkpoints.latest(Path(resume) / "checkpoints")
        if found is None:
            raise UserError(f"no checkpoint in {resume}", "give the folder of an unfinished run, or --resume never")
        _same_recipe(Path(resume), recipe)
        return found
    unfinished = (folder / "recipe.yaml").exists() and not (folder / "model" / "README.md").exists()
    if resume == "auto" and unfinished and not force:
        _same_recipe(folder, recipe)
        return checkpoints.latest(folder / "checkpoints")
    files.new_folder(folder, force)
    if force and folder.exists():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "best.safetensors").unlink(missing_ok=True)
    return None


def _same_recipe(folder: Path, recipe: Recipe) -> None:
    try:
        there = build(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml") from None
    if there.digest != recipe.digest:
        mine, theirs = flat(recipe.to_dict()), flat(there.to_dict())
        changed = [f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in mine if mine.get(key) != theirs.get(key)]
        raise UserError(
            f"{folder} holds an unfinished run of another recipe ({'; '.join(changed[:4])})",
            f"continue it with: robustify finetune {folder / 'recipe.yaml'} -o {folder}; "
            "or start anew with another folder (-o) or --force",
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def write_facts(folder: Path, recipe: Recipe, command: str) -> None:
    """The resolved recipe, with the command at its head, and the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "recipe.yaml", (f"# {command}\n" if command else "") + recipe.to_yaml())
    files.write_json(folder / "environment.json", environment("cuda" if torch.cuda.is_available() else "cpu"))
