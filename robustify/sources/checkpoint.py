"""Checkpoint: what every source returns, a network with what is known about it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robustify.errors import UserError
from robustify.pixels import PixelModel

CUSTOM = "custom"  # the arch of a network that only its user's code can build


@dataclass(frozen=True)
class Checkpoint:
    """A network in eval mode behind its normalisation, and where it comes from.

    model:       images in [0,1] in, logits out; `model.net` is what `timm.create_model(arch, num_classes=num_classes,
                 **arch_args)` builds once robustify is imported.
    input_size:  (channels, height, width) the network was made for.
    base_id:     a name that tells people, and `sources.load`, which model this is.
    license:     as its publisher states it; None when unknown, never guessed.
    published:   its row of RobustBench's leaderboard, accuracies as text in per cent; None when there is none.
    dataset:     the data set it was trained for: cifar10, cifar100, imagenet, digits; None when unknown.
    threat:      the threat it was trained against, as its publisher spells it; None when none or unknown.
    pretrained:  False when its weights, or those of its classifier, are random.
    replaced:    the number of classes of the classifier that a new, random one took the place of; None without one.
    """

    model: PixelModel
    arch: str
    arch_args: dict[str, Any]
    num_classes: int
    input_size: tuple[int, int, int]
    base_id: str
    license: str | None = None
    published: dict[str, Any] | None = None
    dataset: str | None = None
    threat: str | None = None
    pretrained: bool = True
    replaced: int | None = None


def agreed_license(known: str | None, given: str | None, base_id: str) -> str | None:
    """Return the license that the publisher states, or else the given one. Raises UserError when they differ."""
    if known and given and known.lower() != given.lower():
        raise UserError(f"the license of {base_id} is {known}, not {given}", "leave out the license: it is inherited")
    return known or given
