"""What every training method is: a frozen description with two pure steps."""

from __future__ import annotations

from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from robustify.modes import Nets
from robustify.rng import Draws
from robustify.sensitivity import UpsilonTracker
from robustify.threat import Norm, ThreatModel


class Settings(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(Protocol):
    """The loop owns forwards, precision, accumulation and processes; a method says what to attack with and what to minimise.

    adversarial: it trains against an adversary; the best epoch is then the most robust one, else the most accurate.
    needs_clean: the loss wants the logits of the unperturbed images too (a second training forward).
    distributional: it trains against a Wasserstein threat.
    """

    name: str
    summary: ClassVar[str]
    paper: ClassVar[str]
    adversarial: ClassVar[bool]
    needs_clean: ClassVar[bool]
    distributional: ClassVar[bool]
    norms: ClassVar[tuple[Norm, ...]]

    def tracker(self, threat: ThreatModel, population: int) -> UpsilonTracker | None:
        """The state that the method keeps from step to step, or None."""
        ...

    def perturb(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: UpsilonTracker | None
    ) -> Tensor:
        """Return the images to train on, [N, ...] in [0,1]. The nets are borrowed: eval mode, frozen weights."""
        ...

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the scalar to minimise, its named parts for the log)."""
        ...

    def passes(self, bins: float, bws: float) -> float:
        """Cost of one step in forward passes, given the cost of a backward pass to the input and to the weights."""
        ...
