"""What every distributional adversary of the training is: a frozen description that moves batches of images."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from robustify.adversaries.inner import Inner
from robustify.ledger import Memory
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import ThreatModel


class Adversary(Protocol):
    """Moves a batch so that over the training the mean cost E||x'-x||^p stays at delta^p."""

    name: str
    summary: ClassVar[str]

    def memory(self, threat: ThreatModel, population: int) -> Memory:
        """The state kept from step to step; population: size of the training set."""
        ...

    def attack(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, inner: Inner, draws: Draws, memory: Any
    ) -> Tensor:
        """Return the images to train on, [N, ...] in [0,1], and enter in memory.note what the next steps must know."""
        ...

    def passes(self, inner: Inner, bins: float) -> float:
        """Cost of the attack in forward passes; bins: that of a backward pass to the input."""
        ...
