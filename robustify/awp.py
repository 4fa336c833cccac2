"""Adversarial weight perturbation (Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884): minimise the loss where the weights
are worst nearby, which flattens it. Two borrowings of a model that comes back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def same_statistics(model: nn.Module) -> Iterator[None]:
    """Give the buffers (BatchNorm's statistics) back as they were: for passes that only look for a gradient."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextmanager
def uphill(model: nn.Module, gamma: float) -> Iterator[None]:
    """Within, every weight matrix or kernel w stands at w + gamma * ||w|| * g/||g||, g its gradient; the gradients are
    cleared. Afterwards the weights are what they were; gradients found within stay. Vectors, such as biases and
    BatchNorm's weights, do not move, as in the authors' code.
    """
    moved = [(w, w.detach().clone()) for w in model.parameters() if w.ndim > 1 and w.grad is not None]
    with torch.no_grad():
        for w, value in moved:
            assert w.grad is not None
            length = w.grad.norm()
            w += w.grad * torch.where(length > 0, gamma * value.norm() / length, 0.0)
    model.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            for w, value in moved:
                w.copy_(value)
