"""Wasserstein-distributional TRADES (Bai, He, Jiang and Obloj, arXiv 2502.09352).

    min_theta  E[ CE(f(x),y) ] + beta * sup { E KL(f(x) || f(x')) : E ||x'-x||^p <= delta^p }

How the supremum over the Wasserstein ball is approached is the adversary's affair (robustify.adversaries). `budget` is
the paper's; its sizes (beta, delta, rates) are unknown to us and its inner ascent is our reconstruction: docs/methods.md
says which parts are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from robustify.adversaries import AnyAdversary
from robustify.adversaries.budget import Budget
from robustify.adversaries.inner import Inner, InnerLoss
from robustify.ledger import Memory
from robustify.methods.consistency import trades_loss
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel


class Wasserstein(Settings):
    """p, the ground norm and delta come from the threat, W2-Linf:8/255.

    beta: weight of the consistency term. steps, step_ratio: inner ascent, K steps of step_ratio * radius / K. inner_loss: what
    it climbs. adversary: who moves the images, by name or with its settings (`robustify ls adversaries`).
    """

    name: Literal["wasserstein"] = "wasserstein"
    beta: float = Field(default=6.0, ge=0)
    steps: int = Field(default=10, ge=1)
    step_ratio: float = Field(default=2.0, gt=0)
    inner_loss: InnerLoss = "kl"
    adversary: AnyAdversary = Budget()

    summary: ClassVar[str] = "TRADES against a Wasserstein ball: one budget, split over the images by their sensitivity"
    paper: ClassVar[str] = "Bai et al. 2025, arXiv 2502.09352 (budget attack: our reconstruction)"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = True
    distributional: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    @field_validator("adversary", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "budget", **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _settings_that_count(self) -> Wasserstein:
        name, own = self.adversary.name, type(self).model_fields
        if name == "batch" and self.inner_loss != own["inner_loss"].default:
            raise ValueError("adversary batch climbs a loss of its own: set method.adversary.loss, not inner_loss")
        if name in ("dual", "knapsack") and self.step_ratio != own["step_ratio"].default:
            raise ValueError(f"adversary {name} walks outward by equal parts of its reach: step_ratio says nothing to it")
        if name == "random-radius" and self.steps < 2:
            raise ValueError("adversary random-radius judges which images withstood from the second step on: take steps >= 2")
        return self

    @property
    def inner(self) -> Inner:
        return Inner(self.steps, self.step_ratio, self.inner_loss)

    def tracker(self, threat: ThreatModel, population: int) -> Memory:
        return self.adversary.memory(threat, population)

    def perturb(
        self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Memory | None
    ) -> Tensor:
        """Spends what the adversary does (its `attack`)."""
        return self.adversary.attack(nets, x, y, threat, self.inner, draws, tracker)  # pyright: ignore[reportArgumentType]

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return trades_loss(logits, logits_adv, y, self.beta)

    def passes(self, bins: float, bws: float) -> float:
        return self.adversary.passes(self.inner, bins) + 2 * (1 + bws)
