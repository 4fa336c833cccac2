"""95 % intervals of accuracies and of their differences, and how they are shown."""

from __future__ import annotations

import math

import numpy as np

from robustify.errors import UserError

_Z95 = 1.959963984540054


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share, correct of n."""
    share, z2 = correct / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Return (after - before, low, high) of the accuracy on the same examples, with a 95 % interval.

    before, after: bool [n]; of different lengths, the first examples are compared. Only the examples whose verdict
    changed carry the variance. Half a count is added to each cell of the 2x2 table (Agresti and Min, Statistics in
    Medicine 2005), so that the interval covers at small n and has a width when nothing changed.
    """
    n = min(len(before), len(after))
    if n == 0:
        raise ValueError("no examples to compare")
    before, after = np.asarray(before[:n], bool), np.asarray(after[:n], bool)
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    total, up, down = n + 2, won + 0.5, lost + 0.5
    centre = (up - down) / total
    half = _Z95 * math.sqrt(up + down - (up - down) ** 2 / total) / total
    return (won - lost) / n, max(-1.0, centre - half), min(1.0, centre + half)


def points(value: float) -> float:
    """Return a loss of accuracy in points of 100 as it was given. Raises UserError for what is surely a fraction."""
    if 0 < value < 0.1:
        message = f"{value:g} is in points of 100, and less than one image in a thousand"
        raise UserError(message, f"for {100 * value:g} points of clean accuracy give {100 * value:g}, for none 0")
    return value


def percent(share: float) -> str:
    """Return `53.12 %`; the one way in which accuracies are shown."""
    return f"{100 * share:.2f} %"


def percent_interval(interval: tuple[float, float]) -> str:
    """Return `[50.01, 56.20]`, in per cent."""
    return f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def few_images(n: int, choose: str) -> str:
    """Return what to say of so few held-out images that chance has a part in what they `choose`."""
    return f"only {n} held-out images {choose}: an accuracy on them has a standard error of up to {50 / n**0.5:.1f} points"
