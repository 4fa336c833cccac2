"""The knapsack attack: the whole set's budget goes to the cheapest flips (arXiv 2510.10000).

Every image's nearest flip is searched (robustify.flips); those that the budget E[||x'-x||^p] <= delta^p affords, cheapest
first, are moved, all others stay. The image at the margin, which the exact solution moves in part, stays as well, so this
is within one image of `knapsack.worst_accuracy`, which `evaluate` reports.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustify.flips import flip_distances
from robustify.knapsack import shares
from robustify.threat import ThreatModel, per_image


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
) -> Tensor:
    """Return the images, [N, ...] in [0,1], of which as many as the budget affords are misclassified.

    x, y: the whole evaluation set. threat: distributional, Linf or L2. steps, targets, restarts: of `flip_distances`.
    """
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
    bought = shares(found.distances.cpu().numpy(), threat.eps, threat.p if threat.p is not None else torch.inf) == 1
    return torch.where(per_image(torch.from_numpy(bought).to(x.device), x), found.images, x)
