"""BatchNorm over the global batch: statistics of all processes' images, as if one process had them.

Its networks stay as they are: a torch function mode answers every call of `batch_norm` in training mode within a block, so
BatchNorm's subclasses (timm's come with an activation) and networks that call it themselves are covered, and the attack,
which runs in eval mode, exchanges nothing. torch's own SyncBatchNorm replaces modules and refuses CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Synchronised(TorchFunctionMode):
    """Within it, BatchNorm in training mode takes mean and variance over all processes: two small all-reduces a layer."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return (
            _batch_norm(*args, **kwargs) if func is F.batch_norm and kwargs.get("training") else func(*args, **kwargs)
        )


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.apply(gradients[0])  # pyright: ignore[reportReturnType]


def _over_all(values: Tensor) -> Tensor:
    return _Sum.apply(values)  # pyright: ignore[reportReturnType]


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    ones = values.new_full((1,), float(x.numel() // x.shape[1]))
    sums = _over_all(torch.cat([values.sum(dims), ones]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = values - mean.view(shape)
    var = _over_all(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    found = centred * scale.view(shape)
    return (found if bias is None else found + bias.view(shape)).to(x.dtype)
