"""Splits of what the user holds: arrays, tensors, npz files, torch Datasets. Checks that they can be meant."""
from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustify.errors import UserError
from robustify.images import chw, fit, nchw, stored_size, with_channels
from robustify.splits import Lazy, Resident, Split

InputSize = tuple[int, int, int]
NPZ_KEYS = "x_train, y_train, x_test, y_test (and x_val, y_val), or x, y alone"


def read_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the (x, y) pairs of an npz file by split: train, perhaps val and test. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no file {path}", f"an npz file holds {NPZ_KEYS}")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array alone")
        with file:
            arrays = dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as an npz file: {error}", f"it holds {NPZ_KEYS}, and no objects") from None
    keys = {part: (f"x_{part}", f"y_{part}") for part in ("train", "val", "test")}
    if "x_train" not in arrays and "x" in arrays:
        keys["train"] = "x", "y"
    wanted = {part: pair for part, pair in keys.items() if part == "train" or any(key in arrays for key in pair)}
    missing = [key for pair in wanted.values() for key in pair if key not in arrays]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}",
                        f"an npz file holds {NPZ_KEYS}")
    return {part: (arrays[x], arrays[y]) for part, (x, y) in wanted.items()}


def split_of(source: Any, what: str, input_size: InputSize | None) -> Split:
    """Return the split of a pair (x, y), of a torch Dataset of such pairs (lazy), or of a Split (as it is).

    what: its name in messages. Raises UserError.
    """
    if isinstance(source, (Resident, Lazy)):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2 and hasattr(source[0], "shape"):
        return pair_split(source[0], source[1], what, input_size)
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        inner = " You gave a DataLoader: give its .dataset." if hasattr(source, "dataset") else ""
        raise UserError(f"{what}: cannot read images from a {type(source).__name__}",
                        f"give a pair (x, y), or a torch Dataset with a length.{inner}")
    return _dataset_split(source, what, input_size)


def pair_split(x: Any, y: Any, what: str, input_size: InputSize | None) -> Resident:
    """Return the split of images x (NCHW, NHWC or NHW; uint8 or float in [0,1]) and labels y [N]. Raises UserError."""
    images, labels = nchw(x, what).cpu(), labels_of(y, what)
    if len(images) != len(labels):
        raise UserError(f"{what}: {len(images)} images but {len(labels)} labels", "each image needs one label")
    if input_size:
        images = with_channels(images, input_size[0], what)
    height, width = input_size[1:] if input_size else images.shape[2:]
    return Resident(images, labels, (height, width))


def labels_of(y: Any, what: str) -> Tensor:
    """Return labels as int64 [N] on the CPU. Raises UserError unless they are integers from 0."""
    hint = "labels are integers from 0, one per image"
    y = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if y.dtype.kind not in "iu":
        raise UserError(f"{what}: labels of type {y.dtype}", hint)
    y = torch.from_numpy(y.astype(np.int64))
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        shape = "x".join(map(str, y.shape)) or "()"
        raise UserError(f"{what}: labels of shape {shape}", hint + "; for one-hot rows take the argmax")
    if not len(y):
        raise UserError(f"{what}: no images", "")
    if int(y.min()) < 0:
        raise UserError(f"{what}: label {int(y.min())}", hint)
    return y


def counted_from_one(labels: Tensor, classes: int) -> UserError | None:
    """The mistake when labels [N] of so many classes are 1 to that number, not 0 to one less; None where they are not."""
    if (int(labels.min()), int(labels.max())) != (1, classes):
        return None
    message = f"the labels are 1 to {classes}, those of {classes} classes are 0 to {classes - 1}"
    return UserError(message, "perhaps they count from 1: then give the labels minus 1")


@dataclass(frozen=True)
class _Items:
    """The images of a torch Dataset, uint8 or float32 in [0,1], all of the shape `stored`."""

    dataset: Any
    what: str
    stored: tuple[int, int, int]

    def __getitem__(self, index: int, /) -> Tensor:
        what = f"{self.what}, image {index}"
        x = with_channels(chw(self.dataset[index][0], what)[None], self.stored[0], what)
        if tuple(x.shape[1:]) != self.stored:
            whole = x.dtype == torch.uint8
            x = fit(x.float().div(255) if whole else x, self.stored[1:])
            x = x.mul(255).round().byte() if whole else x
        return x[0]


def _dataset_split(dataset: Any, what: str, input_size: InputSize | None) -> Lazy:
    if not len(dataset):
        raise UserError(f"{what}: no images", "")
    labels = labels_of(_labels(dataset, what), what)
    channels, height, width = chw(_pair(dataset[0], what)[0], f"{what}, image 0").shape
    channels, *size = input_size or (channels, height, width)
    size = size[0], size[1]
    stored = channels, *stored_size((height, width), size)
    return Lazy(_Items(dataset, what, stored), labels, torch.arange(len(labels)), stored, size)


def _labels(dataset: Any, what: str) -> Any:
    """All labels of a Dataset: those it lists, or else by reading each item once."""
    if isinstance(dataset, torch.utils.data.Subset):
        return torch.as_tensor(_labels(dataset.dataset, what))[torch.as_tensor(dataset.indices)]
    listed = getattr(dataset, "targets", None)
    if listed is not None and len(listed) == len(dataset) and getattr(dataset, "target_transform", None) is None:
        return listed
    return np.asarray([_pair(dataset[i], what)[1] for i in range(len(dataset))])


def _pair(item: Any, what: str) -> Any:
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item
    raise UserError(f"{what}: each item must be a pair (image, label), not a {type(item).__name__}",
                    "wrap the Dataset so that it yields pairs")
