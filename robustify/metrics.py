"""metrics.jsonl: one line a step and one an epoch; on resuming, lines after the checkpoint are dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from robustify import files


class Metrics:
    """Appends lines to `path`, or to nothing when it is None. resumed_step: the checkpoint's, None for a new run; epoch: the
    last one that was over then."""

    def __init__(self, path: Path | None, resumed_step: int | None, epoch: int = 0) -> None:
        self.path, self.file = path, None
        if path is None:
            return
        if resumed_step is not None and path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            lines = [json.loads(line) for line in whole]
            kept = [v for v in lines if v["step"] <= resumed_step and not ("probe" in v and v["epoch"] > epoch)]
            files.write_text(path, "".join(json.dumps(values) + "\n" for values in kept))
            self.file = open(path, "a")  # noqa: SIM115
        else:
            self.file = open(path, "w")  # noqa: SIM115

    def write(self, **values: Any) -> None:
        """Append a line. Raises UserError when the disk is full."""
        if self.path and self.file:
            with files.full_disk_explained(self.path):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()

    def close(self) -> None:
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
