"""Split: labelled images by index, in memory or read on demand. Who trains or evaluates decides the order."""
from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustify.errors import UserError
from robustify.images import Size, fit

Indices = Sequence[int] | Tensor
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Resident:
    """Images in memory.

    images: uint8, or float32 in [0,1], [N,C,h,w], on any device.
    labels: int64 [N], always on the CPU.
    size:   (H, W) of the batches; images stored at another size are resized batch by batch, on their device.
    """

    images: Tensor
    labels: Tensor
    size: Size

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the batches."""
        return self.images.shape[1], *self.size

    def raw(self, indices: Indices) -> Tensor:
        """The images as they are stored, [B,C,h,w]."""
        return self.images[torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)]

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return (x float32 [B,C,H,W] in [0,1], y int64 [B]) on the device of the images."""
        x = _floats(self.raw(indices), self.size)
        return x, _labels(self, indices).to(x.device)

    def to(self, device: torch.device | str) -> Resident:
        """The same split with its images on that device."""
        return replace(self, images=self.images.to(device))


class Pictures(Protocol):
    """Pictures by index, uint8 or float32 in [0,1], all of one shape [C,h,w]. Raises UserError for a broken one."""

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Lazy:
    """Images that are read when they are asked for.

    labels: int64 [N], on the CPU. places: int64 [N], where image i lies in `pictures`.
    stored: (C, h, w) of the pictures. size: (H, W) of the batches.
    """

    pictures: Pictures
    labels: Tensor
    places: Tensor
    stored: tuple[int, int, int]
    size: Size

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the batches."""
        return self.stored[0], *self.size

    def raw(self, indices: Indices) -> Tensor:
        """The images as they are read, [B,C,h,w]."""
        places = self.places[torch.as_tensor(indices, dtype=torch.int64)].tolist()
        return torch.stack([self.pictures[place] for place in places]) if places else torch.zeros(0, *self.stored)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return (x float32 [B,C,H,W] in [0,1], y int64 [B]) on the CPU."""
        return _floats(self.raw(indices), self.size), _labels(self, indices)

    def to(self, device: torch.device | str) -> Lazy:
        """The same split: `batches` moves what it reads."""
        return self


Split = Resident | Lazy


def _floats(raw: Tensor, size: Size) -> Tensor:
    x = raw.float().div_(255) if raw.dtype == torch.uint8 else raw
    return fit(x, size)


def _labels(split: Split, indices: Indices) -> Tensor:
    return split.labels[torch.as_tensor(indices, dtype=torch.int64, device="cpu")]


def subset(split: Split, indices: Indices) -> Split:
    """Return the split of these images, in this order."""
    indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    if isinstance(split, Resident):
        return replace(split, images=split.raw(indices), labels=split.labels[indices])
    return replace(split, places=split.places[indices], labels=split.labels[indices])


def chunks(n: int, size: int) -> Iterator[range]:
    """Cut 0..n-1 into runs of at most `size`, in order."""
    return (range(start, min(start + size, n)) for start in range(0, n, size))


def resized(split: Split) -> str | None:
    """Say that the images have another size than the batches; None when they have not. Large pictures are shrunk as they are
    read, which nobody needs to be told."""
    stored, size = (tuple(map(int, split.raw([0]).shape[2:])), split.shape[1:]) if len(split) else ((), ())
    return None if stored == size else "{} x {}, resized to {} x {}".format(*stored, *size)


def batches(split: Split, index_lists: Iterable[Indices], device: torch.device | str,
            workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x float32 [B,C,H,W] in [0,1], y int64 [B]) on the device for each list of indices, in order.

    Images travel as they are stored and become floats on the device. workers: processes that read a lazy split ahead;
    the batches are the same for any number. Raises UserError for a picture that cannot be read.
    """
    reader = _Reader(split)
    if isinstance(split, Lazy):
        # its own generator, for a loader draws from the global one otherwise
        found = DataLoader(reader, sampler=index_lists, batch_size=None, num_workers=workers,
                           pin_memory=torch.device(device).type == "cuda", generator=torch.Generator(),
                           worker_init_fn=_outlive_sigterm)
    else:
        found = map(reader.__getitem__, index_lists)
    for item in found:
        if isinstance(item, UserError):
            raise item
        raw, y = item
        yield _floats(raw.to(device, non_blocking=True), split.size), y.to(device, non_blocking=True)


def _outlive_sigterm(worker: int) -> None:
    """SIGTERM may come to all processes of a run: a worker reads on for the step in hand, and ends with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Reader(Dataset):
    """Whole batches by their indices. A UserError is handed over: a loader's worker would bury it in a traceback."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: Indices) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.split.raw(index), _labels(self.split, index)
        except UserError as error:
            return error


def resident(split: Lazy, threads: int = 1, progress: Progress | None = None) -> Resident:
    """Read all pictures into memory, calling progress(done, total) on the way. Raises UserError for a broken one."""
    images = torch.empty((len(split), *split.stored), dtype=split.raw([0]).dtype)

    def fill(indices: range) -> int:
        images[indices.start:indices.stop] = split.raw(indices)
        return len(indices)

    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for count in pool.map(fill, chunks(len(split), 256)):
            done += count
            if progress:
                progress(done, len(split))
    return Resident(images, split.labels, split.size)
