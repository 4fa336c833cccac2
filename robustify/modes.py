"""Borrowing a model for an attack, and giving it back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from robustify.pixels import PixelModel


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model in eval mode with frozen weights; every module's mode and every weight's flag comes back.

    Eval mode keeps batch statistics and dropout out of the attack; frozen weights make the backward pass stop at the
    input, which saves a third of it.
    """
    modes = [(module, module.training) for module in model.modules()]
    # some keep in eval mode what they computed from the weights of then, and drop it in train(): LeViT's attention biases
    own = [(module, mode) for module, mode in modes if type(module).train is not nn.Module.train]
    for module, _ in own:
        module.train()
        module.eval()
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    for module, _ in modes:
        module.training = False
    for weight, _ in flags:
        weight.requires_grad_(False)
    try:
        yield model
    finally:
        for module, mode in own:
            module.train(mode)
        for module, mode in modes:
            module.training = mode
        for weight, flag in flags:
            weight.requires_grad_(flag)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in fp32, without TF32 (ten bits on CUDA) or a caller's autocast; both come back as they were."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@dataclass(frozen=True)
class Nets:
    """What a training attack works on: `exact` in the training weights' precision, `search` perhaps in a faster one."""

    exact: nn.Module
    search: nn.Module


class Shadow:
    """A frozen bfloat16, channels-last copy of a model for the attack's search, refreshed once per optimiser step.

    The search is about twice as fast so on a CPU with bfloat16 (docs/speed.md); verdicts and the first KL step stay in
    full precision (in bfloat16 that step is rounding noise).
    """

    def __init__(self, model: PixelModel) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # only the network: the normalisation before it stays exact
        self.model.net.to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._pairs = list(zip(self._floats(self.model.net), self._floats(model.net), strict=True))

    @staticmethod
    def _floats(model: nn.Module) -> list[torch.Tensor]:
        return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]

    @torch.no_grad()  # without it the copy would make the shadow's buffers require gradients
    def refresh(self) -> None:
        """Copy the source's weights and statistics of now."""
        for mine, theirs in self._pairs:
            mine.copy_(theirs)
