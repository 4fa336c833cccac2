"""The knapsack attack: the whole set's budget goes to the cheapest flips (arXiv 2510.10000).

Every image's nearest flip is searched (robustify.flips); those that the budget E[||x'-x||^p] <= delta^p affords, cheapest
first, are moved, all others stay. The image at the margin, which the exact solution moves in part, stays as well, so this
is within one image of `knapsack.worst_accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustify.flips import flip_distances
from robustify.threat import ThreatModel, per_image

_HALVINGS = 80  # of the largest price per image: beyond the resolution of float64


def knapsack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 40,
    targets: int = 5,
    restarts: int = 3,
    batch_size: int = 256,
    seed: int = 0,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Return the images, [N, ...] in [0,1], of which as many as the budget affords are misclassified.

    x, y: the whole evaluation set (or this process's share of it, with `reduce` adding a tensor of sums over the
    processes). threat: distributional, Linf or L2. steps, targets, restarts: of `flips.flip_distances`.
    """
    p = threat.p if threat.p is not None else torch.inf
    found = flip_distances(
        model,
        x,
        y,
        norm=threat.norm,
        steps=steps,
        targets=targets,
        restarts=restarts,
        batch_size=batch_size,
        seed=seed,
    )
    distances = found.distances / threat.eps
    moved = distances <= (1.0 if p == torch.inf else _dearest(distances, p, reduce))
    return torch.where(per_image(moved, x), found.images, x)


def _dearest(distances: Tensor, p: float, reduce: Callable[[Tensor], Tensor]) -> float:
    """Return the largest t such that all flips within t cost one per image at most; distances in units of delta.

    By bisection, as it needs nothing of other processes but sums.
    """

    def spent(t: float) -> float:
        """What all flips within t cost, less the budget, over all processes."""
        price = torch.where(distances <= t, distances, 0.0) ** p - 1
        return float(reduce(price.sum(0, keepdim=True)))

    low, high = 0.0, float(len(distances) + 1)
    high = float(reduce(torch.tensor([high], dtype=torch.float64, device=distances.device)))  # no one image costs more
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= 0 else (low, middle)
    return low
