"""Several attacks in turn, each on the images that the earlier ones left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustify.modes import borrowed
from robustify.rng import mix
from robustify.threat import ThreatModel

# attacks that pyautoattack runs: it seeds every batch alike, and so do we, for the same verdicts
AUTHORS: set[Callable[..., Tensor]] = set()


@dataclass(frozen=True)
class Stage:
    """One attack with its settings. run: `attack(model, x, y, *, threat, ...) -> x_adv`; through: other networks it spends
    passes of."""

    name: str
    run: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    through: tuple[nn.Module, ...] = ()

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, number: int) -> Tensor:
        """Attack batch `number` of a set, with random numbers that depend on the seed and the number only."""
        if "seed" not in (self.run.__kwdefaults__ or {}):
            return self.run(model, x, y, threat=threat, **self.settings)
        seed = seed if self.run in AUTHORS else mix(seed, number)
        return self.run(model, x, y, threat=threat, seed=seed, **self.settings)

    def __str__(self) -> str:
        return f"{self.name}:{','.join(f'{k}={v}' for k, v in self.settings.items())}" if self.settings else self.name


@dataclass(frozen=True)
class Cascade:
    """stages, in order; label: what this is and what it is not, in the reports' words."""

    label: str
    stages: tuple[Stage, ...]


def in_turn(
    build: Callable[[int], Cascade], model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, seed: int
) -> Tensor:
    """Return for each image the first perturbed one that fools the model, [N, ...]; x itself where none does.

    build: the cascade for a model of so many classes. Costs a forward pass on the clean images, the stages' passes on
    what is left, and one forward pass after each.
    """
    x_adv = x.clone()
    with borrowed(model), torch.no_grad():
        logits = model(x)
        left = torch.nonzero(logits.argmax(1) == y)[:, 0]
        for number, stage in enumerate(build(logits.shape[1]).stages):
            if not len(left):
                break
            found = stage.attack(model, x[left], y[left], threat, seed, number)
            right = model(found).argmax(1) == y[left]
            x_adv[left[~right]] = found[~right]
            left = left[right]
    return x_adv
