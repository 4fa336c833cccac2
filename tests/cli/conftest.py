"""The command line run in this process, in an empty folder; and one finished run for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from robustify.cli import main

# the smallest run there is: random weights, a few hundred digits, two steps of ascent
TINY = [
    *("--model", "timm:robustify_digits_cnn", "--set", "model.pretrained=false", "--no-verify"),
    *("--data", "digits", "--set", "data.limit=300", "--threat", "Linf:0.1", "--epochs", "1"),
    *("--method", "trades", "--set", "method.steps=2", "--set", "train.probe_images=32", "--set", "eval.n=64"),
]


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def robustify(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return Ran(int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny():
    return list(TINY)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(the folder of a run, the process that made it)."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "robustify", "finetune", *TINY, "-o", str(folder), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return folder, subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
