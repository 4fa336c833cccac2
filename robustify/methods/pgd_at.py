"""PGD adversarial training (Madry et al., ICLR 2018, arXiv 1706.06083)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel, uniform_in_ball


class PgdAt(Settings):
    """steps: K of the attack. step_ratio: its step is step_ratio * eps / K, from a start uniform in the ball."""

    name: Literal["pgd-at"] = "pgd-at"
    steps: int = Field(default=10, ge=1)
    step_ratio: float = Field(default=2.5, gt=0)

    summary: ClassVar[str] = "cross entropy on the images that K steps of PGD find"
    paper: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = False
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2", "L1")

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any) -> Tensor:
        """Spends `steps` forward and backward passes to the input."""
        start = (x + uniform_in_ball(x, threat.norm, threat.eps, draws)).clamp(0, 1)
        return ascend(
            lambda x_adv, _: input_gradient(nets.search, x_adv, lambda logits: ce(logits, y))[0],
            x,
            start,
            norm=threat.norm,
            radius=threat.eps,
            steps=self.steps,
            step=self.step_ratio * threat.eps / self.steps,
        )

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = ce(logits_adv, y).mean()
        return total, {"ce_adv": total}

    def passes(self, bins: float, bws: float) -> float:
        return self.steps * (1 + bins) + 1 + bws
