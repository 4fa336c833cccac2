"""Distributional accuracy from pointwise accuracy: the dual of the knapsack, computed without it.

    A_delta = max over t of  { E_u[ RA(t * u^(1/p)) ] - (delta/t)^p },   u uniform on (0,1)

RA(eps) is the pointwise robust accuracy at radius eps. So the worst case in a W_p ball is an average of pointwise
accuracies over a random radius, less the price of the budget. Every t gives a lower bound (weak duality): a certified
pointwise curve yields a certified distributional accuracy, an attack's curve an upper estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class PointwiseCurve:
    """Robust accuracy as a step function of the radius.

    edges, values: values[j] between edges[j] and edges[j+1]; the first edge is 0, the last value lasts for ever. Values
    never rise. closed: the side on which a step holds at its edge, `left` where values[j] counts at edges[j] itself.
    """

    edges: np.ndarray
    values: np.ndarray
    closed: Literal["left", "right"]

    @classmethod
    def from_distances(cls, distances: np.ndarray) -> PointwiseCurve:
        """The share of images whose distance, [N], exceeds the radius: exact, for flips and for certified radii."""
        d = np.sort(np.asarray(distances, np.float64))
        edges = np.unique(np.concatenate([[0.0], d[np.isfinite(d)]]))
        return cls(edges, 1 - np.searchsorted(d, edges, side="right") / len(d), "left")

    @classmethod
    def attacked(cls, radii: Sequence[float], accuracies: Sequence[float]) -> PointwiseCurve:
        """From upper bounds at ascending radii: each holds from its radius to the next; before the first it is 1."""
        r, a = _checked(radii, accuracies)
        if r[0] > 0:
            r, a = np.concatenate([[0.0], r]), np.concatenate([[1.0], a])
        return cls(r, np.minimum.accumulate(a), "left")

    @classmethod
    def certified(cls, radii: Sequence[float], accuracies: Sequence[float]) -> PointwiseCurve:
        """From lower bounds at some ascending radii: each holds down to the radius before; beyond the last it is 0."""
        r, a = _checked(radii, accuracies)
        a = np.maximum.accumulate(a[::-1])[::-1]
        edges, values = np.concatenate([[0.0], r]), np.concatenate([a, [0.0]])
        return cls(edges[1:], values[1:], "right") if r[0] == 0 else cls(edges, values, "right")

    def at(self, radius: float) -> float:
        """Return the robust accuracy at a radius."""
        if radius <= 0:
            return float(self.values[0])
        side = "right" if self.closed == "left" else "left"
        return float(self.values[np.searchsorted(self.edges, radius, side=side) - 1])


def distributional_accuracy(curve: PointwiseCurve, delta: float, p: float) -> tuple[float, float]:
    """Return (accuracy in the W_p ball of radius delta, the t that attains it).

    Between two edges the objective is linear in t^-p, and concave over all, so the best t is an edge, or infinite when
    the budget buys every flip. The accuracy is a lower bound if the curve's values are, and an upper one likewise.
    """
    if delta == 0 or math.isinf(p):
        return curve.at(delta), delta
    best, best_t = float(curve.values[-1]), math.inf
    average = float(curve.values[0])  # E_u[RA(t u^(1/p))] at t = the edge; from edge to edge a convex combination
    for before, t, value in zip(curve.edges[:-1], curve.edges[1:], curve.values[:-1], strict=True):
        inside = float(before / t) ** p
        average = average * inside + float(value) * (1 - inside)
        found = average - _power(delta / float(t), p)
        if found > best:
            best, best_t = found, float(t)
    return best, best_t


def _power(base: float, p: float) -> float:
    try:
        return base**p
    except OverflowError:
        return math.inf


def _checked(radii: Sequence[float], accuracies: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    r, a = np.asarray(radii, np.float64), np.asarray(accuracies, np.float64)
    if r.ndim != 1 or len(r) == 0 or r.shape != a.shape:
        raise ValueError(f"{r.shape} radii and {a.shape} accuracies")
    if (np.diff(r) <= 0).any() or r[0] < 0 or not ((a >= 0) & (a <= 1)).all():
        raise ValueError("radii must ascend from 0, accuracies lie in [0,1]")
    return r, a
