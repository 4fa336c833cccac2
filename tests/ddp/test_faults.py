"""Runs on two processes that are killed, terminated, restarted: they end at once, say why, and go on where they were."""

from __future__ import annotations

import signal
import sys
import time

import psutil
import pytest
from launched import ROBUSTIFY, finish, start, steps

RUN = [
    *("finetune", "quickstart", "--epochs", "3", "--set", "data.limit=300", "--set", "method.steps=2"),
    *("--set", "train.checkpoint_steps=1", "--set", "eval.n=20", "--set", "eval.attacks=[clean]"),
    *("--set", "train.probe_images=16", "--no-verify", "-o", "run"),
]
STEPS = 12  # 270 images, batch 64, 3 epochs
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]


def trained_for(process, folder, count):
    """Wait until the run has made so many steps."""
    deadline = time.monotonic() + 300
    while len(steps(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_a_worker(process):
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "robustify" in child.cmdline()
    ]
    workers[-1].send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminated")
    process = start([*ROBUSTIFY, *RUN, "--processes", "2"], folder)
    trained_for(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    return folder, finish(process)


def test_sigterm_saves_the_step_and_says_how_to_go_on(terminated):
    folder, (code, _, err) = terminated
    assert code == 143, err
    (line,) = [line for line in err.splitlines() if "SIGTERM" in line]
    (saved,) = (folder / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{steps(folder)[-1]:08d}.pt"
    assert line.startswith(f"ended by SIGTERM; the state after step {steps(folder)[-1]} is saved")
    assert "this continues the run: robustify finetune quickstart" in line
    assert line.endswith("--processes 2")


def test_sigterm_ends_a_measurement_at_once(tmp_path):
    """One that would take hours."""
    process = start([*ROBUSTIFY, *RUN, "--set", "eval.attacks=[pgd:steps=10000000]", "--processes", "2"], tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "environment.json").exists():  # it is written just before
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "SIGTERM" in line and "process 1" not in line]
    assert line.startswith("ended by SIGTERM; nothing is saved yet; this continues the run: robustify finetune quickstart")


def test_a_killed_process_ends_the_run_with_its_reason_and_another_number_goes_on(terminated):
    folder, _ = terminated
    before = steps(folder)[-1]
    process = start([*ROBUSTIFY, *RUN, "--processes", "2"], folder)
    trained_for(process, folder, before + 1)
    kill_a_worker(process)
    code, _, err = finish(process)
    assert code == 3, err
    assert "was ended by SIGKILL" in err
    assert "another process has ended without a word" in err
    assert "Traceback" not in err
    assert f"resumed at step {before} of {STEPS}" in err
    process = start([*ROBUSTIFY, *RUN], folder)  # on one process
    code, out, err = finish(process)
    assert code == 0, err
    assert "resumed at step" in err
    assert steps(folder) == list(range(1, STEPS + 1))
    assert "model: run/model" in out


@pytest.mark.parametrize(
    ("processes", "code", "said"),
    [
        (1, 143, "ended by SIGTERM; finished batches are kept"),
        (2, 3, "was ended by SIGKILL, perhaps for want of memory"),
    ],
)
def test_an_evaluation_that_was_ended_says_how_it_goes_on(tmp_path, processes, code, said):
    evaluation = ["evaluate", "digits", "--attack", "pgd:steps=10000000", "-o", "report.json", "--processes", str(processes)]
    process = start([*ROBUSTIFY, *evaluation], tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "report.json.partial").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM) if processes == 1 else kill_a_worker(process)
    found, out, err = finish(process)
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    assert said in err
    assert f"this continues the evaluation: robustify {' '.join(evaluation)} --resume\n" in err


def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path):
    process = start([*TORCHRUN, "-m", "robustify", *RUN, "--force"], tmp_path)
    trained_for(process, tmp_path, 2)
    kill_a_worker(process)
    code, out, err = finish(process)
    assert code == 0, err
    assert err.count("resumed at step") == 1
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    assert "model: run/model" in out
