"""How a network reads its images: whether it would be right more often with another normalisation in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustify.compare import mcnemar
from robustify.pixels import PixelModel
from robustify.sources.torchvision import MEAN, STD

_CHANCE = 0.0025  # of McNemar's exact test: 0.01 over four readings; 64 images that differ by ten, all one way, have 0.002
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
def others(
    model: nn.Module, x: Tensor, y: Tensor, right: Tensor, batch_size: int = 64
) -> tuple[Reading | None, Reading | None]:
    """Return the best of the other usual readings, and whether it is better than the model's own: itself, or None.

    model: in eval mode; x, y: images in [0,1] and labels; right: which of them it gets right. Better means: right more
    often than the model as it is, and than the best single answer for all images (a network that answers alike whatever it
    sees may be right more often in either reading), on the same images beyond chance. The usual readings: these images'
    own, ImageNet's, 0.5, none. Costs one forward pass each, of batch_size images at a time. Images that are shifted, by fog
    for instance, may do better in another reading too.
    """
    channels = (1, -1, 1, 1)
    plain = (x.new_zeros(1, 1, 1, 1), x.new_ones(1, 1, 1, 1))
    own = (model.mean, model.std) if isinstance(model, PixelModel) else plain
    found: list[tuple[Reading, Tensor]] = []
    for name, mean, std in _usual(x):
        if all(bool(((a.flatten() - b.flatten()).abs() < _SAME).all()) for a, b in ((mean, own[0]), (std, own[1]))):
            continue
        seen = (x - mean.view(channels)) / std.view(channels) * own[1] + own[0]  # so that the network gets this reading
        hits = torch.cat([model(part).argmax(1) for part in seen.split(batch_size)]) == y
        found.append((Reading(name, tuple(mean.tolist()), tuple(std.tolist()), float(hits.double().mean())), hits))
    if not found:
        return None, None
    best, hits = max(found, key=lambda pair: pair[0].accuracy)
    rivals = (right, y == y.mode().values)
    beats = all(hits.sum() > rival.sum() and mcnemar(rival.cpu().numpy(), hits.cpu().numpy()) < _CHANCE for rival in rivals)
    return best, best if beats else None


def _usual(x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    if x.shape[1] == 3:
        yield "ImageNet's", x.new_tensor(MEAN), x.new_tensor(STD)
    yield "0.5 for all channels", x.new_tensor([0.5]), x.new_tensor([0.5])
    yield "none", x.new_tensor([0.0]), x.new_tensor([1.0])
    deviation, mean = torch.std_mean(x, (0, 2, 3))  # last: where a usual one does as well, that is more likely meant
    yield "these images' own", mean, deviation.clamp_min(1e-3)
