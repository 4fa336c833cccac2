"""What a distributional adversary remembers from step to step, and the ledger of what it spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustify.threat import ThreatModel


class Memory:
    """What an adversary remembers, the same on every process, and the ledger of what it spent since the last summary.

    During an attack a process only notes its own rows; `update`, called by the loop after the attack, exchanges them.
    """

    def __init__(self, threat: ThreatModel) -> None:
        assert threat.p is not None
        self.p, self.delta = threat.p, threat.eps
        self.gather: Callable[[Tensor], Tensor] = lambda rows: rows
        self._noted: Tensor | None = None
        self._clear_ledger()

    def due(self, step: int, epoch_starts: bool) -> bool:
        """Whether the loop must call `measure` before this step."""
        return False

    def note(self, moved: Tensor, *columns: Tensor) -> None:
        """Keep this process's rows of a batch: the distance of each move, [N], and whatever `learn` wants, [N] each."""
        self._noted = torch.stack([column.detach().double() for column in (moved, *columns)], 1).cpu()

    def update(self) -> None:
        """Exchange the rows noted last over the processes, enter the costs in the ledger and learn from the rest."""
        if self._noted is None:
            return
        rows = self.gather(self._noted)
        self._noted = None
        if self.delta > 0 and len(rows):
            share = rows[:, 0] / self.delta
            power = share.sum() if math.isinf(self.p) else (share**self.p).sum()
            self.ledger += torch.stack([power, (share == 0).double().sum(), torch.tensor(float(len(share)))])
            self.largest = max(self.largest, float(rows[:, 0].max()))
        self.learn(rows)

    def learn(self, rows: Tensor) -> None:
        """Take a batch's rows over all processes: [N, 1 + columns] as noted."""

    def values(self) -> dict[str, float]:
        """What to log besides the ledger."""
        return {}

    def summary(self) -> dict[str, float]:
        """What to log of the epoch, and clear the ledger.

        mean_cost: mean(||x'-x||^p)/delta^p of the moves noted (by `budget` the radii it allots, which moves may not fill);
        zero_share: part of the images that stayed; largest_delta.
        """
        power, zeros, count = self.ledger.tolist()
        facts = {
            **self.values(),
            "mean_cost": power / max(count, 1),
            "zero_share": zeros / max(count, 1),
            "largest_delta": self.largest,
        }
        self._clear_ledger()
        return facts

    def _clear_ledger(self) -> None:
        self.ledger = torch.zeros(3, dtype=torch.float64)
        self.largest = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
