from __future__ import annotations

import pytest
import torch
from torch import nn

from robustify.gradients import gradient_alignment
from robustify.rng import Draws
from robustify.threat import ThreatModel


class Saddle(nn.Module):
    """Logits (0, c * x_0 * x_1): near (0.5, 0.5) its gradient turns with the place; c scales, and does not turn, it."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, x):
        x = x.flatten(1)
        value = self.c * x[:, 0] * x[:, 1]
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_alignment_is_the_cosine_of_the_two_gradients(scale):
    """At (a, b) the slope points along (b, a) whatever the scale; so the cosine is that of two places, swapped."""
    x = torch.full((400, 1, 1, 2), 0.5)
    y = torch.ones(400, dtype=torch.long)
    found = gradient_alignment(Saddle(scale), [(x, y, Draws(0))], ThreatModel("Linf", 0.4))
    assert found.shape == (400,)
    assert 0.8 < float(found.mean()) < 0.95  # E cos of (b, a) to (1, 1), a and b uniform in [0.1, 0.9]: 0.90
    assert torch.isnan(gradient_alignment(Saddle(0.0), [(x, y, Draws(0))], ThreatModel("Linf", 0.4))).all()


def test_two_halves_of_a_batch_find_what_the_whole_one_does():
    x, y = 0.2 + torch.rand(40, 1, 1, 2, generator=torch.Generator().manual_seed(0)), torch.ones(40, dtype=torch.long)
    threat = ThreatModel("Linf", 0.4)
    whole = gradient_alignment(Saddle(1.0), [(x, y, Draws(0))], threat)
    parts = [(x[i : i + 20], y[:20], Draws(0, total=40, start=i)) for i in (0, 20)]
    halves = [gradient_alignment(Saddle(1.0), [part], threat) for part in parts]
    assert torch.allclose(torch.cat(halves), whole, rtol=1e-6, equal_nan=True)


def test_a_linear_loss_is_aligned_everywhere(linear, interior):
    found = gradient_alignment(linear, [(*interior, Draws(0))], ThreatModel("L2", 0.001))
    assert float(found.min()) > 0.999
