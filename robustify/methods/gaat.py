"""Taylor-series adversarial training, after GAAT (arXiv 2309.09464). No algorithm, code or table of the paper could be read:
this is our reconstruction from its abstract.

    J(x+d) ~ J(x) + <grad_x J(x), d> + 1/2 <H d, d>,    d = eps * h(grad_x J(x)), kept in [0,1] and not differentiated
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.methods.base import Passes
from robustify.methods.differentiated import differentiable_gradient
from robustify.methods.pgd_at import PgdAt
from robustify.modes import borrowed
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel, steepest


class Gaat(Settings):
    """order: of the Taylor polynomial. gradient: how its parameter gradient is taken.

      hessian-free  by differences of the loss along d: at x and x + h*d, with order 2 at x + h*d/2 too. The first backward
                    pass gives the weights' gradient and the direction d at once.
      exact         by differentiating the input gradient again

    h: length of the difference in units of d; with 1 what is minimised is J(x+d) itself, FGSM without a random start.
    pgd_every: a true PGD step of pgd_steps takes the place of every so many steps, and bounds the error (None: never).
    """

    name: Literal["gaat"] = "gaat"
    order: Literal[1, 2] = 1
    gradient: Literal["hessian-free", "exact"] = "hessian-free"
    h: float = Field(default=0.5, gt=0, le=1)
    pgd_every: int | None = Field(default=None, ge=1)
    pgd_steps: int = Field(default=7, ge=1)

    summary: ClassVar[str] = "the Taylor polynomial of the adversarial loss, without an attack"
    paper: ClassVar[str] = "after arXiv 2309.09464 (our reconstruction)"
    adversarial: ClassVar[bool] = True
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    @property
    def replays(self) -> int:
        return 1

    @property
    def shortest_in_half(self) -> float:
        """The least h whose parameter gradient in bfloat16 keeps a cosine of 0.95 to that in float32 (docs/methods.md)."""
        return 0.25 if self.order == 1 else 1.0

    @property
    def second_derivatives(self) -> bool:
        return self.gradient == "exact"

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def step(
        self, passes: Passes, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Spends two training passes, three with order 2, one and a gradient with h = 1; exact: one, differentiated again."""
        if self.pgd_every and (passes.step + 1) % self.pgd_every == 0:
            return self._pgd(passes, x, y, threat, draws)
        return (self._exact if self.gradient == "exact" else self._by_differences)(passes, x, y, threat)

    def _exact(self, passes: Passes, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Tensor, dict[str, Tensor]]:
        g, x, losses = differentiable_gradient(passes.forward, x, y)
        d = _direction(x.detach(), g.detach(), threat)
        slope = (g * d).flatten(1).sum(1)
        terms = [losses.mean(), slope.mean()]
        if self.order == 2:
            (curved,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
            terms.append((curved * d).flatten(1).sum(1).mean() / 2)
        total = torch.stack(terms).sum()
        passes.backward(total)
        return total, {"ce": terms[0], "taylor": total - terms[0]}

    def _by_differences(
        self, passes: Passes, x: Tensor, y: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The polynomial through the losses at x, x + h*d (and the middle) is its Taylor polynomial to that order; its value
        at x + d is a weighted sum of them."""
        at_x, others = _nodes(self.order, self.h)
        if self.h == 1:
            with borrowed(passes.nets.exact):
                g, _, losses = input_gradient(passes.nets.search, x, lambda logits: ce(logits, y))
            clean = losses.mean()
            total = torch.zeros_like(clean)
        else:
            x = x.detach().requires_grad_(True)
            clean = ce(passes.forward(x), y).mean()
            passes.backward(at_x * clean)
            assert x.grad is not None
            g = x.grad / at_x
            total = at_x * clean.detach()
        d = _direction(x.detach(), g, threat)
        for share, weight in others:
            loss = weight * ce(passes.forward(x.detach() + share * d), y).mean()
            passes.backward(loss)
            total = total + loss.detach()
        return total, {"ce": clean, "taylor": total - clean}

    def _pgd(
        self, passes: Passes, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        method = PgdAt(steps=self.pgd_steps)
        with borrowed(passes.nets.exact):
            x_adv = method.perturb(passes.nets, x, y, threat, draws, None)
        total, parts = method.loss(None, passes.forward(x_adv), y)
        passes.backward(total)
        return total, parts

    def passes(self, bins: float, bws: float) -> float:
        if self.gradient == "exact":  # every differentiation goes back through all the passes before it
            cost = 1 + bins + bws + bins if self.order == 1 else 1 + 2 * bins + bws + 3 * bins
        elif self.h == 1:
            cost = 1 + bins + 1 + bws
        else:
            cost = (1 + self.order) * (1 + bws)
        if self.pgd_every is None:
            return cost
        return cost + (PgdAt(steps=self.pgd_steps).passes(bins, bws) - cost) / self.pgd_every


def _direction(x: Tensor, g: Tensor, threat: ThreatModel) -> Tensor:
    """The step of length eps along the gradient, cut off where it would leave [0,1]."""
    return (x + threat.eps * steepest(g, threat.norm)).clamp(0, 1) - x


def _nodes(order: int, h: float) -> tuple[float, list[tuple[float, float]]]:
    """Lagrange's weights at 1 of the polynomial through 0, h (and h/2): (weight of 0, [(place, weight)]) without zeros."""
    if order == 1:
        return 1 - 1 / h, [(h, 1 / h)]
    middle = [(h / 2, -4 * (1 - h) / h**2)] if h < 1 else []
    return (2 - h) * (1 - h) / h**2, [*middle, (h, (2 - h) / h**2)]
