"""The straight line between two networks' weights: one fine-tuning run, and the whole trade-off between it and its start.

Weights on the line from the loaded network to the hardened one give every compromise of clean and robust accuracy, often
better ones than single runs do (Wortsman et al., CVPR 2022, arXiv 2109.01903, for robustness to shifts of distribution).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from robustify.data import Split, batches
from robustify.errors import UserError
from robustify.evaluation import evaluate, sample
from robustify.threat import ThreatModel

Weights = Mapping[str, Tensor]
STATISTICS_IMAGES = 2048  # for BatchNorm's statistics: their error is then a fiftieth of a standard deviation


def between(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) * start + alpha * end; what is no floating-point number is taken from the nearer end.

    Raises UserError when the two are not weights of the same network.
    """
    other = [name for name in {*start, *end} if name not in start or name not in end or start[name].shape != end[name].shape]
    if other:
        raise UserError(
            f"the two networks differ in {len(other)} weights, such as {sorted(other)[0]}",
            "blend a run with the network it began from, or two runs from the same one",
        )
    return {
        name: torch.lerp(value.detach().double(), end[name].double(), alpha).to(value.dtype)
        if value.is_floating_point()
        else (value if alpha < 0.5 else end[name])
        for name, value in start.items()
    }


def blend(model: nn.Module, start: Weights, end: Weights, alpha: float, images: Iterable[Tensor]) -> None:
    """Set the model to the point alpha of the line, and measure BatchNorm's statistics anew where it is neither end.

    images: batches in the model's own input space; the average of the two ends' statistics is not the statistics of the
    average. A network without BatchNorm never looks at them.
    """
    model.load_state_dict(between(start, end, alpha))
    if 0 < alpha < 1:
        update_bn(images, model)


@dataclass(frozen=True)
class Point:
    """A point of the line: how far from the start, and its accuracies on the held-out images."""

    alpha: float
    clean: float
    robust: float


def curve(
    model: nn.Module,
    net: nn.Module,
    start: Weights,
    end: Weights,
    alphas: Sequence[float],
    *,
    train: Split,
    held_out: Split,
    threat: ThreatModel,
    attack: str,
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Measure each point of the line; the model is left at the last one.

    model: pixels to logits, with `net` inside, whose weights start and end are. train: images for BatchNorm's statistics.
    """
    points = []
    chosen = sample(len(train), min(len(train), STATISTICS_IMAGES), seed)
    lists = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    for k, alpha in enumerate(alphas):
        net.load_state_dict(between(start, end, alpha))
        if 0 < alpha < 1:  # through the whole model, which normalises
            update_bn((x for x, _ in batches(train, lists, device, 0)), model)
        report = evaluate(model, held_out, ["clean", attack], threat, n=n, seed=seed, batch_size=batch_size, split_name="val")
        points.append(Point(alpha, report.rows[0].accuracy, report.rows[1].accuracy))
        tell(k + 1, len(alphas))
    return points


def choose(points: Sequence[Point], max_clean_drop: float | None = None) -> Point:
    """Return the most robust point, of those whose clean accuracy lies at most so many points (0 to 100) below the start's.

    The start is the point with alpha 0; of equals the nearest to it wins.
    """
    (start,) = [point for point in points if point.alpha == 0]
    floor = -1.0 if max_clean_drop is None else start.clean - max_clean_drop / 100
    allowed = [point for point in sorted(points, key=lambda point: point.alpha) if point.clean >= floor - 1e-9]
    return max(allowed, key=lambda point: point.robust)
