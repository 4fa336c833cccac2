"""Projected steepest ascent, the loop that FGSM, PGD and every training adversary share; and the ascent of KL."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from robustify.gradients import input_gradient
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import Norm, Radius, per_image, project, steepest

START_NOISE = 0.001  # as in the TRADES code: KL has no slope at x' = x, so the ascent must begin beside it


def ascend(
    gradient: Callable[[Tensor, int], Tensor],
    x: Tensor,
    start: Tensor,
    *,
    norm: Norm,
    radius: Radius,
    steps: int,
    step: Radius,
    direction: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Climb `steps` times along the steepest direction, staying in the ball of `radius` around x and in [0,1].

    gradient(x_adv, k) gives the k-th gradient, `direction` another one to take than its steepest; radius and step are floats or
    one number per image. Returns x_adv, [N, ...]. Spends exactly `steps` gradients.
    """
    direction = direction or (lambda g: steepest(g, norm))
    x_adv = start
    for k in range(steps):
        x_adv = x_adv + per_image(step, x) * direction(gradient(x_adv, k))
        x_adv = (x + project(x_adv - x, norm, radius)).clamp(0, 1)
    return x_adv


def ascend_kl(
    nets: Nets,
    x: Tensor,
    clean_logits: Tensor,
    *,
    norm: Norm,
    radius: Radius,
    steps: int,
    step: Radius,
    draws: Draws,
    see: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Climb KL(f(x) || f(x')) inside the ball. Returns x', [N, ...]; spends `steps` gradients.

    The first of them is taken on the exact network: next to x the slope of KL is smaller than bfloat16 can tell from
    rounding. d/dx' KL(p||q) = d/dx' CE(p,q), so the entropy of p is left out. see(g, logits): is given every iterate's
    gradient and logits and returns the gradient to follow.
    """
    target = F.softmax(clean_logits, 1)

    def gradient(x_adv: Tensor, k: int) -> Tensor:
        net = nets.exact if k == 0 else nets.search
        g, logits, _ = input_gradient(net, x_adv, cross_entropy_with(target))
        return see(g, logits) if see else g

    start = beside(x, norm, radius, draws)
    return ascend(gradient, x, start, norm=norm, radius=radius, steps=steps, step=step)


def cross_entropy_with(target: Tensor) -> Callable[[Tensor], Tensor]:
    """The cross entropy of logits with the distributions `target`, [N, C]: its slope is that of KL(target || softmax)."""
    return lambda logits: -(target * F.log_softmax(logits, 1)).sum(1)


def beside(x: Tensor, norm: Norm, radius: Radius, draws: Draws) -> Tensor:
    """Return images next to x, inside the ball; an image without budget stays where it is."""
    noise = START_NOISE * draws.normal(x)
    if isinstance(radius, Tensor):
        noise = noise * per_image(radius > 0, x)
    return (x + project(noise, norm, radius)).clamp(0, 1)
