"""The strongest distributional adversary that known flips allow: buy the cheapest ones until the budget is spent.

Moving a share a_i of image i to its flip at distance d_i costs a_i * d_i^p of the budget delta^p that the mean over the
images may spend, and wins a_i/N of the accuracy. That is a fractional knapsack, so buying in order of d_i, the last one
in part, is exact (Wasserstein distributional attack, arXiv 2510.10000); a partly moved image is a mixture of two. With
distances from attacks the accuracy left is an upper bound of the worst case in the W_p ball, for every delta at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def shares(distances: np.ndarray, delta: float, p: float) -> np.ndarray:
    """Return which share of each image the adversary moves to its flip, [N] in [0,1]; at most one is fractional.

    distances: [N], 0 for an image that is misclassified as it is, inf for one without a flip. The mean of
    shares * distances^p is delta^p, or less when every flip is bought. p = inf: all within delta.
    """
    d = np.asarray(distances, np.float64)
    if delta == 0 or math.isinf(p):
        return (d <= delta).astype(np.float64)
    with np.errstate(over="ignore"):  # an unaffordable price may be infinite
        price = (d / delta) ** p  # in units of one image's budget
    order = np.argsort(price, kind="stable")
    ordered = price[order]
    affordable = np.isfinite(ordered)
    ordered = ordered[affordable]
    left = len(d) - np.concatenate([[0.0], np.cumsum(ordered)[:-1]])[: len(ordered)]
    bought = np.zeros(len(d))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        bought[order[affordable]] = np.where(ordered > 0, np.clip(left / ordered, 0, 1), 1.0)
    return bought


def worst_accuracy(distances: np.ndarray, delta: float, p: float) -> float:
    """Return the accuracy left in the W_p ball of radius delta, in [0,1]. Raises ValueError without images."""
    if len(distances) == 0:
        raise ValueError("no images")
    return float(np.mean(1 - shares(distances, delta, p)))


def worst_curve(distances: np.ndarray, deltas: Sequence[float] | np.ndarray, p: float) -> np.ndarray:
    """Return the accuracy left at every delta, [K]."""
    return np.array([worst_accuracy(distances, float(delta), p) for delta in deltas])
