"""Free adversarial training (Shafahi et al., NeurIPS 2019, arXiv 1904.12843): every backward pass serves twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustify.losses import ce
from robustify.methods.base import Passes
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel, project, steepest


class Noise:
    """The perturbation that free-at carries from one batch to the next, [N, ...]: this process's rows of the batch's."""

    def __init__(self) -> None:
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.delta = torch.zeros(0)

    def rows(self, x: Tensor, draws: Draws) -> Tensor:
        """What x, [N, ...], is to be perturbed by. A state that was read back holds the rows of all processes."""
        if not len(self.delta):
            return torch.zeros_like(x)
        mine = self.delta if len(self.delta) == len(x) else self.delta[draws.start : draws.start + len(x)]
        return mine.to(x)

    def update(self) -> None:
        """Nothing is exchanged: every process carries its own rows."""

    def summary(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"delta": self.gather(self.delta).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta = state["delta"]


class FreeAt(Settings):
    """replays: optimiser steps in a row on every batch, the paper's m. An epoch has that many times more steps, so take
    fewer epochs: the paper divides their number by m."""

    name: Literal["free-at"] = "free-at"
    replays: int = Field(default=8, ge=1)

    summary: ClassVar[str] = "every batch several times; one backward pass moves weights and perturbation"
    paper: ClassVar[str] = "Shafahi et al. 2019, arXiv 1904.12843"
    adversarial: ClassVar[bool] = True
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    def tracker(self, threat: ThreatModel, population: int) -> Noise:
        return Noise()

    def step(
        self, passes: Passes, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Noise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Spends one forward pass and one backward pass to weights and input; the perturbation moves by eps after it."""
        delta = tracker.rows(x, draws).requires_grad_(True)
        total = ce(passes.forward((x + delta).clamp(0, 1)), y).mean()
        passes.backward(total)
        assert delta.grad is not None
        moved = delta.detach() + threat.eps * steepest(delta.grad, threat.norm)
        tracker.delta = project(moved, threat.norm, threat.eps)
        return total, {"ce_adv": total}

    def passes(self, bins: float, bws: float) -> float:
        return 1 + bws
