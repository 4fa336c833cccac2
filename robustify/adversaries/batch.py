"""W-PGD on batches: the evaluation's attack (arXiv 2306.09844), with running moments in the place of the data set's.

Every iterate moves along its own steepest direction by a length in proportion to ||g||_*^(q-1), over the whole training
set's mean; then all moves shrink alike, by what the mean cost exceeds. A batch is too small to know either mean, so
both are remembered, for each of the K steps, as moving averages of moments.
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
from robustify.losses import LOSSES
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.sensitivity import conjugate
from robustify.settings import Settings
from robustify.threat import ThreatModel, dual_norms, norms, per_image, project, steepest


class Moments(Memory):
    """Moving averages over the batches of E||g||_*^q and of E||x'-x||^p before the moves shrink, for each step."""

    def __init__(self, threat: ThreatModel, rho: float) -> None:
        super().__init__(threat)
        self.rho = rho
        self.moments = torch.zeros(0, dtype=torch.float64)

    def at(self, k: int, batch: Tensor) -> float:
        """The k-th moment as remembered; of this batch where nothing is."""
        return float(self.moments[k]) if k < len(self.moments) else float(batch.mean())

    def learn(self, rows: Tensor) -> None:
        now = rows[:, 1:].mean(0)
        known = len(self.moments) == len(now)
        self.moments = (1 - self.rho) * self.moments + self.rho * now if known else now

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moments": self.moments}


class Batch(Settings):
    """loss: what the attack climbs. rho: rate of the moving averages."""

    name: Literal["batch"] = "batch"
    loss: Literal["redlr", "ce", "dlr"] = "redlr"
    rho: float = Field(default=0.05, gt=0, le=1)

    summary: ClassVar[str] = "W-PGD on each batch, with running means in the place of the data set's"

    def memory(self, threat: ThreatModel, population: int) -> Moments:
        return Moments(threat, self.rho)

    def attack(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, inner: Inner, draws: Draws, memory: Moments
    ) -> Tensor:
        """Spends `steps` gradients; no random start, as these losses have a slope at x."""
        p, q = memory.p, conjugate(memory.p)
        finite = not math.isinf(p)
        x_adv, columns = x, []
        for k in range(inner.steps):
            g, _, _ = input_gradient(nets.search, x_adv, lambda logits: LOSSES[self.loss](logits, y))
            slope = dual_norms(g, threat.norm).double()
            length = torch.where(slope > 0, slope ** (q - 1), 0.0)
            if finite:  # mean ||direction||^p = mean ||g||^q
                length = length / max(memory.at(2 * k, slope**q) ** (1 / p), torch.finfo(torch.float64).tiny)
            move = inner.step_ratio * threat.eps / inner.steps * per_image(length.to(x.dtype), x)
            away = x_adv + move * steepest(g, threat.norm) - x
            size = norms(away, threat.norm).double()
            columns += [slope**q, size**p if finite else size]
            if finite:
                spent = memory.at(2 * k + 1, size**p) ** (1 / p)
                radius = size * min(1.0, threat.eps / max(spent, torch.finfo(torch.float64).tiny))
            else:
                radius = torch.full_like(size, threat.eps)
            x_adv = (x + project(away, threat.norm, radius.to(x.dtype))).clamp(0, 1)
        memory.note(norms(x_adv.double() - x.double(), threat.norm), *columns)
        return x_adv

    def passes(self, inner: Inner, bins: float) -> float:
        return inner.steps * (1 + bins)
