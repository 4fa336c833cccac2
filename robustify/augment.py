"""Augmentation of whole batches on their device. Every random number comes from `draws`, so processes agree."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustify.errors import UserError, nearest
from robustify.rng import Draws

# none: as it is. flip: mirrored left to right or not. crop-flip: moved by up to an eighth of the side, and flip.
# shift: moved by up to one pixel, for digits and letters, which a flip would turn into others.
KINDS = ("none", "flip", "crop-flip", "shift")


def augment(x: Tensor, kind: str, draws: Draws) -> Tensor:
    """Return x, [N,C,H,W] in [0,1], augmented; what moves in from outside is black.

    Raises UserError for an unknown kind.
    """
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"unknown augmentation {kind!r}", f"augmentations: {known}.{nearest(kind, list(KINDS))}")
    if kind == "none":
        return x
    if kind == "shift":
        return _moved(x, 1, 1, draws)
    if kind == "crop-flip":
        x = _moved(x, max(1, x.shape[2] // 8), max(1, x.shape[3] // 8), draws)
    flipped = draws.uniform_per_image(x) < 0.5
    return torch.where(flipped[:, None, None, None], x.flip(3), x)


def _moved(x: Tensor, down: int, right: int, draws: Draws) -> Tensor:
    """Move each image by up to that many pixels in either direction."""
    n, _, height, width = x.shape
    tops, lefts = _integers(2 * down + 1, x, draws), _integers(2 * right + 1, x, draws)
    # a view of all windows, [N, C, 2*down+1, 2*right+1, H, W]; one gather takes each image's own
    windows = F.pad(x, (right, right, down, down)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=x.device), :, tops, lefts]


def _integers(count: int, x: Tensor, draws: Draws) -> Tensor:
    """One uniform integer of 0..count-1 per image, [N]."""
    # the product may round up to count
    return (draws.uniform_per_image(x) * count).long().clamp_max(count - 1)
