"""The gradient with respect to the images, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from robustify.losses import LOSSES, Loss
from robustify.modes import borrowed, full_precision
from robustify.rng import Draws
from robustify.threat import Norm, ThreatModel, dual_norms, uniform_in_ball


def input_gradient(model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward pass to the input.

    objective maps logits [N, C] to a loss per example [N]. Returns (gradient [N, ...], logits [N, C], losses [N]), all
    detached. The gradient is that of the sum, so each image's entry is its own loss's gradient. Borrow the model first.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        losses = objective(logits)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return gradient, logits.detach(), losses.detach()


@full_precision()
def gradient_norms(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: str | Loss, norm: Norm) -> Tensor:
    """Return ||grad_x J(f(x), y)|| in the norm dual to `norm` for every image of the batches, [N] on the CPU.

    Costs one forward and one backward pass to the input per image.
    """
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    found = []
    with borrowed(model):
        for x, y in batches:
            gradient, _, _ = input_gradient(model, x, lambda logits, y=y: objective(logits, y))
            found.append(dual_norms(gradient, norm).double().cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


@full_precision()
def gradient_alignment(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Draws]], threat: ThreatModel
) -> Tensor:
    """Return cos(grad_x J(x), grad_x J(x + noise)) for every image, noise uniform in the ball, [N] on the CPU.

    batches: images, labels and where each batch's noise comes from. nan where there is no slope. It falls towards 0 in
    catastrophic overfitting: the loss bends within the ball, and one step no longer finds its peak
    (Andriushchenko and Flammarion 2020, arXiv 2007.02617, section 4). Costs two forward and two backward passes to the
    input per image.
    """
    found = []
    with borrowed(model):
        for x, y, draws in batches:
            beside = (x + uniform_in_ball(x, threat.norm, threat.eps, draws)).clamp(0, 1)
            here, there = (
                input_gradient(model, at, lambda logits, y=y: LOSSES["ce"](logits, y))[0].flatten(1).double()
                for at in (x, beside)  # in double: the slope at a certain prediction has no square in float
            )
            found.append(((here * there).sum(1) / (here.norm(dim=1) * there.norm(dim=1))).cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
