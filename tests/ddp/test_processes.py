"""Two and four real processes give what one gives: perturbations, budgets, Upsilon, weights to rounding, verdicts exactly.

The last batch of an evaluation is smaller than the others, shares differ by an image, and some processes get none.
"""

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
    """The results of every process, by the number of processes."""
    folder, found = tmp_path_factory.mktemp("ddp"), {}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for count in (1, 2, 4):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *launch, str(WORKER), str(folder / str(count))]
        subprocess.run(command, env=environment, check=True, timeout=300)
        found[count] = [torch.load(folder / str(count) / f"rank{rank}.pt") for rank in range(count)]
    return found


@pytest.fixture(params=[2, 4])
def several(results, request):
    """(one process, its peers)."""
    return results[1][0], results[request.param]


@pytest.mark.parametrize("what", ["perturbations", "budgets"])
def test_the_same_perturbations_and_budgets(several, what):
    one, peers = several
    assert len(one[what]) == 8
    for step, whole in enumerate(one[what]):
        parts = torch.cat([rank[what][step] for rank in peers])
        assert parts.shape == whole.shape
        assert torch.allclose(parts, whole, rtol=1e-7, atol=1e-10), step
    assert one["budgets"][0].unique().numel() > 3  # they are the images' own, though some have no slope and some are capped


def test_the_same_upsilon_and_weights_to_rounding(several):
    one, peers = several
    for rank in peers:
        assert rank["upsilon"] == peers[0]["upsilon"] == pytest.approx(one["upsilon"], rel=1e-9)
        assert rank["alignment"] == peers[0]["alignment"] == pytest.approx(one["alignment"], rel=1e-7)
        for name, weight in one["weights"].items():
            assert torch.equal(rank["weights"][name], peers[0]["weights"][name]), name
            assert torch.allclose(rank["weights"][name].double(), weight.double(), rtol=1e-9, atol=1e-11), name


def test_the_identical_report(several):
    one, peers = several
    for rank in peers:
        assert rank["digest"] == one["digest"]
        assert rank["tiny"] == one["tiny"]
        assert rank["passes"] == one["passes"]
        for key, verdict in one["verdicts"].items():
            assert torch.equal(verdict, rank["verdicts"][key]), key
