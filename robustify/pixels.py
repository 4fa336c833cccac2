"""PixelModel: images in [0,1] in, logits out. The only normalisation in the code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustify.errors import UserError


class PixelModel(nn.Module):
    """Puts a network behind a fixed per-channel normalisation, so that every budget is in pixel units.

    net:  any module that maps normalised images [N, C, H, W] to logits [N, classes].
    mean, std: per channel, in pixel units; (0,) and (1,) for a network that normalises inside or not at all.

    The input is normalised in its own precision and then cast to that of the network's weights; logits come back in at
    least single precision, so a half-precision network still gives usable losses.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.normalises = any(m != 0 for m in mean) or any(s != 1 for s in std)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalises:
            x = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        weight = next(self.net.parameters(), None)
        logits = self.net(x if weight is None else x.to(weight.dtype))
        if not isinstance(logits, Tensor):
            message = f"{type(self.net).__name__} returns a {type(logits).__name__}, not logits"
            raise UserError(message, "wrap it in a module that maps images [N, C, H, W] to logits [N, classes]")
        return logits if logits.dtype == torch.float64 else logits.float()


def own_memory(model: nn.Module) -> None:
    """Give every element of the weights and buffers a place of its own, in place: torch writes into no expanded tensor,
    whose elements share one, and neither trains nor loads it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout == torch.strided and any(
            stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            tensor.data = tensor.data.contiguous()
