"""The inner maximisation of the distributional adversaries that know each image's radius beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from robustify.attacks.ascent import ascend, ascend_kl
from robustify.gradients import input_gradient
from robustify.losses import LOSSES
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import Norm

InnerLoss = Literal["kl", "redlr", "ce"]


@dataclass(frozen=True)
class Inner:
    """What the method asks for: `steps` gradients of `loss`, each step of length step_ratio * radius / steps."""

    steps: int
    step_ratio: float
    loss: InnerLoss

    def climb(
        self,
        nets: Nets,
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        norm: Norm,
        radius: Tensor,
        draws: Draws,
        *,
        first: Tensor | None = None,
        see: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return x', [N, ...], each in its own ball. clean: logits of x. first: the gradient at x, if it is known.

        see(g, logits): is given those of every iterate but the last, and returns the gradient to follow. Spends `steps`
        gradients, one less with `first`.
        """
        step = self.step_ratio * radius / self.steps
        if self.loss == "kl":
            return ascend_kl(
                nets, x, clean, norm=norm, radius=radius, steps=self.steps, step=step, draws=draws, see=see
            )

        def gradient(x_adv: Tensor, k: int) -> Tensor:
            if k == 0 and first is not None:
                return first
            g, logits, _ = input_gradient(nets.search, x_adv, lambda logits: LOSSES[self.loss](logits, y))
            return see(g, logits) if see else g

        return ascend(gradient, x, x, norm=norm, radius=radius, steps=self.steps, step=step)
