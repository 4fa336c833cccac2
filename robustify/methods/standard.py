"""Plain training, without any adversary: makes the non-robust starting networks, and is the control for everything else."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from robustify.losses import ce
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import NORMS, Norm, ThreatModel


class Standard(Settings):
    """Cross entropy on clean images. It gives no robustness, and says so by its name."""

    name: Literal["standard"] = "standard"

    summary: ClassVar[str] = "cross entropy on clean images: no robustness, a control"
    paper: ClassVar[str] = "-"
    adversarial: ClassVar[bool] = False
    needs_clean: ClassVar[bool] = False
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = NORMS

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any) -> Tensor:
        return x

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = ce(logits_adv, y).mean()
        return total, {"ce": total}

    def passes(self, bins: float, bws: float) -> float:
        return 1 + bws
