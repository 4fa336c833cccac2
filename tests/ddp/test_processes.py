"""Two real processes give what one gives: perturbations, Upsilon, weights to rounding, verdicts exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(WORKER), str(folder / "one")], env=environment, check=True, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(WORKER), str(folder / "two")], env=environment, check=True, timeout=300)
    return [torch.load(folder / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt")]


def test_the_same_perturbations(results):
    one, *two = (r["perturbations"] for r in results)
    for step, whole in enumerate(one):
        parts = torch.cat([rank[step] for rank in two])
        assert parts.shape == whole.shape
        assert torch.allclose(parts, whole, rtol=1e-7, atol=1e-10), step


def test_the_same_upsilon_and_weights_to_rounding(results):
    one, first, second = results
    assert first["upsilon"] == second["upsilon"] == pytest.approx(one["upsilon"], rel=1e-9)
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert torch.allclose(first["weights"][name].double(), weight.double(), rtol=1e-9, atol=1e-11), name


def test_the_identical_report(results):
    one, first, second = results
    assert one["digest"] == first["digest"] == second["digest"]
    assert one["tiny"] == first["tiny"]
    assert one["passes"] == first["passes"]
    for key, verdict in one["verdicts"].items():
        assert torch.equal(verdict, first["verdicts"][key]), key
