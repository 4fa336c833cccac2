"""Training states on disk: complete or absent, so that a run killed at any moment finds the last whole one.

One file, written and read by the main process alone: the other machines need not see the folder. It holds what all
processes share once, and what differs between them (BatchNorm's statistics in mid-epoch, say) once for each.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from robustify import files
from robustify.errors import UserError
from robustify.step import Setup

Own = dict[str, Tensor]


class Part(Protocol):
    """A part of a run that must be put back: a network, an optimiser, the loop's own state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def save(setup: Setup, more: dict[str, Part], folder: Path, step: int) -> None:
    """Write folder/step-N.pt with the state of the run, and drop the older ones once it is whole.

    more: what the loop itself remembers, by name.
    """
    everyones = setup.world.gather_on_main({name: tensor.cpu() for name, tensor in _own(setup).items()})
    parts = {name: part.state_dict() for name, part in _parts(setup, more).items()}  # on all: free-at's noise is gathered
    if setup.world.is_main:
        state = {"parts": parts, "own": everyones}
        folder.mkdir(parents=True, exist_ok=True)
        files.save(folder / f"step-{step:08d}.pt", lambda path: _write(path, state))
        for older in whole(folder)[:-1]:
            older.unlink()
    setup.world.wait()


@torch.no_grad()
def resume(setup: Setup, more: dict[str, Part], checkpoint: Path) -> None:
    """Put the state back, on any number of processes.

    What was each process's own it finds again when there are as many as before; with another number all take the mean.
    Raises UserError when the file does not hold the state of such a run.
    """
    state = setup.world.on_main(lambda: _read(checkpoint))
    try:
        for name, part in _parts(setup, more).items():
            part.load_state_dict(state["parts"][name])
        everyones: list[Own] = state["own"]
        same = len(everyones) == setup.world.size
        mine = everyones[setup.world.rank] if same else _mean(everyones)
        for name, buffer in _buffers(setup).items():
            buffer.copy_(mine[name])
        if setup.hook:
            setup.hook.put_back(mine, setup.world.device)
    except (KeyError, ValueError, RuntimeError) as error:
        raise _unreadable(checkpoint, error) from None
    if setup.shards:
        setup.shards.scatter()
    if setup.shadow:
        setup.shadow.refresh()


def _parts(setup: Setup, more: dict[str, Part]) -> dict[str, Part]:
    """What is the same on all processes."""
    parts = {
        "model": setup.model,
        "optimizer": setup.shards or setup.optimizer,
        "tracker": setup.tracker,
        "ema": setup.ema,
        "scaler": setup.accelerator.scaler,
    }
    return {**more, **{name: part for name, part in parts.items() if part is not None}}


def _own(setup: Setup) -> Own:
    """What differs between processes: BatchNorm's statistics, until an epoch ends, and what compression has left out."""
    return {**_buffers(setup), **(setup.hook.own() if setup.hook else {})}


def _mean(everyones: list[Own]) -> Own:
    return {name: torch.stack([own[name] for own in everyones]).mean(0) for name in everyones[0]}


def _buffers(setup: Setup) -> Own:
    models = {"model": setup.model, "ema": setup.ema and setup.ema.module}
    return {
        f"{which}.{name}": buffer
        for which, model in models.items()
        if model is not None
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }


def _write(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:  # of a file that it opens itself torch does not tell why it could not be written
        torch.save(state, file)


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _unreadable(checkpoint, error) from None


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"cannot resume from {checkpoint}: {reason}", "start anew with --resume never --force")


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def step_of(checkpoint: Path) -> int:
    """The number of steps made when it was saved."""
    return int(checkpoint.stem.removeprefix("step-"))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = whole(folder)
    return found[-1] if found else None
