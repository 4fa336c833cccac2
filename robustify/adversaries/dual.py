"""The Lagrangian dual: every image moves as far as pays, at a price per distance that makes the mean cost delta^p.

sup { E L(x') : E||x'-x||^p <= delta^p } = min over lambda of { lambda delta^p + E sup over x' of [L(x') - lambda ||x'-x||^p] }
(Sinha, Namkoong and Duchi, ICLR 2018, section 2, with lambda fixed). Here lambda follows the mean cost of the batches,
and the inner supremum is searched along a walk outward (robustify.adversaries.walk): ours.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustify.adversaries.inner import Inner
from robustify.adversaries.walk import passes, walk
from robustify.ledger import Memory
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import ThreatModel


class Price(Memory):
    """lambda * delta^p, driven up while the moves cost more than delta^p on average and down while they cost less."""

    def __init__(self, threat: ThreatModel, rate: float) -> None:
        super().__init__(threat)
        self.rate = rate
        self.price = 0.0

    def learn(self, rows: Tensor) -> None:
        cost = (rows[:, 0] / self.delta) ** self.p
        if self.price == 0:  # the first batch moved for free: what its moves were worth sets the scale
            self.price = float(rows[:, 1].sum() / cost.sum().clamp_min(1e-12))
        elif len(rows):
            self.price *= math.exp(self.rate * (float(cost.mean()) - 1))  # so that the mean of all costs comes to 1

    def values(self) -> dict[str, float]:
        return {"lambda": self.price / self.delta**self.p}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "price": self.price}


class Dual(Settings):
    """reach: the furthest an image may move, in units of delta. rate: how fast lambda follows the mean cost."""

    name: Literal["dual"] = "dual"
    reach: float = Field(default=3.0, gt=1)
    rate: float = Field(default=0.1, gt=0, le=1)

    summary: ClassVar[str] = "each image moves as far as pays at a price that keeps the mean cost at delta^p"

    def memory(self, threat: ThreatModel, population: int) -> Price:
        return Price(threat, self.rate)

    def attack(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, inner: Inner, draws: Draws, memory: Price
    ) -> Tensor:
        """Spends one walk (robustify.adversaries.walk)."""

        def score(logits: Tensor, losses: Tensor, away: Tensor) -> Tensor:
            return losses - memory.price * (away / threat.eps) ** memory.p

        reach = self.reach * threat.eps
        x_adv, moved, gain = walk(nets, x, y, norm=threat.norm, reach=reach, inner=inner, draws=draws, score=score)
        memory.note(moved, gain)
        return x_adv

    def passes(self, inner: Inner, bins: float) -> float:
        return passes(inner, bins)
