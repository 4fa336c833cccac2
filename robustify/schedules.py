"""Learning-rate schedules: timm's, torch's, the triangle of fast adversarial training, and AccelAT's rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from robustify.settings import Settings

Kind = Literal["cosine", "constant", "step", "cyclic", "one-cycle", "plateau", "accelat"]
OWN_START: tuple[Kind, ...] = ("cyclic", "one-cycle", "plateau", "accelat")  # take no warm-up
BY_SCORE: tuple[Kind, ...] = ("plateau", "accelat")  # follow the held-out accuracy


class Accelat(Settings):
    """AccelAT's sizes (arXiv 2210.06888): length of the running mean of the held-out robust accuracy, epochs between two cuts,
    what a cut multiplies the rate by, the rise of the mean that spares it, and the lowest rate."""

    window: int = Field(default=5, ge=1)
    cooldown: int = Field(default=5, ge=0)
    factor: float = Field(default=0.8, gt=0, lt=1)
    threshold: float = 0.005
    lowest: float = Field(default=1e-6, ge=0)


class Schedule(Protocol):
    """set: puts the rate of the step with that number, from 0, into the optimiser. tell: takes an epoch's held-out score."""

    def set(self, step: int) -> None: ...
    def tell(self, score: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_schedule(
    optimizer: Optimizer, kind: Kind, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0, rule: Accelat | None = None
) -> Schedule:
    """Return the schedule of that kind from the optimiser's present rates."""
    if kind == "accelat":
        return _Accelat(optimizer, rule or Accelat())
    if kind == "plateau":
        return _Plateau(optimizer)
    if kind in ("cyclic", "one-cycle"):
        share = triangle if kind == "cyclic" else one_cycle
        return _Shares(optimizer, lambda step: share(step, epochs * steps_per_epoch))
    return _Timm(optimizer, kind, epochs, steps_per_epoch, warmup_epochs)


def triangle(step: int, total: int) -> float:
    """Share of the peak rate: from 0 up to 1 at half of the run and back to 0 (Wong et al. 2020)."""
    at = (step + 1) / total
    return max(2 * min(at, 1 - at), 0.0)


def one_cycle(step: int, total: int) -> float:
    """Share of the peak rate: torch's OneCycleLR at its defaults, momentum constant (Smith and Topin, arXiv 1708.07120)."""
    peak, last = 0.3 * total - 1, total - 1
    lowest, end = 1 / 25, 1 / 25 / 1e4
    begin, finish, part = (lowest, 1.0, step / peak) if step <= peak else (1.0, end, (step - peak) / (last - peak))
    return finish + (begin - finish) / 2 * (1 + math.cos(math.pi * part))


def accelat(start: float, scores: Sequence[float], rule: Accelat) -> float:
    """The rate after epochs with these held-out robust accuracies (arXiv 2210.06888, algorithm 1).

    After epoch t, with m_t the mean of the last `window` scores: if there are more than `window` means so far, more than
    `cooldown` epochs since the last cut, and m_t - m_(t-1) < threshold, then rate <- max(factor * rate, lowest).
    """
    rate, last_cut = start, 0
    means = [sum(part) / len(part) for part in (scores[max(0, t - rule.window) : t] for t in range(1, len(scores) + 1))]
    for t in range(rule.window + 1, len(scores) + 1):
        if t - last_cut > rule.cooldown and means[t - 1] - means[t - 2] < rule.threshold:
            rate, last_cut = max(rule.factor * rate, rule.lowest), t
    return rate


class _Shares:
    """A function of the step alone, times the optimiser's own rates."""

    def __init__(self, optimizer: Optimizer, share: Callable[[int], float]) -> None:
        self.optimizer, self.share = optimizer, share  # its groups are others once its state was read back
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.share(step)

    def tell(self, score: float) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Timm(_Shares):
    """timm's schedules, functions of the step alone too."""

    def __init__(self, optimizer: Optimizer, kind: str, epochs: int, steps_per_epoch: int, warmup_epochs: int) -> None:
        from timm.scheduler import create_scheduler_v2

        # a constant rate is a step schedule that never steps
        decay_epochs = {"step": max(1, epochs // 3), "constant": 10**9}.get(kind, 1)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="step" if kind == "constant" else kind,
            num_epochs=epochs,
            decay_epochs=decay_epochs,
            decay_rate=0.1,
            warmup_epochs=warmup_epochs,
            warmup_lr=0.0,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )  # pyright: ignore[reportArgumentType]
        assert scheduler is not None
        self.scheduler = scheduler

    def set(self, step: int) -> None:
        self.scheduler.step_update(step)


class _Accelat(_Shares):
    """The rate follows from the scores so far, which are all that must be remembered."""

    def __init__(self, optimizer: Optimizer, rule: Accelat) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.rule = rule
        self.scores: list[float] = []

    def set(self, step: int) -> None:
        for group, start in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = accelat(start, self.scores, self.rule)

    def tell(self, score: float) -> None:
        self.scores.append(score)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = list(state["scores"])


class _Plateau:
    """torch's ReduceLROnPlateau: a tenth of the rate after five epochs without a new best."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.rule = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=5)

    def set(self, step: int) -> None:
        """The optimiser holds the rate, and its own state brings it back."""

    def tell(self, score: float) -> None:
        self.rule.step(score)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)
