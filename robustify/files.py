"""Files and folders that are either complete or absent: atomic writes, staged folders, outputs never overwritten.

A full disk is the user's to mend, so writing to one raises UserError with the bytes needed and free.
"""
from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from robustify.errors import UserError

_FULL = {
    errno.ENOSPC: "the disk of {} is full",
    errno.EDQUOT: "your quota on the disk of {} is used up",
    errno.EFBIG: "a file in {} may not become so large (see ulimit -f)",
}
_TEMPORARY = ".tmp"
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())  # two machines that share a disk can have processes of one number


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all. Raises UserError when the disk is full."""
    save(path, lambda temporary: _write(temporary, data), needed=len(data))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, as a whole or not at all. Raises UserError when the disk is full."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, as a whole or not at all. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save(path: str | Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Let `write(temporary)` fill a temporary file beside `path`, then put it in place; `path` is never half written.

    needed: bytes that will be written, for the message, where known. Raises UserError when the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with full_disk_explained(path, needed):
            write(temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def no_room(error: BaseException, path: Path | None, needed: int | None = None, hint: str = "") -> UserError | None:
    """Return what to tell when `error` comes of a full disk, a used-up quota or a limit on files; None when it does not.

    It may be an OSError, have one among its causes, or only name its number, as libraries in Rust do. path: what was
    written, where known. needed: bytes, where known. hint: where else it could go, if not just to any other folder.
    """
    number = next((number for one in _causes(error) for number in _FULL if _says(one, number)), None)
    if number is None:
        return None
    hint = hint or "free some space, or choose a folder on another disk"
    if path is None:
        return UserError(_FULL[number].format("the output"), hint)
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir() and p.suffix != _TEMPORARY)
    facts = [] if needed is None else [f"{needed:,} bytes are needed"]
    if number == errno.ENOSPC:
        facts.append(f"{shutil.disk_usage(folder).free:,} are free")
    said = _FULL[number].format(folder)
    return UserError(f"{said}: {', '.join(facts)}" if facts else said, hint)


@contextmanager
def full_disk_explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise UserError when the block, which writes `path`, finds the disk full. needed: bytes, where known."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = no_room(error, path, needed)
        if full is None:
            raise
        raise full from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says(error: BaseException, number: int) -> bool:
    return (isinstance(error, OSError) and error.errno == number) or f"(os error {number})" in str(error)


def new_folder(path: str | Path, force: bool = False) -> Path:
    """Return the absolute path of an output folder that may be written; checks only, creates nothing.

    Raises UserError when it holds something and `force` is false, when it is a file, when it or its parent cannot be
    written, and when it cannot be swapped as a whole: the current folder, one above it, or a mount point.
    """
    folder = Path(path).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output {path} is a file", "choose another folder (-o)")
    if os.path.ismount(folder) or Path.cwd().is_relative_to(folder):
        hint = f"choose a folder inside it: -o {Path(path) / 'robust'}"
        raise UserError(f"the output {path} cannot be replaced as a whole while it is in use", hint)
    if folder.is_dir() and not force and any(folder.iterdir()):
        hint = "--force (force=True in Python) replaces its files; or name another folder (finetune and blend: -o)"
        raise UserError(f"the output folder {path} is not empty", hint)
    parent = next(p for p in folder.parents if p.exists())
    for place in (parent, folder):
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise UserError(f"cannot write to {place}", "choose a folder that can be written with -o")
    return folder


@contextmanager
def staged_folder(
    path: str | Path, needed: int | None = None, *, drop: Collection[str] = (), force: bool = True
) -> Iterator[Path]:
    """Build a folder under a temporary name beside `path`; when the block ends well it takes the place of `path`.

    Yields the empty folder to fill. Files of an older folder that the block did not write stay, but for those named in
    `drop`, as paths in it. When the block raises, the older folder, or none, is left as it was. Of several processes that
    build the same folder each gets its turn, so it always is the work of one of them; what a killed one left is removed by
    the next on the same machine. The folder is locked while it is filled: another one staged in it would wait for ever.
    needed: bytes, where known. Raises UserError when the disk is full, and when the folder holds something by then and
    `force` is false.
    """
    folder = Path(path).expanduser().resolve()
    stage = None
    try:
        with full_disk_explained(folder, needed), ExitStack() as held:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _turn(folder.parent):
                _clear_killed(folder)
                stage = _new_stage(folder)
                held.enter_context(_turn(stage))
            yield stage
            for file in stage.rglob("*"):
                if file.is_file():
                    _flush(file)
            with _turn(folder.parent):
                if folder.is_dir():
                    new_folder(folder, force)
                    _link_missing(folder, stage, drop)
                _flush(stage)
                held.close()  # else the folder would be locked, under its new name
                _swap(stage, folder)
            _flush(folder.parent)
    finally:  # after a swap the temporary name holds the older folder
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _temporary(path: Path, again: str = "") -> Path:
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}{again}{_TEMPORARY}")


def _new_stage(folder: Path) -> Path:
    """Make an empty folder under a name that nobody has: in a container another process may have our number."""
    stage, number = _temporary(folder), 1
    while True:
        try:
            stage.mkdir()
            return stage
        except FileExistsError:
            number += 1
            stage = _temporary(folder, f"-{number}")


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's entries, on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait for the other processes that change what lies in `folder`. The lock ends with the process, however it ends."""
    if os.name == "nt":  # no such lock there
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clear_killed(folder: Path) -> None:
    """Remove what killed processes of this machine left of this folder: a living one holds the lock of what it is building.

    Another machine's locks may not be seen from here, so what it left is its own to remove.
    """
    if os.name == "nt":
        return
    import fcntl

    ours = re.compile(rf"\.{re.escape(folder.name)}\.{_HOST}\.\d+(-\d+)?{re.escape(_TEMPORARY)}")
    for stage in [path for path in folder.parent.iterdir() if ours.fullmatch(path.name)]:
        with suppress(OSError):  # a file; gone by now; held; a file system without locks
            handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage)
            finally:
                os.close(handle)


def _link_missing(old: Path, new: Path, drop: Collection[str]) -> None:
    """Give `new` every file of `old` that it lacks, as a hard link where the disk can: `old` stays whole."""
    for source in old.rglob("*"):
        target = new / source.relative_to(old)
        if target.exists() or target.is_symlink() or source.relative_to(old).as_posix() in drop:
            continue
        if source.is_dir() and not source.is_symlink():
            target.mkdir(parents=True)
            continue
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)


def _swap(stage: Path, folder: Path) -> None:
    """Put `stage` in the place of `folder`, which then has the name of `stage`."""
    if not folder.exists():
        os.rename(stage, folder)
    elif not _exchange(stage, folder):  # two steps: a kill between them leaves the older folder under a name that tells
        aside = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        try:
            os.rename(stage, folder)
        except OSError:
            os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, which only Linux does; return whether it was done."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
