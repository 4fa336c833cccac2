"""Fast adversarial training: one step from a random start (Wong, Rice and Kolter, ICLR 2020, arXiv 2001.03994; in the L2
ball Goodwin, Brown and Helus 2020, arXiv 2007.03832)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.methods.base import Settings
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import Norm, ThreatModel, uniform_in_ball


class FastAt(Settings):
    """alpha: length of the one step in units of eps, from a start uniform in the ball, drawn anew for every batch.

    The start, the step and the sizes in the L2 ball are our reading: the paper's are not known.
    """

    name: Literal["fast-at"] = "fast-at"
    alpha: float = Field(default=1.25, gt=0, le=2)

    summary: ClassVar[str] = "cross entropy on the images that one step from a random start finds"
    paper: ClassVar[str] = "Wong et al. 2020, arXiv 2001.03994; Goodwin et al. 2020, arXiv 2007.03832"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = False
    distributional: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: None) -> Tensor:
        """Spends one forward and one backward pass to the input."""
        return ascend(
            lambda x_adv, _: input_gradient(nets.search, x_adv, lambda logits: ce(logits, y))[0],
            x,
            (x + uniform_in_ball(x, threat.norm, threat.eps, draws)).clamp(0, 1),
            norm=threat.norm,
            radius=threat.eps,
            steps=1,
            step=self.alpha * threat.eps,
        )

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = ce(logits_adv, y).mean()
        return total, {"ce_adv": total}

    def passes(self, bins: float, bws: float) -> float:
        return 1 + bins + 1 + bws
