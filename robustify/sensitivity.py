"""Upsilon, the sensitivity of the expected loss to a distributional attack, and how a training run keeps it current.

V(delta) = V(0) + delta * Upsilon + o(delta) with Upsilon = (E ||grad_x J||_*^q)^(1/q), 1/p + 1/q = 1
(arXiv 2306.09844, theorem 2). First-order: an estimate of what an attack of radius delta can do, never a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

UpsilonRule = Literal["epoch", "every", "ema", "window"]


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


def budgets(slope: Tensor, upsilon_now: float, delta: float, p: float, cap: float | None = None) -> Tensor:
    """Split the Wasserstein budget over images: delta_i = delta * (||g_i||_* / Upsilon)^(q-1), [N].

    With Upsilon of the same images E[delta_i^p] = delta^p exactly, as (q-1)p = q. Images without slope get nothing; p = inf
    gives delta to all. cap limits delta_i to cap * delta, which leaves part of the budget unspent.
    """
    q = conjugate(p)
    if q == 1:
        return torch.full_like(slope, delta)
    if upsilon_now <= 0:
        return torch.zeros_like(slope)
    split = delta * (slope / upsilon_now) ** (q - 1)
    return split if cap is None else split.clamp_max(cap * delta)


class UpsilonTracker:
    """The running Upsilon of a training run, and the ledger of the budgets spent with it.

    rule:
      epoch   measured anew at the start of every epoch, on the whole set or a sub-sample
      every   measured anew every `every` steps
      ema     M <- (1-rho) M + rho * mean ||g||^q over each batch: the moment is averaged, never Upsilon itself
      window  the norms of the last `images` images, which the attack's first pass has computed anyway: no extra cost
    All rules start from one measurement. `gather` concatenates a tensor over the processes, so that every process holds
    the same value; epoch and every need it at no step.
    """

    def __init__(self, rule: UpsilonRule, q: float, delta: float, every: int, rho: float, images: int) -> None:
        self.rule, self.q, self.delta, self.every, self.rho, self.images = rule, q, delta, every, rho, images
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.moment = 0.0
        self.window = torch.zeros(0, dtype=torch.float64)
        self.measured: Sensitivity | None = None
        self._clear_ledger()

    @property
    def value(self) -> float:
        moment = float((self.window**self.q).mean()) if self.rule == "window" and len(self.window) else self.moment
        return moment ** (1 / self.q)

    def due(self, step: int, epoch_starts: bool) -> bool:
        """Whether Upsilon must be measured on the training set before this step."""
        if self.measured is None:
            return True
        return epoch_starts if self.rule == "epoch" else self.rule == "every" and step % self.every == 0

    def measure(self, gradient_norms: Tensor, population: int) -> None:
        """Take a fresh measurement: per-example norms, [M], of all processes."""
        self.measured = upsilon(gradient_norms, self.q, population)
        self.moment = self.measured.value**self.q
        if self.rule == "window":
            self.window = gradient_norms.double()[-self.images :]

    def observe(self, slope: Tensor) -> None:
        """Take the norms, [N], that the attack computed on this batch."""
        if self.rule == "window":
            self.window = torch.cat([self.window, self.gather(slope).double().cpu()])[-self.images :]
        elif self.rule == "ema":
            self.moment = (1 - self.rho) * self.moment + self.rho * float(
                (self.gather(slope).double() ** self.q).mean()
            )

    def spend(self, delta_i: Tensor, p: float) -> None:
        """Enter this batch's budgets in the ledger."""
        if self.delta <= 0:
            return
        share = (delta_i.double() / self.delta).cpu()
        power = share.sum() if math.isinf(p) else (share**p).sum()
        self.ledger += torch.stack([power, (share == 0).double().sum(), torch.tensor(float(len(share)))])
        self.largest = max(self.largest, float(share.max()) * self.delta) if len(share) else self.largest

    def summary(self) -> dict[str, float]:
        """What to log of the epoch (over all processes), and clear the ledger.

        mean_cost: mean(delta_i^p)/delta^p, about 1 when Upsilon is right; zero_share: part of the images without budget.
        """
        rows = self.gather(torch.cat([self.ledger, torch.tensor([self.largest])])[None])
        power, zeros, count = rows[:, :3].sum(0).tolist()
        largest = float(rows[:, 3].max())
        self._clear_ledger()
        now = upsilon(self.window, self.q) if self.rule == "window" and len(self.window) else self.measured
        return {
            "upsilon": self.value,
            "upsilon_se": now.se if now else math.nan,
            "mean_cost": power / max(count, 1),
            "zero_share": zeros / max(count, 1),
            "largest_delta": largest,
        }

    def _clear_ledger(self) -> None:
        self.ledger = torch.zeros(3, dtype=torch.float64)
        self.largest = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "moment": self.moment,
            "window": self.window,
            "measured": self.measured and self.measured.to_json(),
            "ledger": self.ledger,
            "largest": self.largest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moment, self.window, self.ledger, self.largest = (
            state["moment"],
            state["window"],
            state["ledger"],
            state["largest"],
        )
        self.measured = Sensitivity(**state["measured"]) if state["measured"] else None
