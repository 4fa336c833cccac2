"""Robustify started as users start it, watched while it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROBUSTIFY = [sys.executable, "-m", "robustify"]


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    # without it, the processes of a second start may read the first one's addresses
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **fresh, **variables}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def steps(folder: Path) -> list[int]:
    """The steps that the run in the folder has logged."""
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [line["step"] for line in lines if "lr" in line]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end: exit code, stdout, stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
