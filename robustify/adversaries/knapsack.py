"""The knapsack adversary: the true worst case for the 0-1 loss, as far as a short walk can find flips.

Every image walks outward until the model errs; the flips within t are bought, all other images stay, and t is such that
what is bought costs delta^p on average over the last images (arXiv 2510.10000 for the attack; its use in training is ours).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustify.adversaries.inner import Inner
from robustify.adversaries.walk import passes, walk
from robustify.ledger import Memory
from robustify.losses import margin
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import ThreatModel


class FlipDistances(Memory):
    """The last images' flip distances, in units of delta, and the dearest flip that they afford."""

    def __init__(self, threat: ThreatModel, images: int) -> None:
        super().__init__(threat)
        self.images = images
        self.distances = torch.zeros(0, dtype=torch.float64)
        self.t = 2.0

    def learn(self, rows: Tensor) -> None:
        self.distances = torch.cat([self.distances, rows[:, 1] / self.delta])[-self.images :]
        ordered = self.distances.sort().values
        afforded = (ordered**self.p).cumsum(0) <= len(ordered)
        self.t = float(ordered[afforded].max()) if bool(afforded.any()) else 0.0

    def values(self) -> dict[str, float]:
        return {"t": self.t * self.delta}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "distances": self.distances, "t": self.t}


class Knapsack(Settings):
    """reach: how far an image walks, in units of delta. images: whose flip distances set t."""

    name: Literal["knapsack"] = "knapsack"
    reach: float = Field(default=3.0, gt=1)
    images: int = Field(default=2048, ge=32)

    summary: ClassVar[str] = "walks outward and moves only the images whose flips are cheapest"

    def memory(self, threat: ThreatModel, population: int) -> FlipDistances:
        return FlipDistances(threat, self.images)

    def attack(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, inner: Inner, draws: Draws, memory: FlipDistances
    ) -> Tensor:
        """Spends one walk (robustify.adversaries.walk)."""
        first = torch.full((len(x),), torch.inf, device=x.device, dtype=torch.float64)

        def score(logits: Tensor, losses: Tensor, away: Tensor) -> Tensor:
            nonlocal first
            flips_now = (margin(logits, y) > 0) & first.isinf()
            first = torch.where(flips_now, away, first)
            return (flips_now & (away > 0) & (away <= memory.t * threat.eps)).double()

        reach = self.reach * threat.eps
        x_adv, moved, _ = walk(nets, x, y, norm=threat.norm, reach=reach, inner=inner, draws=draws, score=score)
        memory.note(moved, first)
        return x_adv

    def passes(self, inner: Inner, bins: float) -> float:
        return passes(inner, bins)
