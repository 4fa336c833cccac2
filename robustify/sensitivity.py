"""Upsilon, the sensitivity of the expected loss to a distributional attack, and how a training run keeps it current.

V(delta) = V(0) + delta * Upsilon + o(delta) with Upsilon = (E ||grad_x J||_*^q)^(1/q), 1/p + 1/q = 1
(arXiv 2306.09844, theorem 2). First-order: an estimate of what an attack of radius delta can do, never a certificate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robustify.ledger import Memory
from robustify.threat import ThreatModel

UpsilonRule = Literal["epoch", "every", "ema", "window", "importance"]


def conjugate(p: float) -> float:
    """Return q with 1/p + 1/q = 1, for p in (1, inf]."""
    return 1.0 if math.isinf(p) else p / (p - 1)


@dataclass(frozen=True)
class Sensitivity:
    """An estimate of Upsilon from n gradient norms.

    value, se: Upsilon and its standard error (delta method; with the finite-population factor when the n images were drawn
    from `population`). top_share: the part of the moment that the largest 1 % of the images make up: a heavy tail means
    that a few images take most of the budget.
    """

    value: float
    se: float
    n: int
    q: float
    top_share: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def upsilon(gradient_norms: Tensor, q: float, population: int | None = None) -> Sensitivity:
    """Estimate Upsilon from per-example dual gradient norms, [N]. population: size of the set they were sampled from."""
    n = len(gradient_norms)
    powers = gradient_norms.double() ** q
    moment = float(powers.mean())
    spread = float(powers.std()) / math.sqrt(n) if n > 1 else math.inf
    if population is not None:
        spread *= math.sqrt(max(0.0, 1 - n / population)) if n < population else 0.0
    value = moment ** (1 / q)
    se = spread * value / (q * moment) if moment > 0 else 0.0
    top = powers.sort(descending=True).values[: max(1, n // 100)]
    return Sensitivity(value, se, n, q, float(top.sum() / powers.sum()) if moment > 0 else 0.0)


def budget_scale(gradient_norms: Tensor, weights: Tensor, power: float, p: float, cap: float | None) -> float:
    """Return the c whose radii min(c * ||g_i||_*^power, cap), in units of delta, have a weighted mean of p-th powers of 1.

    gradient_norms, weights: [N], the weights summing to 1. With power = q-1 and no cap, c = Upsilon^-(q-1). inf when all
    images with a slope are capped and the budget is still not spent; 1 for p = inf.
    """
    if math.isinf(p):
        return 1.0
    some = gradient_norms > 0
    if not bool(some.any()):
        return 0.0
    share, order = (gradient_norms[some].double() ** power).sort()
    weight = weights[some].double()[order]
    spent = (weight * share**p).cumsum(0)
    if cap is None:
        return float(spent[-1] ** (-1 / p))
    if float(weight.sum()) * cap**p <= 1:
        return math.inf
    capped = (weight.sum() - weight.cumsum(0)).clamp_min(0) * cap**p  # cost of the images above each, at the cap
    scale = ((1 - capped).clamp_min(0) / spent) ** (1 / p)
    fits = (scale * share <= cap) & (capped < 1)  # the images up to here not capped, all above capped
    return float(scale[int(fits.nonzero().max())])


def budgets(slope: Tensor, scale: float, power: float, delta: float, p: float, cap: float | None = None) -> Tensor:
    """Split the Wasserstein budget over images: delta_i = delta * min(scale * ||g_i||_*^power, cap), [N].

    With power = q-1 and scale = Upsilon^-(q-1) of the same images, E[delta_i^p] = delta^p exactly, as (q-1)p = q. Images
    without slope get nothing; p = inf gives delta to all.
    """
    if math.isinf(p):
        return torch.full_like(slope, delta)
    share = scale * torch.where(slope > 0, slope, 1.0) ** power
    return delta * torch.where(slope > 0, share if cap is None else share.clamp_max(cap), 0.0)


class UpsilonTracker(Memory):
    """The running Upsilon of a training run: the gradient norms it remembers, and their weights.

    rule:
      epoch       measured anew at the start of every epoch, on the whole set or a sub-sample
      every       measured anew every `every` steps
      importance  the same, from a few gradients drawn in proportion to ||dJ/dlogits||^q (robustify.importance)
      ema         M <- (1-rho) M + rho * mean ||g||^q over each batch: the moment is averaged, never Upsilon itself
      window      the norms of the last `images` images, which the attack's first pass has computed anyway: no extra cost
    All rules start from one measurement.
    """

    def __init__(self, rule: UpsilonRule, threat: ThreatModel, every: int, rho: float, images: int) -> None:
        super().__init__(threat)
        self.rule, self.q, self.every, self.rho, self.images = rule, conjugate(self.p), every, rho, images
        self.moment = 0.0  # of the rule ema
        self.norms = self.weights = torch.zeros(0, dtype=torch.float64)
        self.measured: Sensitivity | None = None

    @property
    def value(self) -> float:
        moment = self.moment if self.rule == "ema" else float((self.weights * self.norms**self.q).sum())
        return moment ** (1 / self.q)

    def scale(self, power: float, cap: float | None) -> float:
        """Return the factor of `budgets` that spends delta^p over the remembered norms; the rule ema knows no norms."""
        if self.rule == "ema":
            return self.value**-power if self.value > 0 else 0.0
        return budget_scale(self.norms, self.weights, power, self.p, cap)

    def due(self, step: int, epoch_starts: bool) -> bool:
        if self.measured is None:
            return True
        return epoch_starts if self.rule == "epoch" else self.rule in ("every", "importance") and step % self.every == 0

    def measure(self, gradient_norms: Tensor, population: int) -> None:
        """Take a fresh measurement: per-example norms, [M], of all processes."""
        self._take(upsilon(gradient_norms, self.q, population), gradient_norms[-self.images :])

    def measure_weighted(self, gradient_norms: Tensor, weights: Tensor, measured: Sensitivity) -> None:
        """Take a measurement by importance sampling: norms and weights, [M], and what they amount to."""
        self._take(measured, gradient_norms)
        self.weights = weights.double()

    def _take(self, measured: Sensitivity, norms: Tensor) -> None:
        self.measured, self.moment = measured, measured.value**self.q
        self.norms = norms.double().cpu()
        self.weights = torch.full_like(self.norms, 1 / max(1, len(norms)))

    def learn(self, rows: Tensor) -> None:
        slope = rows[:, 1]
        if self.rule == "window":
            self.norms = torch.cat([self.norms, slope])[-self.images :]
            self.weights = torch.full_like(self.norms, 1 / max(1, len(self.norms)))
        elif self.rule == "ema" and len(slope):
            self.moment = (1 - self.rho) * self.moment + self.rho * float((slope**self.q).mean())

    def values(self) -> dict[str, float]:
        now = upsilon(self.norms, self.q) if self.rule == "window" and len(self.norms) else self.measured
        return {
            "upsilon": self.value,
            "upsilon_se": now.se if now else math.nan,
            "upsilon_top_share": now.top_share if now else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "moment": self.moment,
            "norms": self.norms,
            "weights": self.weights,
            "measured": self.measured and self.measured.to_json(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.measured = Sensitivity(**state["measured"]) if state["measured"] else None
