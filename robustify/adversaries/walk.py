"""Walking outward from each image and stopping where it pays best: the search of the dual and the knapsack adversaries.

Every image climbs in a ball whose radius grows by equal parts; of all its iterates the one with the largest score is
kept, the image itself among them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from robustify.adversaries.inner import Inner
from robustify.attacks.ascent import beside, cross_entropy_with
from robustify.gradients import input_gradient
from robustify.losses import LOSSES
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import Norm, norms, per_image, project, steepest

STRIDE = 1.5  # a step in units of the radius's growth: long enough to turn round within the ball on the way
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def walk(
    nets: Nets, x: Tensor, y: Tensor, *, norm: Norm, reach: float, inner: Inner, draws: Draws, score: Score
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x' [N, ...] in [0,1], ||x'-x|| [N], by how much the score there exceeds that of staying [N]).

    reach: radius of the last ball. score(logits [N, C], losses [N], distances [N]) -> [N] says what a stop is worth; an image
    moves only to where it is worth more than staying. Spends `inner.steps` gradients and passes(inner) forward passes.
    """
    start, objective = x, lambda logits: LOSSES[inner.loss](logits, y)
    if inner.loss == "kl":
        with torch.no_grad():
            objective = cross_entropy_with(F.softmax(nets.exact(x), 1))
        start = beside(x, norm, reach, draws)
    best, x_adv = x, start
    moved = torch.zeros(len(x), device=x.device, dtype=torch.float64)
    highest = stays = moved
    for k in range(inner.steps + 1):
        net = nets.exact if k == 0 else nets.search
        if k < inner.steps:
            g, logits, losses = input_gradient(net, x_adv, objective)
        else:
            with torch.no_grad():
                g, logits = None, net(x_adv)
                losses = objective(logits)
        away = torch.zeros_like(moved) if k == 0 else norms(x_adv.double() - x.double(), norm)
        worth = score(logits, losses.double(), away)
        if k == 0:
            highest = stays = worth
        better = worth > highest
        best = torch.where(per_image(better, x), x_adv, best)
        highest, moved = torch.where(better, worth, highest), torch.where(better, away, moved)
        if g is not None:
            x_adv = x_adv + STRIDE * reach / inner.steps * steepest(g, norm)
            x_adv = (x + project(x_adv - x, norm, reach * (k + 1) / inner.steps)).clamp(0, 1)
    return best, moved, highest - stays


def passes(inner: Inner, bins: float) -> float:
    """Cost of a walk in forward passes: the gradients, a forward pass at its end, and for KL one at its beginning."""
    return inner.steps * (1 + bins) + 1 + (inner.loss == "kl")
