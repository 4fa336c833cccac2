"""W-FGSM and W-PGD: attacks whose budget is shared by the whole evaluation set (arXiv 2306.09844, sections 3 and 4).

Every image moves along its own steepest direction by a length proportional to ||g||_*^(q-1), so that images the loss is
sensitive at move further, while the mean cost E[||x'-x||^p] stays within delta^p.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustify.gradients import input_gradient
from robustify.losses import LOSSES
from robustify.modes import borrowed
from robustify.threat import ThreatModel, dual_norms, norms, per_image, project, steepest

Reduce = Callable[[Tensor], Tensor]


def _alone(sums: Tensor) -> Tensor:
    return sums


def w_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    loss: str = "redlr",
    batch_size: int = 256,
    reduce: Reduce = _alone,
) -> Tensor:
    """One step of W-PGD of full length: x + delta * h(g) * (||g||_*/Upsilon)^(q-1), clamped to [0,1]."""
    return w_pgd(model, x, y, threat=threat, loss=loss, steps=1, step_ratio=1.0, batch_size=batch_size, reduce=reduce)


def w_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    loss: str = "redlr",
    steps: int = 50,
    step_ratio: float = 1.875,
    batch_size: int = 256,
    reduce: Reduce = _alone,
) -> Tensor:
    """Return the iterate, [N, ...] in [0,1], at which the fewest images are classified correctly.

    x, y: the whole evaluation set (or this process's share of it, with `reduce` adding a tensor of sums over the
    processes). threat: distributional, p in (1, inf]. step_ratio: the step is step_ratio * delta / steps. Spends one
    forward and one backward pass per step, and a last forward pass: accuracy is read from the gradient pass itself.

    Differs from the published code where that is wrong: for p = inf and L2 points inside the ball stay where they are.
    """
    p = threat.p if threat.p is not None else torch.inf
    q_minus_1 = 1 / (p - 1) if p != torch.inf else 0.0
    count = reduce(torch.tensor([float(len(x))], device=x.device, dtype=torch.float64))

    def mean(values: Tensor) -> Tensor:
        return reduce(values.double().sum(0, keepdim=True)) / count

    x_adv, best, fewest = x.clone(), x, torch.inf
    with borrowed(model):
        for _ in range(steps):
            direction, slope, right = _directions(model, x_adv, y, threat, loss, batch_size)
            correct = float(reduce(right.double().sum(0, keepdim=True)))
            if correct <= fewest:  # of equals the later, whose loss is higher
                best, fewest = x_adv.clone(), correct
            length = torch.where(slope > 0, slope**q_minus_1, 0.0)
            if p != torch.inf:
                length = length / (mean(length**p) ** (1 / p)).clamp_min(torch.finfo(torch.float64).tiny)
            x_adv = x_adv + step_ratio * threat.eps / steps * per_image(length.to(x.dtype), x) * direction
            x_adv = (x + _into_ball(x_adv - x, threat, p, mean)).clamp(0, 1)
        correct = float(reduce(_right(model, x_adv, y, batch_size).double().sum(0, keepdim=True)))
    return x_adv if correct <= fewest else best


def _directions(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, loss: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(steepest directions [N, ...], dual gradient norms [N], whether each image is classified correctly [N])."""
    direction = torch.empty_like(x)
    slope = torch.empty(len(x), dtype=torch.float64, device=x.device)
    right = torch.empty(len(x), dtype=torch.bool, device=x.device)
    for i in range(0, len(x), batch_size):
        rows = slice(i, i + batch_size)
        g, logits, _ = input_gradient(model, x[rows], lambda logits, rows=rows: LOSSES[loss](logits, y[rows]))
        direction[rows] = steepest(g, threat.norm)
        slope[rows] = dual_norms(g, threat.norm).double()
        right[rows] = logits.argmax(1) == y[rows]
    return direction, slope, right


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    right = torch.empty(len(x), dtype=torch.bool, device=x.device)  # a process may have no images at all
    for i in range(0, len(x), batch_size):
        rows = slice(i, i + batch_size)
        right[rows] = model(x[rows]).argmax(1) == y[rows]
    return right


def _into_ball(d: Tensor, threat: ThreatModel, p: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Shrink the perturbations so that (mean ||d||^p)^(1/p) <= delta; Linf clips each image, L2 scales it."""
    if p == torch.inf:
        return project(d, threat.norm, threat.eps)
    size = norms(d, threat.norm)
    spent = mean(size.double() ** p) ** (1 / p)
    shrink = float((threat.eps / spent.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1))
    return d if shrink == 1 else project(d, threat.norm, shrink * size)
