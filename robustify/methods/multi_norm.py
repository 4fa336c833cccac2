"""Robustness to several norms at once by a few epochs of fine-tuning, in the manner of E-AT (Croce and Hein, ICML 2022,
arXiv 2105.12508): every batch is attacked in one norm, drawn in proportion to the robust errors of late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel, sparse_steepest, steepest, uniform_in_ball

L1_SHARE = 0.05  # of the coordinates move in a step: one alone, the steepest direction, would need hundreds of steps
_MEMORY = 0.1  # weight of a new batch in a running error


class RobustErrors:
    """The running robust error of each threat, over all processes. They begin equal, so the first batch is a fair draw."""

    def __init__(self, threats: tuple[ThreatModel, ...]) -> None:
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.names = [threat.spec for threat in threats]
        self.errors = torch.ones(len(threats), dtype=torch.float64)
        self.noted: tuple[int, Tensor] | None = None

    def observe(self, number: int, wrong: Tensor) -> None:
        """Note the verdicts, bool [N], of a batch attacked under the threat with that number."""
        self.noted = number, wrong

    def update(self) -> None:
        """Let the noted verdicts of all processes into the running error."""
        assert self.noted is not None
        number, wrong = self.noted
        self.errors[number] += _MEMORY * (self.gather(wrong).double().mean().cpu() - self.errors[number])

    def summary(self) -> dict[str, float]:
        return {f"error {name}": error for name, error in zip(self.names, self.errors.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors = state["errors"]


class MultiNorm(Settings):
    """threats: the union of balls to withstand, one a norm; the run's threat is one of them. They are what is measured.

    train_on: `extremes`, the first and the last norm of Linf, L2, L1 among them, whose balls nearly hold the others' (the
    paper's choice), or `all`. steps, step_ratio: of the attack, whose step is step_ratio * eps / steps. The running errors
    are read off the attack's last gradient [ours]: they cost nothing.
    """

    name: Literal["multi-norm"] = "multi-norm"
    threats: tuple[ThreatModel, ...] = (ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.5), ThreatModel("L1", 12))
    train_on: Literal["extremes", "all"] = "extremes"
    steps: int = Field(default=10, ge=1)
    step_ratio: float = Field(default=2.5, gt=0)

    summary: ClassVar[str] = "PGD in one norm a batch, the weaker one more often: for Linf, L2 and L1 at once"
    paper: ClassVar[str] = "Croce and Hein 2022, arXiv 2105.12508"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = False
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2", "L1")

    @field_validator("threats")
    @classmethod
    def _one_a_norm(cls, threats: tuple[ThreatModel, ...]) -> tuple[ThreatModel, ...]:
        norms = [threat.norm for threat in threats]
        if len(threats) < 2 or len(set(norms)) < len(norms) or any(threat.distributional for threat in threats):
            raise ValueError("takes two or three pointwise threats of different norms, as in [Linf:8/255, L2:0.5, L1:12]")
        return tuple(sorted(threats, key=lambda threat: cls.norms.index(threat.norm)))

    @property
    def trained(self) -> tuple[ThreatModel, ...]:
        """The threats that batches are attacked under."""
        return (self.threats[0], self.threats[-1]) if self.train_on == "extremes" else self.threats

    def tracker(self, threat: ThreatModel, population: int) -> RobustErrors:
        return RobustErrors(self.trained)

    def perturb(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: RobustErrors
    ) -> Tensor:
        """Spends `steps` forward and backward passes to the input, all in one norm. threat is not looked at: `threats` is."""
        number = draws.pick(tracker.errors)
        norm, eps = self.trained[number].norm, self.trained[number].eps
        wrong = torch.zeros_like(y, dtype=torch.bool)

        def gradient(x_adv: Tensor, _: int) -> Tensor:
            nonlocal wrong
            g, logits = input_gradient(nets.search, x_adv, lambda logits: ce(logits, y))[:2]
            wrong = logits.argmax(1) != y
            return g

        x_adv = ascend(
            gradient,
            x,
            (x + uniform_in_ball(x, norm, eps, draws)).clamp(0, 1),
            norm=norm,
            radius=eps,
            steps=self.steps,
            step=self.step_ratio * eps / self.steps,
            direction=(lambda g: sparse_steepest(g, L1_SHARE)) if norm == "L1" else (lambda g: steepest(g, norm)),
        )
        tracker.observe(number, wrong)
        return x_adv

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = ce(logits_adv, y).mean()
        return total, {"ce_adv": total}

    def passes(self, bins: float, bws: float) -> float:
        return self.steps * (1 + bins) + 1 + bws
