"""Input gradients that are differentiated again: for losses that contain them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustify.losses import ce


def differentiable_gradient(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x of the summed cross entropies [N, ...], the images [N, ...] as its variable, losses [N]).

    All three carry their graph, so that a loss made of them has gradients for the weights.
    """
    x = x.detach().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        losses = ce(forward(x), y)
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return gradient, x, losses
