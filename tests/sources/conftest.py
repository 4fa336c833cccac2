"""Fixtures for the sources: no network, and a small real model on disk."""
from __future__ import annotations

from pathlib import Path

import pytest
from source_folders import write_folder

import robustify  # noqa: F401 (registers with timm)
from robustify import registry

registry.install()


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Every test works without a network and without this machine's own files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ROBUSTIFY_MODELS_DIR", str(tmp_path / "models"))


@pytest.fixture
def digits_folder(tmp_path) -> Path:
    """A folder as robustify exports it: the digits network with random weights and lively batch statistics."""
    cfg = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]}
    return write_folder(tmp_path / "digits-cnn", registry.DIGITS, 10, cfg)
