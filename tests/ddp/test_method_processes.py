"""Two real processes take the steps that one takes: second derivatives, several backward passes, shared states."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods_worker import CASES

WORKER = Path(__file__).with_name("methods_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(WORKER), str(folder / "one")], env=environment, check=True, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(WORKER), str(folder / "two")], env=environment, check=True, timeout=300)
    units = {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"}
    split = {**environment, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **units}
    subprocess.run([*launch, str(WORKER), str(folder / "split")], env=split, check=True, timeout=300)
    return [
        torch.load(folder / name)
        for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt", "split/rank0.pt", "split/rank1.pt")
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_same_weights_to_rounding(results, name):
    (one, _), *others = (found[name] for found in results if name in found)
    for (first, _), (second, _) in zip(others[::2], others[1::2], strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first, one, rtol=1e-8, atol=1e-10)


def test_fsdp2_was_used_where_it_can_be(results):
    left_out = {name for name, (method, _) in CASES.items() if getattr(method, "second_derivatives", False)}
    assert set(CASES) - set(results[3]) == left_out


@pytest.mark.parametrize("name", ["free-at", "multi-norm"])
def test_the_same_state_is_saved(results, name):
    """Free-at's perturbation of the whole batch, and the running errors over all images, whatever the processes."""
    (_, one), (_, first), (_, second), *_ = (found[name] for found in results)
    for key, value in one.items():
        assert torch.allclose(first[key], value, rtol=1e-8, atol=1e-10)
        assert torch.equal(first[key], second[key])
