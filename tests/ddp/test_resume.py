"""A run stopped in mid-epoch ends as if it had not been, on the same and on another number of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from resume_worker import STOP, run

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume")
    results = {"one": run(folder / "one", batchnorm="frozen"), "one, live": run(folder / "one, live")}
    results["free, one"] = run(folder / "free, one", free=True, batchnorm="frozen")
    run(folder / "from one", stop=STOP, batchnorm="frozen")
    command = [*LAUNCH, str(Path(__file__).with_name("resume_worker.py")), str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    results |= torch.load(folder / "results.pt")
    results["from two"] = run(folder / "from two", resume=True, batchnorm="frozen")
    return folder, results


@pytest.mark.parametrize("name", ["live, checkpoints", "live, stopped", "live, between"])
def test_neither_checkpoints_nor_a_stop_change_a_bit_with_live_statistics(results, name):
    _, found = results
    assert found[name]["upsilon"] == found["live"]["upsilon"]
    for key, weight in found["live"]["weights"].items():
        assert torch.equal(found[name]["weights"][key], weight), key


def test_a_stop_between_an_epochs_steps_and_its_probe_leaves_no_gap_in_the_metrics(results):
    folder, _ = results
    whole, between = ((folder / name / "metrics.jsonl").read_text() for name in ("live", "live, between"))
    assert between == whole


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


def test_the_noise_of_free_at_outlives_a_stop_between_two_replays(results):
    _, found = results
    for key, weight in found["free, one"]["weights"].items():
        assert torch.allclose(found["free, stopped"]["weights"][key].double(), weight.double(), rtol=1e-9, atol=1e-11), key


def test_synchronised_statistics_make_two_processes_one_with_live_batchnorm(results):
    _, found = results
    for key, weight in found["one, live"]["weights"].items():
        assert torch.allclose(found["sync"]["weights"][key].double(), weight.double(), rtol=1e-9, atol=1e-11), key
    apart = found["live"]["weights"]["0.weight"] - found["one, live"]["weights"]["0.weight"]
    assert apart.abs().max() > 1e-6  # each process's own statistics are another training


def test_a_slow_process_is_named(results):
    _, found = results
    (said,) = [note for note in found["slow"]["notes"] if "as long as the others" in note]
    assert said.startswith(f"process 1 on {socket.gethostname()} takes ")


@pytest.mark.parametrize("kind", ["qsgd", "power_sgd"])
def test_compression_goes_on_bit_for_bit_and_its_bytes_are_logged(results, kind):
    folder, found = results
    for key, weight in found[kind]["weights"].items():
        assert torch.equal(found[f"{kind}, stopped"]["weights"][key], weight), key
    lines = [json.loads(line) for line in (folder / kind / "metrics.jsonl").open()]
    sent = [line["gradient_bytes_per_step"] for line in lines if "gradient_bytes_per_step" in line]
    plain = [json.loads(line) for line in (folder / "live" / "metrics.jsonl").open()][-1]["gradient_bytes_per_step"]
    values = 8 * 27 + 8 + 8 + 8 + 4 * 32 + 4
    assert plain == 8 * values
    if kind == "qsgd":  # 372 values in two buckets of 512: a byte each and an fp32 norm
        assert set(sent) == {2 * (512 + 4)}
    else:
        assert sent[0] == plain > sent[-1]
