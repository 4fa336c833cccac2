"""Fast adversarial training: one step from a random start (Wong, Rice and Kolter, ICLR 2020, arXiv 2001.03994; in the L2
ball Goodwin, Brown and Helus 2020, arXiv 2007.03832), with two ways to keep it from catastrophic overfitting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.methods.differentiated import differentiable_gradient
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel, per_image, steepest, uniform_in_ball


class FastAt(Settings):
    """noise: where the one step starts, drawn anew for every batch.

      uniform         uniform in the ball
      uniform-radius  L2 only: uniform direction and uniform radius, the other reading of "uniform in the ball"
      n-fgsm          uniform in the ball of 2 eps, and the sum of noise and step is not projected back
                      (de Jorge et al. 2022, arXiv 2202.01181)

    alpha: length of the step in units of eps (None: 1.25, and 1 for n-fgsm). grad_align: weight of GradAlign, which keeps
    the gradients at x and at a random point of the ball aligned (Andriushchenko and Flammarion 2020, arXiv 2007.02617,
    section 5: 0.2 at Linf 8/255, 2 at 16/255). Start and step in the L2 ball are our reading: the paper's are not known.
    """

    name: Literal["fast-at"] = "fast-at"
    noise: Literal["uniform", "uniform-radius", "n-fgsm"] = "uniform"
    alpha: float | None = Field(default=None, gt=0)
    grad_align: float = Field(default=0.0, ge=0)

    summary: ClassVar[str] = "cross entropy on the images that one step from a random start finds"
    paper: ClassVar[str] = "Wong et al. 2020, arXiv 2001.03994; Goodwin et al. 2020, arXiv 2007.03832"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = False
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    @field_validator("alpha")
    @classmethod
    def _within_the_diameter(cls, alpha: float | None) -> float | None:
        if alpha is not None and alpha > 2:
            raise ValueError(
                f"a step of {alpha:g} eps is longer than the ball is wide, so it ends on its border whatever the start: "
                "take at most 2, usually 1.25"
            )
        return alpha

    @property
    def step_length(self) -> float:
        """The step in units of eps."""
        return self.alpha or (1.0 if self.noise == "n-fgsm" else 1.25)

    @property
    def second_derivatives(self) -> bool:
        return self.grad_align > 0

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any) -> Tensor:
        """Spends one forward and one backward pass to the input."""
        start = (x + self._noise(x, threat, draws)).clamp(0, 1)
        step = self.step_length * threat.eps
        gradient = input_gradient(nets.search, start, lambda logits: ce(logits, y))[0]
        if self.noise == "n-fgsm":
            return (start + step * steepest(gradient, threat.norm)).clamp(0, 1)
        return ascend(lambda *_: gradient, x, start, norm=threat.norm, radius=threat.eps, steps=1, step=step)

    def _noise(self, x: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
        if self.noise == "uniform-radius":
            direction = steepest(draws.normal(x), "L2")
            return direction * per_image(threat.eps * draws.uniform_per_image(x), x)
        return uniform_in_ball(x, threat.norm, threat.eps * (2 if self.noise == "n-fgsm" else 1), draws)

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = ce(logits_adv, y).mean()
        return total, {"ce_adv": total}

    def penalty(
        self, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws
    ) -> dict[str, Tensor]:
        """GradAlign: weight * mean(1 - cos(grad_x J(x), grad_x J(x + noise))), both gradients differentiated again."""
        if not self.grad_align:
            return {}
        beside = (x + uniform_in_ball(x, threat.norm, threat.eps, draws)).clamp(0, 1)
        here, there = (differentiable_gradient(forward, at, y)[0].flatten(1) for at in (x, beside))
        cosine = torch.nn.functional.cosine_similarity(here, there, dim=1, eps=1e-12)
        return {"grad_align": self.grad_align * (1 - cosine).mean()}

    def passes(self, bins: float, bws: float) -> float:
        # differentiating a gradient again goes back through its forward and its backward pass
        penalty = 2 * (1 + bins + bws + bins) if self.grad_align else 0
        return 1 + bins + 1 + bws + penalty
