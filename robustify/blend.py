"""The straight line between two networks' weights: one fine-tuning run, and the whole trade-off between it and its start.

Weights on the line from the loaded network to the hardened one give every compromise of clean and robust accuracy, often
better ones than single runs do (Wortsman et al., CVPR 2022, arXiv 2109.01903, for robustness to shifts of distribution).
BatchNorm's statistics are interpolated like the weights. Measuring them anew on clean images is worse than it sounds: a
robust network's are those of clean and perturbed images together, and without the latter four points of robust accuracy
were lost at every point of a line, its end included (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustify.data import Split
from robustify.distributed import World
from robustify.errors import UserError
from robustify.evaluation import evaluate
from robustify.intervals import few_images
from robustify.pixels import PixelModel
from robustify.threat import ThreatModel

Weights = Mapping[str, Tensor]
FEW = 500  # held-out images, on which an accuracy has a standard error of up to 2.2 points


@dataclass(frozen=True)
class Point:
    """A point of the line: its way from the start, in [0,1], and its accuracies on the held-out images, in [0,1]."""

    alpha: float
    clean: float
    robust: float


def between(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) * start + alpha * end; what is no floating-point number is taken from the nearer end.

    Raises UserError when the two are not weights of the same network.
    """
    names = {*start, *end}
    other = sorted(n for n in names if n not in start or n not in end or start[n].shape != end[n].shape)
    if other:
        raise UserError(
            f"the two networks differ in {len(other)} of {len(names)} tensors, such as {other[0]}",
            "blend a run with the network it began from, or two runs from the same one",
        )
    return {
        name: torch.lerp(value.double(), end[name].to(value).double(), alpha).to(value.dtype)
        if value.is_floating_point()
        else (value if alpha < 0.5 else end[name])
        for name, value in start.items()
    }


def quick(threats: Sequence[ThreatModel]) -> str:
    """The attack that measures a point unless another is named: a cheap one, as every point is attacked anew."""
    if len(threats) > 1:
        return "pgd:steps=10"  # knows all norms
    return "knapsack:steps=20,targets=2,restarts=1" if threats[0].distributional else "screen"


def curve(
    model: PixelModel,
    start: Weights,
    end: Weights,
    held_out: Split,
    threats: ThreatModel | Sequence[ThreatModel],
    attack: str | None = None,
    points: int = 11,
    *,
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    world: World | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Measure `points` equal steps of the line on held-out images; model.net is left at its end.

    start, end: weights of model.net. threats: of several norms, the worst case over them per image counts. attack: None for
    a quick one. n: held-out images (None: all).
    """
    several = [threats] if isinstance(threats, ThreatModel) else list(threats)
    attack = attack or quick(several)
    found = []
    for k in range(points):
        tell(k, points)
        alpha = k / (points - 1)
        model.net.load_state_dict(between(start, end, alpha))
        report = evaluate(
            model,
            held_out,
            ["clean", attack],
            several,
            n=n,
            seed=seed,
            batch_size=batch_size,
            world=world,
            split_name="val",
        )
        found.append(Point(alpha, report.rows[0].accuracy, (report.union() or report.rows[1]).accuracy))
    tell(points, points)
    return found


def choose(points: Sequence[Point], max_clean_drop: float | None = None) -> Point:
    """Return the most robust point of those whose clean accuracy is at most so many points (of 100) below the start's.

    The start is the point with alpha 0; among equals the nearest to it wins.
    """
    ordered = sorted(points, key=lambda point: point.alpha)
    floor = -1.0 if max_clean_drop is None else ordered[0].clean - max_clean_drop / 100
    return max((point for point in ordered if point.clean >= floor - 1e-9), key=lambda point: point.robust)


def price(points: Sequence[Point]) -> float | None:
    """Return what the cheapest point more robust than the start costs in clean accuracy, in points of 100, rounded up to a
    tenth; None where no point is more robust."""
    start, *others = sorted(points, key=lambda point: point.alpha)
    costs = [100 * (start.clean - point.clean) for point in others if point.robust > start.robust]
    return math.ceil(10 * min(costs) - 1e-6) / 10 if costs else None


def few(n: int) -> str | None:
    """Return what to say when the point is chosen on so few held-out images that chance has a part in it."""
    return few_images(n, "choose the point") if n < FEW else None


def in_words(
    chosen: Point, points: int, n: int, start: str, end: str, measured: str, max_clean_drop: float | None = None
) -> str:
    """Return which point was chosen, of how many and by what: for a card. measured: the attack and its threats."""
    said = f"the weights lie {chosen.alpha:g} of the way from {start} to {end}: of {points} points the most robust on {n} "
    limit = "" if max_clean_drop is None else f" whose clean accuracy is at most {max_clean_drop:g} points lower"
    return f"{said}held-out images against {measured}{limit}"
