"""The gradient with respect to the images, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from robustify.losses import LOSSES, Loss
from robustify.modes import borrowed
from robustify.threat import Norm, dual_norms


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
