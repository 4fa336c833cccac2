"""Pieces: the finished batches of an evaluation on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustify import files
from robustify.distributed import World
from robustify.environment import PACKAGES, UNKNOWN, released
from robustify.errors import UserError

Arrays = Mapping[str, np.ndarray]
Facts = Mapping[str, Any]  # of JSON's types
_FACTS = "evaluation.json"


class Pieces:
    """A folder with one .npz per finished batch, and the facts that decide whether another run may use them.

    Every process writes its own pieces and reads any, so a run may go on with another number of processes.
    """

    def __init__(self, folder: Path, facts: Facts, world: World) -> None:
        """facts: what is evaluated, e.g. {"seed": 0}. Raises UserError when the folder was begun with others."""
        self.folder = folder
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / _FACTS).exists():
                if any(folder.iterdir()):
                    raise UserError(f"{folder} is not the folder of an evaluation", "name another, or remove it")
                files.write_json(folder / _FACTS, dict(facts))
        world.wait()
        _same_facts(folder, facts)

    def __contains__(self, name: str) -> bool:
        """Whether there is a piece of that name; it is whole or absent."""
        return self._path(name).exists()

    def read(self, name: str) -> Arrays:
        return _read(self._path(name))

    def write(self, name: str, arrays: Arrays) -> None:
        """Raises UserError when the disk is full."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
        files.write_bytes(self._path(name), buffer.getvalue())

    def _path(self, name: str) -> Path:
        words = re.sub(r"[^\w.]+", "-", name)
        return self.folder / f"{words}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.npz"


def pieces_of(folder: Path, facts: Facts) -> Iterator[Arrays]:
    """Yield every piece of a folder. Raises UserError when it was begun with other facts."""
    same_facts(facts_of(folder), facts, str(folder), "give the model and the data that it is of")
    yield from (_read(path) for path in sorted(folder.glob("*.npz")))


def facts_of(folder: Path) -> Facts:
    """Return the facts that a folder was begun with. Raises UserError when it is not the folder of an evaluation."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no facts")
    except FileNotFoundError:
        raise UserError(f"no evaluation was stored in {folder}", "`robustify evaluate` can keep one") from None
    except ValueError as error:
        hint = f"what it says of the batches beside it is lost: rm -r {shlex.quote(str(folder))} and evaluate again"
        raise UserError(f"{folder / _FACTS} is damaged: {error}", hint) from None
    return facts


def finish(folder: Path, keep_as: Path | None = None) -> None:
    """End an evaluation whose report is saved: remove its pieces, or give their folder the name to keep them under."""
    if keep_as is None:
        _remove(folder)
        return
    _remove(keep_as)
    folder.rename(keep_as)


def _remove(folder: Path) -> None:
    """The facts go first, so what a kill leaves can't be taken for an evaluation."""
    (folder / _FACTS).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def differences(known: Facts, facts: Facts) -> str:
    """Which of the facts are others in `known`, as `seed and n (seed: 0 there, 1 here; ...)`; empty when none is."""
    other = [name for name, value in facts.items() if known.get(name) != value]
    shown = "; ".join(f"{name}: {known.get(name)} there, {facts[name]} here" for name in other)
    return f"{' and '.join(other)} ({shown})" if other else ""


def same_facts(known: Facts, facts: Facts, place: str, hint: str) -> None:
    """Raise UserError when an evaluation, known by where it is, was begun with other facts."""
    if other := differences(known, facts):
        raise UserError(f"the evaluation in {place} was begun with another {other}", hint)


def _same_facts(folder: Path, facts: Facts) -> None:
    known = facts_of(folder)
    versions = {name: (released(known.get(name, UNKNOWN)), released(facts.get(name, UNKNOWN))) for name in PACKAGES}
    packages = [f"'{name}=={then}'" for name, (then, now) in versions.items() if then not in (now, UNKNOWN)]
    install = f": pip install {' '.join(packages)}" if packages else ""
    hint = f"go on with what it was begun with{install}; or begin anew: rm -r {shlex.quote(str(folder))}"
    same_facts(known, facts, str(folder), hint)


def _read(path: Path) -> Arrays:
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        hint = f"it is damaged: rm {shlex.quote(str(path))} and go on, or evaluate again if the evaluation had ended"
        raise UserError(f"{path} cannot be read: {error}", hint) from error
