"""What tests build on: a linear model with a known optimum, a small network, learnable images, the real networks' folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn


class Linear(nn.Module):
    """logits = W x + b on flattened images: every attack's optimum is known."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def tiny_net(classes: int = 4, channels: int = 3, seed: int = 0) -> nn.Sequential:
    """A network with BatchNorm and dropout, for tests of modes and training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        )


def toy_data(
    n: int = 96, classes: int = 4, channels: int = 3, side: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Learnable images: each class has its own mean colour and corner."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centre = torch.rand(classes, channels, side, side, generator=torch.Generator().manual_seed(99))
    return (0.7 * centre[y] + 0.3 * torch.rand(n, channels, side, side, generator=generator)).clamp(0, 1), y


def assets_folder() -> Path | None:
    folder = os.environ.get("ROBUSTIFY_ASSETS")
    return Path(folder).resolve() if folder and (Path(folder) / "load.py").is_file() else None
