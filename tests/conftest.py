"""Fixtures: a linear model with a known optimum, small networks, and the folder of real networks where there is one."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from helpers import Linear, assets_folder


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on a busy machine are slower than one, and sums stay in the same order."""
    torch.set_num_threads(1)


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
