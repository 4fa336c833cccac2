"""Upsilon from few gradients: images drawn in proportion to the slope of the loss at the logits (ours).

||grad_x J||_* = ||J_f^T dJ/dlogits||_* and the second factor costs a forward pass only. It carries most of the heavy tail
(for DLR, the vanishing denominator), so gradients are computed for images drawn with probabilities in proportion to its
q-th power, and weighted by their inverse: the moment stays unbiased (Hansen and Hurwitz, Ann. Math. Stat. 1943).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustify.losses import LOSSES, Loss
from robustify.modes import borrowed, full_precision
from robustify.sensitivity import Sensitivity

UNIFORM = 0.1  # share of the draws that is uniform: bounds every weight where the network's Jacobian varies
MIN_DRAWS = 64


@full_precision()
def logit_slopes(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: str | Loss) -> Tensor:
    """Return ||dJ/dlogits||_2 of every image, [N] on the CPU, at one forward pass each."""
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    found = []
    with borrowed(model):
        for x, y in batches:
            with torch.no_grad():
                logits = model(x)
            logits = logits.float().requires_grad_(True)
            (slope,) = torch.autograd.grad(objective(logits, y).sum(), logits)
            found.append(slope.double().norm(dim=1).cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Drawn:
    """Images drawn with replacement. indices: the distinct ones, [M]; counts: how often each; chance: its probability at one
    draw; pool: how many images they were drawn from; q: whose moment is meant."""

    indices: Tensor
    counts: Tensor
    chance: Tensor
    pool: int
    q: float

    @property
    def weights(self) -> Tensor:
        """[M], such that sum(weights * f) estimates the pool's mean of f without bias."""
        return self.counts / (self.counts.sum() * self.chance * self.pool)

    def estimate(self, gradient_norms: Tensor, population: int) -> Sensitivity:
        """Return Upsilon from the drawn images' dual gradient norms, [M]. population: of which the pool is a sub-sample."""
        powers = gradient_norms.double() ** self.q
        moment = float((self.weights * powers).sum())
        m = float(self.counts.sum())
        each = powers / (self.chance * self.pool)
        variance = float((self.counts * (each - moment) ** 2).sum()) / max(1.0, m - 1) / max(1.0, m)
        if self.pool < population:  # the pool's own error
            second = float((self.weights * powers**2).sum())
            variance += max(0.0, second - moment**2) / self.pool * (1 - self.pool / population)
        value = moment ** (1 / self.q)
        se = math.sqrt(variance) * value / (self.q * moment) if moment > 0 else 0.0
        return Sensitivity(value, se, int(m), self.q, self._top_share(powers, moment))

    def _top_share(self, powers: Tensor, moment: float) -> float:
        if moment <= 0:
            return 0.0
        ordered, order = powers.sort(descending=True)
        mass = self.weights[order].cumsum(0) - self.weights[order]
        part = (0.01 - mass).clamp_min(0).minimum(self.weights[order])
        return float((part * ordered).sum()) / moment


def draw(slopes: Tensor, q: float, m: int, seed: int) -> Drawn:
    """Draw m images with replacement, in proportion to slopes^q, [N], mixed with a uniform share.

    The same on every process that holds the same slopes. Images whose loss has no slope at the logits have none at the
    pixels either and are never drawn.
    """
    some = slopes > 0
    if not bool(some.any()):
        nothing = torch.zeros(0, dtype=torch.long)
        return Drawn(nothing, nothing.double(), nothing.double(), len(slopes), q)
    powers = slopes.double() ** q
    chance = (1 - UNIFORM) * powers / powers.sum() + UNIFORM * some / some.sum()
    ends = chance.cumsum(0)
    u = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * ends[-1]
    indices, counts = torch.searchsorted(ends, u, right=True).clamp_max(len(slopes) - 1).unique(return_counts=True)
    return Drawn(indices, counts.double(), chance[indices], len(slopes), q)
