"""Fixtures: a linear model with a known optimum, small networks, and the folder of real networks where there is one."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on a busy machine are slower than one, and sums stay in the same order."""
    torch.set_num_threads(1)


class Linear(nn.Module):
    """logits = W x + b on flattened images: every attack's optimum is known."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


@pytest.fixture
def linear() -> Linear:
    """Three classes on images of 1x2x3 pixels."""
    generator = torch.Generator().manual_seed(0)
    return Linear(torch.randn(3, 6, generator=generator, dtype=torch.float64))


@pytest.fixture
def interior() -> tuple[torch.Tensor, torch.Tensor]:
    """Images so far from 0 and 1 that no small perturbation is clamped."""
    generator = torch.Generator().manual_seed(1)
    x = 0.4 + 0.2 * torch.rand(40, 1, 2, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (40,), generator=generator)


def tiny_net(classes: int = 4, channels: int = 3, seed: int = 0) -> nn.Sequential:
    """A network with BatchNorm and dropout, for tests of modes and training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(32, classes),
        )


def toy_data(n: int = 96, classes: int = 4, channels: int = 3, side: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Learnable images: each class has its own mean colour and corner."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centre = torch.rand(classes, channels, side, side, generator=torch.Generator().manual_seed(99))
    return (0.7 * centre[y] + 0.3 * torch.rand(n, channels, side, side, generator=generator)).clamp(0, 1), y


def assets_folder() -> Path | None:
    folder = os.environ.get("ROBUSTIFY_ASSETS")
    return Path(folder).resolve() if folder and (Path(folder) / "load.py").is_file() else None


@pytest.fixture
def assets():
    """The module that loads the real networks: model(name), images(name, split)."""
    folder = assets_folder()
    if folder is None:
        pytest.skip("ROBUSTIFY_ASSETS does not name the folder of real networks")
    sys.path.insert(0, str(folder))
    try:
        import load
    finally:
        sys.path.remove(str(folder))
    return load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("network") and os.environ.get("ROBUSTIFY_NETWORK") != "1":
            item.add_marker(pytest.mark.skip(reason="needs the internet: set ROBUSTIFY_NETWORK=1"))
