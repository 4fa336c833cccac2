"""An evaluation begun by one process and ended by two has the report of one that nothing happened to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from evaluation_worker import subject

from robustify.recheck import recheck
from robustify.report import Report

WORKER = Path(__file__).with_name("evaluation_worker.py")


def run(launcher: list[str], pieces: Path, out: Path) -> list[Report]:
    out.mkdir()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(WORKER), str(pieces), str(out)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return [Report.load(path) for path in sorted(out.glob("*.json"))]


def test_two_processes_end_what_one_began_with_the_same_report(tmp_path):
    (whole,) = run([], tmp_path / "pieces", tmp_path / "whole")
    stored = sorted((tmp_path / "pieces").glob("*.npz"))
    lost = [path for number, path in enumerate(stored) if number % 2 or path.name.startswith("w-pgd")]
    for path in lost:  # as if it had been killed halfway
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in stored if path not in lost}
    ranks = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], tmp_path / "pieces", tmp_path / "two"
    )
    assert len(ranks) == 2
    assert sorted((tmp_path / "pieces").glob("*.npz")) == stored
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for report in ranks:
        assert report.digest() == whole.digest()
        assert report.notes == whole.notes
        assert report.checks == whole.checks
        for key, value in whole.arrays().items():
            assert np.array_equal(report.arrays()[key], value), key
    assert recheck(*subject(), whole, tmp_path / "pieces") == {row.key: 0 for row in whole.rows}
