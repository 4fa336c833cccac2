"""How a network reads its images: whether it would be right more often with another normalisation in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustify.compare import mcnemar
from robustify.pixels import PixelModel

_CHANCE = 0.0025  # of McNemar's exact test: 0.01 over four readings; 64 images that differ by ten, all one way, have 0.002
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SAME = 0.02  # in mean and std: no other reading


@dataclass(frozen=True)
class Reading:
    """A normalisation: its mean and std for each channel, or one for all. accuracy: in [0,1], with it."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float

    def __str__(self) -> str:
        shown = [",".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std)]
        return "mean=[{}],std=[{}]".format(*shown)


@torch.no_grad()
def others(model: nn.Module, x: Tensor, y: Tensor, right: Tensor) -> tuple[Reading | None, Reading | None]:
    """Return the best of the other usual readings, and whether it is better than the model's own: itself, or None.

    model: in eval mode; x, y: images in [0,1] and labels; right: which of them it gets right. Better means: right more
    often than the model as it is, and than the best single answer for all images (a network that answers alike whatever it
    sees may be right more often in either reading), on the same images beyond chance. The usual readings: these images'
    own, ImageNet's, 0.5, none. Costs one forward pass each.
    """
    net = model.net if isinstance(model, PixelModel) else model
    own = (model.mean, model.std) if isinstance(model, PixelModel) else (x.new_zeros(1), x.new_ones(1))
    found: list[tuple[Reading, Tensor]] = []
    for name, mean, std in _usual(x):
        if all(bool(((a.flatten() - b.flatten()).abs() < _SAME).all()) for a, b in ((mean, own[0]), (std, own[1]))):
            continue
        hits = PixelModel(net, mean.tolist(), std.tolist()).to(x.device)(x).argmax(1) == y
        found.append((Reading(name, tuple(mean.tolist()), tuple(std.tolist()), float(hits.double().mean())), hits))
    if not found:
        return None, None
    best, hits = max(found, key=lambda pair: pair[0].accuracy)
    rivals = (right, y == y.mode().values)
    beats = all(hits.sum() > rival.sum() and mcnemar(rival.cpu().numpy(), hits.cpu().numpy()) < _CHANCE for rival in rivals)
    return best, best if beats else None


def _usual(x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    deviation, mean = torch.std_mean(x, (0, 2, 3))
    yield "these images' own", mean.cpu(), deviation.clamp_min(1e-3).cpu()
    if x.shape[1] == 3:
        yield "ImageNet's", torch.tensor(_IMAGENET[0]), torch.tensor(_IMAGENET[1])
    yield "0.5 for all channels", torch.tensor([0.5]), torch.tensor([0.5])
    yield "none", torch.tensor([0.0]), torch.tensor([1.0])
