"""Folders of pictures, one subfolder per class, with or without train, val and test above them."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustify.errors import UserError
from robustify.images import GREY_MODES, Size, fit_picture, no_colour, stored_size
from robustify.splits import Lazy

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TRAIN, VAL, TEST = ("train",), ("val", "valid", "validation"), ("test",)
LAYOUT = "a folder holds train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg alone"
SAMPLE = 64  # pictures looked at to learn their size and colours
DEFAULT_SIDE = 224


@dataclass(frozen=True)
class Listing:
    """The pictures of one split: classes in alphabetical order, files, and each file's class number."""

    classes: list[str]
    files: list[Path]
    labels: list[int]


@dataclass(frozen=True)
class Files:
    """Reads pictures as uint8 [channels, *size]: short side resized, the middle kept."""

    paths: list[Path]
    channels: int
    size: Size

    def __getitem__(self, index: int, /) -> Tensor:
        return decode(self.paths[index], self.channels, self.size)


def decode(path: Path, channels: int, size: Size) -> Tensor:
    """Return one picture, uint8 [channels, *size]. Raises UserError that names the file if that is impossible."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise UserError(f"{path} has more than 8 bits per channel", "convert it to 8 bits")
            if channels == 1 and picture.mode not in GREY_MODES:
                raise no_colour(str(path), channels)
            picture = fit_picture(picture.convert("L" if channels == 1 else "RGB"), size)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}", "remove it or replace it") from None
    pixels = np.array(picture, dtype=np.uint8).reshape(*size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_folder(folder: Path, input_size: tuple[int, int, int] | None) -> tuple[dict[str, Lazy], list[str], bool]:
    """Return the splits that the folder has ("train", perhaps "val", "test"), the class names, whether all is grey.

    input_size: (C, H, W) of the batches; None takes it from the pictures. val/ without test/ is the test set.
    Raises UserError for a layout that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", LAYOUT)
    listings = _listings(folder)
    classes = listings["train"].classes
    for part, listing in listings.items():
        if listing.classes != classes:
            raise UserError(f"{folder}: train and {part} differ in classes: {_difference(classes, listing.classes)}",
                            "both need the same class folders")
    if "test" not in listings and "val" in listings:
        listings["test"] = listings.pop("val")
    channels, native = _look(listings["train"].files)
    grey = channels == 1
    if input_size is None:
        size = native if native and max(native) <= DEFAULT_SIDE else (DEFAULT_SIDE, DEFAULT_SIDE)
    elif not grey and input_size[0] == 1:
        raise no_colour(str(folder), 1)
    else:
        channels, size = input_size[0], input_size[1:]
    height, width = stored_size(native, size)
    stored = channels, height, width
    return {part: _lazy(listing, stored, size) for part, listing in listings.items()}, classes, grey


def _lazy(listing: Listing, stored: tuple[int, int, int], size: Size) -> Lazy:
    labels = torch.tensor(listing.labels)
    return Lazy(Files(listing.files, stored[0], stored[1:]), labels, torch.arange(len(labels)), stored, size)


def _listings(folder: Path) -> dict[str, Listing]:
    parts = {"train": TRAIN, "val": VAL, "test": TEST}
    known = {part: names for part, names in parts.items() if _first(folder, names)}
    if not known:
        return {"train": _listing(folder)}
    if "train" not in known:
        raise UserError(f"{folder} has {' and '.join(known)} but no train folder", LAYOUT)
    return {part: _listing(_first(folder, names) or folder) for part, names in known.items()}


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _listing(folder: Path) -> Listing:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _visible(entry.name))
    if not classes:
        raise UserError(f"{folder} has no class folders", LAYOUT)
    listing = Listing(classes, [], [])
    for number, name in enumerate(classes):
        files = _pictures(folder / name)
        if not files:
            raise UserError(f"the class folder {folder / name} has no pictures", f"known endings: {' '.join(ENDINGS)}")
        listing.files.extend(files)
        listing.labels.extend([number] * len(files))
    return listing


def _pictures(folder: Path) -> list[Path]:
    """All pictures beneath the folder, in an order that does not depend on the file system."""
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = filter(_visible, folders)
        found += [Path(here, name) for name in names if name.lower().endswith(ENDINGS) and _visible(name)]
    return sorted(found)


def _visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _look(files: list[Path]) -> tuple[int, Size | None]:
    """Return (channels, size) of a sample of pictures: 1 if all are grey, None if their sizes differ."""
    from PIL import Image

    sizes, grey = set(), True
    for path in files[::max(1, len(files) // SAMPLE)]:
        try:
            with Image.open(path) as picture:
                sizes.add((picture.height, picture.width))
                grey = grey and picture.mode in GREY_MODES
        except OSError as error:
            raise UserError(f"cannot read the picture {path}: {error}", "remove it or replace it") from None
    return 1 if grey else 3, sizes.pop() if len(sizes) == 1 else None


def _difference(train: list[str], other: list[str]) -> str:
    missing, extra = sorted(set(train) - set(other)), sorted(set(other) - set(train))
    words = [f"{word} {', '.join(names[:5])}{', ...' * (len(names) > 5)}" for word, names in
             (("missing", missing), ("extra", extra)) if names]
    return "; ".join(words)
