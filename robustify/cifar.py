"""CIFAR-10 and CIFAR-100 as torchvision lays them out; fetched complete or not at all."""
from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from robustify import files
from robustify.errors import UserError


def read_cifar(name: str, root: Path) -> tuple[Any, Any]:
    """Return torchvision's (train, test) sets of cifar10 or cifar100: `data` uint8 [N,32,32,3], `targets`, `classes`.

    Downloads the archive into root if neither it nor its contents are there. Raises UserError if that is impossible.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        return kind(root, train=True), kind(root, train=False)
    except RuntimeError:  # torchvision compares checksums: absent or damaged
        _unpack(kind, root)
    return kind(root, train=True), kind(root, train=False)


def _unpack(kind: Any, root: Path) -> None:
    archive = root / kind.filename
    remedy = f"get {kind.url} another way and put it there as {archive} (md5 {kind.tgz_md5})"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # all work happens in a folder beside the goal, which disappears; the goal is complete or absent
        with tempfile.TemporaryDirectory(dir=root, prefix=".incoming-") as name:
            fresh = Path(name)
            if not archive.exists():
                _download(kind, fresh / kind.filename, remedy)
                os.replace(fresh / kind.filename, archive)
            _check(archive, kind.tgz_md5, remedy)
            with tarfile.open(archive) as tar:
                tar.extractall(fresh, filter="data")
            goal = root / kind.base_folder
            if goal.exists():
                shutil.move(goal, fresh / "damaged")
            os.replace(fresh / kind.base_folder, goal)
    except (OSError, http.client.HTTPException) as error:
        full = files.no_room(error, root)
        raise full or UserError(f"cannot provide {kind.filename} in {root}: {error}", remedy) from error


def _download(kind: Any, path: Path, remedy: str) -> None:
    with urllib.request.urlopen(kind.url, timeout=30) as reply, path.open("wb") as out:
        shutil.copyfileobj(reply, out)
    _check(path, kind.tgz_md5, remedy, f"what {kind.url} sent")


def _check(path: Path, md5: str, remedy: str, called: str = "") -> None:
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
        file.seek(0)
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        page = start.startswith((b"<!doctype", b"<html"))
        what = "a web page" if page else f"another or an incomplete file (md5 {found})"
        raise UserError(f"{called or path} is not the archive but {what}", remedy)
