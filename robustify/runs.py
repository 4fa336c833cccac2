"""The run folder: opened anew or continued, never overwritten, and what is written into it first."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from robustify import checkpoints, files
from robustify.environment import environment
from robustify.errors import UserError
from robustify.model_folder import CONFIG, OURS
from robustify.recipe import Recipe, build
from robustify.sources import names_code

_STATE = ("before.json", "before.npz", "best.safetensors")  # beside checkpoints/


def open_run(folder: Path, recipe: Recipe, resume: str, force: bool) -> Path | None:
    """Decide between a new run and a continued one. Returns the checkpoint to continue from, or None."""
    if resume not in ("auto", "never"):
        found = checkpoints.latest(Path(resume) / "checkpoints")
        if found is None:
            raise UserError(f"no checkpoint in {resume}", "give the folder of an unfinished run, or --resume never")
        _same_recipe(Path(resume), recipe)
        return found
    if resume == "auto" and not force and _unfinished(folder):
        found = checkpoints.latest(folder / "checkpoints")
        if found is not None:  # without one nothing but a measurement is lost
            _same_recipe(folder, recipe)
        return found
    if not force and _began(folder) and not _unfinished(folder):
        which = "this recipe" if _is_of(folder, recipe) else "another recipe"
        raise UserError(
            f"the output folder {folder} is not empty: it holds a finished run of {which}",
            f"robustify evaluate {shlex.quote(str(folder))} measures its model; -o FOLDER runs elsewhere, --force "
            "(force=True in Python) anew in its place",
        )
    files.new_folder(folder, force)
    return None


def _began(folder: Path) -> bool:
    """Whether a run began here: not a recipe someone put there."""
    return all((folder / name).exists() for name in ("recipe.yaml", "environment.json"))


def _unfinished(folder: Path) -> bool:
    """Whether a run began here and has not ended: the model is written last, and then the training state goes."""
    left = any((folder / name).exists() for name in _STATE)
    return _began(folder) and (left or not (folder / "model" / CONFIG).exists())


def clear_state(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    for name in _STATE:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _recipe_there(folder: Path) -> Recipe:
    """The recipe of the run in a folder. Raises UserError when there is none, or it cannot be read."""
    try:
        return build(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml") from None
    except (yaml.YAMLError, UserError) as error:
        hint = "--force (force=True in Python) starts anew there"
        raise UserError(f"{folder / 'recipe.yaml'} cannot be read: {error}", hint) from None


def _is_of(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder is of this recipe, as far as its result depends on it; one that cannot be read is not."""
    try:
        return _recipe_there(folder).digest == recipe.digest
    except UserError:
        return False


def _same_recipe(folder: Path, recipe: Recipe) -> None:
    there = _recipe_there(folder)
    if there.digest != recipe.digest:
        mine, theirs = flat(recipe.to_dict()), flat(there.to_dict())
        changed = [f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in mine if mine.get(key) != theirs.get(key)]
        raise UserError(
            f"{folder} holds an unfinished run of another recipe ({'; '.join(changed[:4])})",
            f"continue it with: {_command(folder, there)}; "
            "or start anew with another folder (-o) or --force (force=True in Python)",
        )


def _command(folder: Path, there: Recipe) -> str:
    """What continues the run by its recipe: code and pickles run only where the command line itself says so."""
    typed = ["robustify", "finetune", str(folder / "recipe.yaml")]
    typed += ["--model", there.model.source] if names_code(there.model.source) else []
    typed += ["--allow-pickle"] if there.model.allow_pickle else []
    return shlex.join([*typed, "-o", str(folder)])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def begin_run(folder: Path, recipe: Recipe, command: str, anew: bool) -> None:
    """Write the resolved recipe, with the command at its head, and the environment; a new run drops an older one's state."""
    if anew:
        clear_state(folder)
        if (folder / "recipe.yaml").exists():  # an older run that --force replaces must not pass for this one's
            ours = [folder / "model" / name for name in OURS]  # and what a person put there, into the card too, stays
            for path in (*ours, *(folder / name for name in ("report.json", "report.npz", "metrics.jsonl"))):
                path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "recipe.yaml", (f"# {command}\n" if command else "") + recipe.to_yaml())
    files.write_json(folder / "environment.json", environment("cuda" if torch.cuda.is_available() else "cpu"))
