"""Training states on disk: complete or absent, so that a run killed at any moment finds the last whole one."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator

from robustify.distributed import World
from robustify.errors import UserError

_PREFIX = "step-"


def save(accelerator: Accelerator, world: World, folder: Path, step: int) -> None:
    """Write the accelerator's state under folder/step-N and drop the older ones, once the new one is whole."""
    target = folder / f"{_PREFIX}{step:08d}"
    unfinished = folder / f".{target.name}.tmp"
    if world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.wait()
    accelerator.save_state(str(unfinished))
    world.wait()
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        for older in whole(folder)[:-1]:
            shutil.rmtree(older, ignore_errors=True)
    world.wait()


def load(accelerator: Accelerator, checkpoint: Path) -> None:
    """Put the state back. Raises UserError when the folder holds none."""
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"cannot resume from {checkpoint}: {error}", "start anew with --resume never --force") from None


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = whole(folder)
    return found[-1] if found else None
