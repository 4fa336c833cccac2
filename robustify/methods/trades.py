"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573): the pointwise control of the distributional method."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustify.attacks.ascent import ascend_kl
from robustify.methods.consistency import trades_loss
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel


class Trades(Settings):
    """beta: weight of the consistency term. steps: K of the inner ascent. step_ratio: its step is step_ratio * eps / K."""

    name: Literal["trades"] = "trades"
    beta: float = Field(default=6.0, ge=0)
    steps: int = Field(default=10, ge=1)
    step_ratio: float = Field(default=2.5, gt=0)

    summary: ClassVar[str] = "clean cross entropy plus beta times the worst KL in the pointwise ball"
    paper: ClassVar[str] = "Zhang et al. 2019, arXiv 1901.08573"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = True
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any) -> Tensor:
        """Spends one forward pass and `steps` forward and backward passes to the input."""
        with torch.no_grad():
            clean = nets.exact(x)
        step = self.step_ratio * threat.eps / self.steps
        return ascend_kl(nets, x, clean, norm=threat.norm, radius=threat.eps, steps=self.steps, step=step, draws=draws)

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return trades_loss(logits, logits_adv, y, self.beta)

    def passes(self, bins: float, bws: float) -> float:
        return 1 + self.steps * (1 + bins) + 2 * (1 + bws)
