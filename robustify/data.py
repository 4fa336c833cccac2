"""Data sets by name, folder, file or tensors -> Data(train, val, test); the three never overlap by our doing."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustify.arrays import InputSize, pair_split, read_npz, split_of
from robustify.cifar import read_cifar
from robustify.errors import UserError, nearest
from robustify.folders import read_folder
from robustify.images import SMALL_SIDE
from robustify.rng import mix
from robustify.splits import Lazy, Progress, Resident, Split, batches, chunks, resident, subset

__all__ = ["Data", "Lazy", "Resident", "Split", "batches", "chunks", "digest", "from_tensors", "load", "subset"]

NAMES = "digits, cifar10, cifar100, folder:PATH, npz:PATH"
TEST_FRACTION = 0.2  # held out where the source has no test set
TEST_IMAGES = {"digits": 449, "cifar10": 10_000, "cifar100": 10_000}  # known before anything is read
FEWEST = 4  # images in any split that we hold out
MEMORY = 2 * 2**30  # bytes of pictures that are read into memory at most
COLOUR, GREY = "crop-flip", "shift"  # grey images are often digits or letters, which a flip would turn into others
TEST_SEED = 0  # which images are the test set never depends on the run's seed


@dataclass(frozen=True, eq=False)
class Data:
    """One data set, ready for a model.

    class_names: None where the source has no names. input_size: (C, H, W) of every batch.
    augmentation: one of augment.KINDS, what suits the data. digest: 12 hex digits of the labels and some pixels.
    rest: the training images that a limit left out. test_name: what reports call the test images.
    """

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    class_names: list[str] | None
    input_size: InputSize
    augmentation: str
    digest: str
    rest: Split | None = None
    test_name: str = "test"

    def to(self, device: torch.device | str) -> Data:
        """The same data with the images that are in memory moved to that device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


@dataclass(frozen=True)
class Source:
    """What a source has: its own splits, before anything is held out. `train` is always there."""

    name: str
    splits: dict[str, Split]
    augmentation: str
    class_names: list[str] | None = None
    num_classes: int | None = None
    test_fraction: float = TEST_FRACTION
    threads: int = 1


def load(name: str, *, root: Path | None = None, val_fraction: float = 0.1, seed: int = 0,
         input_size: InputSize | None = None, limit: int | None = None, progress: Progress | None = None) -> Data:
    """Read a data set: digits, cifar10, cifar100, folder:PATH or npz:PATH.

    root: where cifar lies or is put; else ROBUSTIFY_DATA_DIR, else ~/.cache/robustify/data.
    val_fraction: part of the training images held out for validation, unless the source has both val and test.
    seed: which images these are; a test set that is held out does not depend on it.
    input_size: (C, H, W) that the model takes; images are resized to it and grey ones become colour.
    limit: at most so many training images, evenly over the classes, validation among them; test stays whole.
    progress: called with (done, total) while pictures are read into memory.
    Raises UserError for anything wrong with the name or the data.
    """
    check_name(name)
    kind, _, path = name.partition(":")
    where = root or Path(os.environ.get("ROBUSTIFY_DATA_DIR") or Path.home() / ".cache/robustify/data")
    source = READERS[kind](kind, Path(path or where).expanduser(), input_size)
    return _assemble(source, val_fraction, seed, limit, progress)


def check_name(name: str) -> None:
    """Raise UserError unless `name` names a data set, and one that is there where it names a place."""
    kind, _, path = name.partition(":")
    if kind not in READERS or (path != "") != (kind in ("folder", "npz")):
        there = f" Did you mean folder:{name}?" if Path(name).expanduser().is_dir() else nearest(kind, list(READERS))
        raise UserError(f"unknown data set {name!r}", f"data sets: {NAMES}.{there}")
    if path and not Path(path).expanduser().exists():
        raise UserError(f"no {'folder' if kind == 'folder' else 'file'} {path}", f"say where it lies: {kind}:PATH")


def images_of(name: str, root: Path | None, input_size: InputSize) -> Split:
    """Return the training images of another data set, whatever their labels: named as for `load`. Raises UserError."""
    kind, _, path = name.partition(":")
    if kind in ("folder", "npz") and path:
        return READERS[kind](kind, Path(path).expanduser(), input_size).splits["train"]
    return load(name, root=root, input_size=input_size).train


def from_tensors(train: Any, val: Any = None, test: Any = None, *, name: str = "tensors",
                 class_names: list[str] | None = None, num_classes: int | None = None,
                 input_size: InputSize | None = None, val_fraction: float = 0.1, seed: int = 0,
                 limit: int | None = None, augmentation: str | None = None, progress: Progress | None = None) -> Data:
    """Make a data set of your own images: each part a pair (x, y) of arrays, or a torch Dataset of such pairs.

    Images: uint8, or floats in [0,1] before any normalisation. What is missing is held out of train: a tenth for val, a
    fifth for test, disjoint. A small Dataset is read once into memory, so its own random transforms are drawn once.
    Raises UserError for images or labels that cannot be meant.
    """
    given = {"train": train, "val": val, "test": test}
    splits = {part: split_of(pairs, f"{name} {part}", input_size) for part, pairs in given.items() if pairs is not None}
    source = Source(name, splits, augmentation or _usual(splits["train"]), class_names, num_classes)
    data = _assemble(source, val_fraction, seed, limit, progress)
    return data if test is not None else replace(data, test_name="held-out")


def digest(*splits: Split) -> str:
    """Return 12 hex digits that identify the labels and a sample of the pixels of these splits."""
    found = hashlib.sha256()
    for split in splits:
        sample = split.raw(torch.linspace(0, len(split) - 1, 16).long()).cpu().contiguous()
        found.update(f"{sample.dtype} {tuple(sample.shape)}".encode())
        found.update(sample.numpy().tobytes())
        found.update(split.labels.numpy().tobytes())
    return found.hexdigest()[:12]


def _digits(name: str, root: Path, input_size: InputSize | None) -> Source:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.from_numpy(found.images).float() / 16
    split = pair_split(images, found.target, name, input_size)
    return Source(name, {"train": split}, GREY, [str(digit) for digit in range(10)], test_fraction=0.25)


def _cifar(name: str, root: Path, input_size: InputSize | None) -> Source:
    train, test = read_cifar(name, root)
    splits: dict[str, Split] = {part: pair_split(found.data, found.targets, name, input_size)
                                for part, found in (("train", train), ("test", test))}
    return Source(name, splits, COLOUR, list(train.classes))


def _folder(_: str, path: Path, input_size: InputSize | None) -> Source:
    splits, classes, grey = read_folder(path, input_size)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = Path(os.path.abspath(path)).name  # as it was given; where it lies is nobody's business on a model card
    return Source(f"folder:{name}", dict(splits), GREY if grey else COLOUR, classes, threads=threads)


def _npz(_: str, path: Path, input_size: InputSize | None) -> Source:
    splits: dict[str, Split] = {part: pair_split(x, y, f"{path.name} {part}", input_size)
                                for part, (x, y) in read_npz(path).items()}
    return Source(f"npz:{path.stem}", splits, _usual(splits["train"]))


READERS: dict[str, Callable[[str, Path, InputSize | None], Source]] = {
    "digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "folder": _folder, "npz": _npz}


def _usual(train: Split) -> str:
    made_colour = isinstance(train, Resident) and train.images.stride(1) == 0
    return GREY if made_colour or train.shape[0] == 1 else COLOUR


def _assemble(source: Source, val_fraction: float, seed: int, limit: int | None, progress: Progress | None) -> Data:
    """Hold out what is missing, read small pictures into memory. Raises UserError."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction must lie between 0 and 1, not {val_fraction:g}", "0.1 is the usual one")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}", "leave it out for all images")
    splits = dict(source.splits)
    shapes = {part: split.shape for part, split in splits.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{source.name}: the splits differ in image size: {shapes}",
                        "give images of one size, or an input_size")
    classes = _classes(source)
    if "test" not in splits:
        splits["train"], splits["test"] = _held_out(splits["train"], source.test_fraction, TEST_SEED, source.name)
    rest = None
    if limit is not None and limit < len(splits["train"]):
        taken, left = _sample(splits["train"].labels, limit, TEST_SEED)
        splits["train"], rest = subset(splits["train"], taken), subset(splits["train"], left)
    if "val" not in splits:
        splits["train"], splits["val"] = _held_out(splits["train"], val_fraction, seed, source.name)
    train, val, test = (_settled(splits[part], source.threads, progress) for part in ("train", "val", "test"))
    return Data(source.name, train, val, test, classes, source.class_names, train.shape, source.augmentation,
                digest(train, val, test), rest)


def _classes(source: Source) -> int:
    """The number of classes. Raises UserError for labels beyond it, or for one class alone."""
    train = source.splits["train"].labels
    names = len(source.class_names) if source.class_names else None
    count = source.num_classes or names or int(train.max()) + 1
    if names not in (None, count):
        raise UserError(f"{source.name}: {names} class names for {count} classes", "give one name per class")
    for part, split in source.splits.items():
        if int(split.labels.max()) >= count:
            raise UserError(f"{source.name} {part}: label {int(split.labels.max())}, but there are {count} classes",
                            f"labels lie in 0..{count - 1}")
    if len(train.unique()) < 2:
        raise UserError(f"{source.name}: all training images belong to class {int(train[0])}",
                        "at least two classes are needed")
    return count


def _held_out(split: Split, fraction: float, seed: int, what: str) -> tuple[Split, Split]:
    """Return (what remains, what is held out). Raises UserError if either were too small to mean anything."""
    count = max(round(fraction * len(split)), FEWEST)
    if len(split) < count + FEWEST:
        raise UserError(f"{what}: {len(split)} images are too few to hold {count} of them out of the training",
                        f"at least {FEWEST} must remain: give more images, or a split of its own")
    held, rest = _sample(split.labels, count, seed)
    return subset(split, rest), subset(split, held)


def _sample(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` images, from each class its share within one: (their places, all other places), both ascending."""
    n = len(labels)
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, n, count)))
    by_class = mixed[labels[mixed].argsort(stable=True)]
    step = torch.arange(n + 1) * count // n
    taken = step[1:] > step[:-1]
    return by_class[taken].sort().values, by_class[~taken].sort().values


def _settled(split: Split, threads: int, progress: Progress | None) -> Split:
    """Small pictures move into memory: reading them again every epoch would cost more than training on them."""
    if isinstance(split, Resident) or max(split.stored[1:]) > SMALL_SIDE:
        return split
    channels, height, width = split.stored
    return split if len(split) * channels * height * width > MEMORY else resident(split, threads, progress)
