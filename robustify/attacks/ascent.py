"""Projected steepest ascent: the loop that FGSM, PGD and every training adversary share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from robustify.threat import Norm, Radius, per_image, project, steepest


def ascend(
    gradient: Callable[[Tensor, int], Tensor],
    x: Tensor,
    start: Tensor,
    *,
    norm: Norm,
    radius: Radius,
    steps: int,
    step: Radius,
) -> Tensor:
    """Climb `steps` times along the steepest direction, staying in the ball of `radius` around x and in [0,1].

    gradient(x_adv, k) gives the k-th gradient; radius and step are floats or one number per image. Returns x_adv, [N, ...].
    Spends exactly `steps` gradients.
    """
    x_adv = start
    for k in range(steps):
        x_adv = x_adv + per_image(step, x) * steepest(gradient(x_adv, k), norm)
        x_adv = (x + project(x_adv - x, norm, radius)).clamp(0, 1)
    return x_adv
