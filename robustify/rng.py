"""Random numbers that depend on (seed, step) and the image's place in the global batch, and on nothing else.

So a run continues bit for bit after a kill without any saved generator, and gives the same perturbations on one process
as on many: every process draws for the whole global batch and keeps its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """Return one well-spread 63-bit seed from several non-negative integers."""
    import numpy as np

    words = np.random.SeedSequence(list(numbers)).generate_state(2)
    return (int(words[0]) << 31) ^ int(words[1])


class Draws:
    """A stream of random tensors for the rows [start, start+len(x)) of a global batch of `total` images."""

    def __init__(self, seed: int, device: torch.device | str = "cpu", total: int | None = None, start: int = 0) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.total, self.start = total, start

    def _rows(self, draw, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        total = self.total if self.total is not None else len(x)
        rows = draw((total, *shape), generator=self.generator, device=x.device, dtype=dtype)
        return rows[self.start : self.start + len(x)]

    def uniform(self, x: Tensor) -> Tensor:
        """U[0,1) of the shape and type of x."""
        return self._rows(torch.rand, x, tuple(x.shape[1:]), x.dtype)

    def normal(self, x: Tensor) -> Tensor:
        """N(0,1) of the shape and type of x."""
        return self._rows(torch.randn, x, tuple(x.shape[1:]), x.dtype)

    def uniform_per_image(self, x: Tensor) -> Tensor:
        """U[0,1), one number per image of x, [N]."""
        return self._rows(torch.rand, x, (), x.dtype)

    def pick(self, weights: Tensor) -> int:
        """An index drawn with these weights, [K], one for the whole global batch."""
        return int(torch.multinomial(weights.to(self.generator.device), 1, generator=self.generator))
