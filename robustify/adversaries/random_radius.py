"""The random radius eps_i = t * u_i^(1/p), u uniform on (0,1), that duality makes exact for the 0-1 loss (ours).

    A_delta = max over t of  { E_u[ RA(t u^(1/p)) ] - (delta/t)^p }        (robustify.duality)

Worst-case accuracy in the W_p ball is pointwise robust accuracy at a random radius, less the budget's price. At the best t
E_u[RA(t u^(1/p))] - RA(t) = (delta/t)^p; both terms on the left are read off the images that withstood their own radius
(as far as the attack's gradient passes saw, all iterates but the last), so t needs no Upsilon and no pass of its own.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustify.adversaries.inner import Inner
from robustify.gradients import input_gradient
from robustify.ledger import Memory
from robustify.losses import LOSSES, margin
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import ThreatModel, norms, per_image


class Survivals(Memory):
    """Which of the last images withstood their radius, by u; and t, in units of delta, that follows them."""

    def __init__(self, threat: ThreatModel, images: int, rate: float, reach: float) -> None:
        super().__init__(threat)
        self.images, self.rate, self.reach = images, rate, reach
        self.rows = torch.zeros(0, 2, dtype=torch.float64)
        self.t = 1.0 if math.isinf(self.p) else 2.0

    def learn(self, rows: Tensor) -> None:
        self.rows = torch.cat([self.rows, rows[:, 1:]])[-self.images :]
        if not math.isinf(self.p) and len(self.rows) >= self.images // 4:
            surplus = self.t**-self.p - gap(self.rows[:, 0], self.rows[:, 1])
            self.t = min(self.reach, max(1.0, self.t * math.exp(self.rate * max(-1.0, min(1.0, surplus)))))

    def values(self) -> dict[str, float]:
        return {"t": self.t * self.delta}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rows": self.rows, "t": self.t}


def gap(u: Tensor, survived: Tensor) -> float:
    """Return the mean survival less that at u = 1, from a straight line through the upper half of u; both [N]."""
    upper = u > 0.5
    if int(upper.sum()) < 2:
        return 0.0
    v, s = u[upper] - u[upper].mean(), survived[upper]
    slope = float((v * s).sum() / (v**2).sum().clamp_min(1e-12))
    return float(survived.mean()) - float(s.mean() + slope * (1 - u[upper].mean()))


class RandomRadius(Settings):
    """images: whose survival sets t; rate: how fast t follows. reach: t stays below so many delta (a network that fails
    at every radius would send it to infinity, and itself after it). stop_at_flip: an image goes no further than where the model
    errs, as the adversary buys flips and pays for distance; without it, to the end of its radius."""

    name: Literal["random-radius"] = "random-radius"
    images: int = Field(default=4096, ge=256)
    rate: float = Field(default=0.1, gt=0, le=1)
    reach: float = Field(default=4.0, gt=1)
    stop_at_flip: bool = True

    summary: ClassVar[str] = "each image is attacked at a random radius, distributed as duality says"

    def memory(self, threat: ThreatModel, population: int) -> Survivals:
        return Survivals(threat, self.images, self.rate, self.reach)

    def attack(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, inner: Inner, draws: Draws, memory: Survivals
    ) -> Tensor:
        """Spends `steps` gradients, and one forward pass where the inner loss is KL.

        Images that are misclassified as they are stay, as the distributional attacker leaves them.
        """
        first = None
        if inner.loss == "kl":
            with torch.no_grad():
                clean = nets.exact(x)
        else:
            first, clean, _ = input_gradient(nets.exact, x, lambda logits: LOSSES[inner.loss](logits, y))
        survived = margin(clean, y) <= 0
        u = draws.uniform_per_image(x)
        radius = memory.t * threat.eps * u ** (1 / memory.p) * survived

        def see(g: Tensor, logits: Tensor) -> Tensor:
            survived.logical_and_(margin(logits, y) <= 0)
            return g * per_image(survived, g) if self.stop_at_flip else g

        x_adv = inner.climb(nets, x, y, clean, threat.norm, radius, draws, first=first, see=see)
        memory.note(norms(x_adv.double() - x.double(), threat.norm), u, survived)
        return x_adv

    def passes(self, inner: Inner, bins: float) -> float:
        return inner.steps * (1 + bins) + (inner.loss == "kl")
