"""Which images every step sees, on which process: a function of the seed and the step alone.

With unlabelled images a batch is made of blocks, so many labelled images and so many unlabelled ones, and every process has
whole blocks: then the mean over processes of each one's means is the mean over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustify.data import Split
from robustify.distributed import World
from robustify.errors import UserError
from robustify.recipe import Recipe, TrainSettings
from robustify.rng import mix

_ORDER, _POOL = 11, 16  # first words of the seeds
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pool:
    """Images beside the training set. share: of every batch."""

    images: Split
    share: float


def check_batch(recipe: Recipe, images: int, processes: int) -> None:
    """Raise UserError when the batch is larger than the training set, lacks the labelled or the unlabelled images that it
    is to have, or does not divide over the processes."""
    t, passes = recipe.train, recipe.train.accumulate * processes
    share = recipe.data.unlabelled_share if recipe.data.unlabelled else 0.0
    labelled = labelled_of(recipe)
    unlabelled = t.batch_size - labelled
    if images < labelled:
        raise UserError(
            f"batch_size {t.batch_size} is larger than the {images} training images",
            _fitting(images // 2, share, images, passes),
        )
    if share and not (labelled and unlabelled):
        raise UserError(
            f"data.unlabelled_share {share:g} makes {unlabelled} of the {t.batch_size} images of a batch unlabelled, "
            f"{'none' if not unlabelled else 'all'} of them",
            _fitting(t.batch_size, share, images, passes),
        )
    if labelled % passes or unlabelled % passes:
        said = f"batch_size {t.batch_size} is not divisible by {t.accumulate} passes x {processes} processes"
        if unlabelled:
            said = f"a batch of {labelled} labelled and {unlabelled} unlabelled images does not divide over {passes} passes"
            said += f" ({t.accumulate} x {processes} processes)"
        raise UserError(said, _fitting(t.batch_size, share, images, passes))


def _fitting(near: int, share: float, images: int, passes: int) -> str:
    """Advise the batch size nearest to `near` that check_batch takes."""
    for far in range(math.ceil(images / (1 - share)) + 1):
        for size in (near - far, near + far):
            unlabelled = pool_share(size, share)
            parts = (size - unlabelled, unlabelled) if share else (size,)
            if size - unlabelled <= images and all(part > 0 and part % passes == 0 for part in parts):
                return f"take --set train.batch_size={size} (batch_size={size} in robustify.harden)"
    return f"no batch of these {images} images does: take fewer passes" + (" or another data.unlabelled_share" * bool(share))


def labelled_of(recipe: Recipe) -> int:
    """How many images of a batch are labelled."""
    batch = recipe.train.batch_size
    return batch - (pool_share(batch, recipe.data.unlabelled_share) if recipe.data.unlabelled else 0)


def pool_share(batch_size: int, share: float) -> int:
    """How many of a batch's images are unlabelled."""
    return round(batch_size * share)


def epoch_lists(n: int, epoch: int, s: TrainSettings, world: World, labelled: int, times: int) -> list[list[int]]:
    """This process's index lists of an epoch: its rows of every micro-batch of `labelled` images of every global batch.

    times: how often in a row each batch is taken.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(s.seed, _ORDER, epoch))).tolist()
    return _rows(order[: n // labelled * labelled], labelled, s.accumulate, world, times)


def pool_lists(
    n: int, first: int, steps: int, s: TrainSettings, world: World, size: int, times: int
) -> list[list[int]]:
    """The same of a pool of n unlabelled images, `size` a step, for `steps` batches from the batch with number `first`.

    The pool is taken in one random order after another, however long the epochs of the labelled images are.
    """
    order: list[int] = []
    for lap in range(first * size // n, -(-(first + steps) * size // n)):
        generator = torch.Generator().manual_seed(mix(s.seed, _POOL, lap))
        order += torch.randperm(n, generator=generator).tolist()
    begin = first * size % n
    return _rows(order[begin : begin + steps * size], size, s.accumulate, world, times)


def _rows(order: list[int], size: int, accumulate: int, world: World, times: int) -> list[list[int]]:
    part = size // accumulate
    rows = world.rows(part)
    lists = []
    for first in range(0, len(order), size):
        starts = range(first, first + size, part)
        lists += [order[i + rows.start : i + rows.stop] for i in starts] * times
    return lists


def interleaved(labelled: Batches, unlabelled: Batches) -> Batches:
    """Join two streams of batches block by block."""
    for (x, y), (more, blank) in zip(labelled, unlabelled, strict=True):
        blocks = math.gcd(len(x), len(more))
        yield _join(x, more, blocks), _join(y, blank, blocks)


def _join(a: Tensor, b: Tensor, blocks: int) -> Tensor:
    rest = a.shape[1:]
    return torch.cat([a.reshape(blocks, -1, *rest), b.reshape(blocks, -1, *rest)], 1).flatten(0, 1)
