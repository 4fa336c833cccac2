"""A run stopped in mid-epoch ends as if it had not been, on the same and on another number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from resume_worker import run

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume")
    results = {"one": run(folder / "one", batchnorm="frozen")}
    run(folder / "from one", stop=True, batchnorm="frozen")
    command = [*LAUNCH, str(Path(__file__).with_name("resume_worker.py")), str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    results |= torch.load(folder / "results.pt")
    results["from two"] = run(folder / "from two", resume=True, batchnorm="frozen")
    return folder, results


@pytest.mark.parametrize("name", ["live, checkpoints", "live, stopped"])
def test_neither_checkpoints_nor_a_stop_change_a_bit_with_live_statistics(results, name):
    _, found = results
    assert found[name]["upsilon"] == found["live"]["upsilon"]
    for key, weight in found["live"]["weights"].items():
        assert torch.equal(found[name]["weights"][key], weight), key


@pytest.mark.parametrize("name", ["from one", "from two"])
def test_another_number_of_processes_goes_on_to_the_same_weights(results, name):
    folder, found = results
    assert found[name]["upsilon"] == pytest.approx(found["one"]["upsilon"], rel=1e-9)
    for key, weight in found["one"]["weights"].items():
        assert torch.allclose(found[name]["weights"][key].double(), weight.double(), rtol=1e-9, atol=1e-11), key
    logs = [[json.loads(line) for line in (folder / part / "metrics.jsonl").open()] for part in ("one", name)]
    for whole, resumed in zip(*logs, strict=True):  # the ledger of the budgets included
        numbers = {key: value for key, value in whole.items() if isinstance(value, (int, float))}
        assert {key: resumed[key] for key in numbers} == pytest.approx(numbers, rel=1e-6), whole["step"]
