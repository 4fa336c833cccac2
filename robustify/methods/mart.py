"""MART: misclassification-aware adversarial training (Wang et al., ICLR 2020, openreview rklOg6EFwS)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from robustify.attacks.ascent import START_NOISE, ascend
from robustify.gradients import input_gradient
from robustify.losses import ce, kl
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.settings import Settings
from robustify.threat import Norm, ThreatModel, project


class Mart(Settings):
    """beta: weight of the consistency term. steps: K of the inner ascent. step_ratio: its step is step_ratio * eps / K."""

    name: Literal["mart"] = "mart"
    beta: float = Field(default=5.0, ge=0)
    steps: int = Field(default=10, ge=1)
    step_ratio: float = Field(default=2.5, gt=0)

    summary: ClassVar[str] = "adversarial margin, and consistency where the clean image is misjudged"
    paper: ClassVar[str] = "Wang et al. 2020, openreview rklOg6EFwS"
    adversarial: ClassVar[bool] = True
    needs_clean: ClassVar[bool] = True
    distributional: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    def tracker(self, threat: ThreatModel, population: int) -> None:
        return None

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any) -> Tensor:
        """PGD on the cross entropy from beside x, as in the authors' code. Spends `steps` forward and backward passes."""
        return ascend(
            lambda x_adv, _: input_gradient(nets.search, x_adv, lambda logits: ce(logits, y))[0],
            x,
            (x + project(START_NOISE * draws.normal(x), threat.norm, threat.eps)).clamp(0, 1),
            norm=threat.norm,
            radius=threat.eps,
            steps=self.steps,
            step=self.step_ratio * threat.eps / self.steps,
        )

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """BCE(f(x'), y) + beta * KL(f(x) || f(x')) * (1 - p_y(x)), batch means.

        BCE = -log p_y - log(1 - max of the other p), the second in logits: the log of a rounded 1 - p would be infinite.
        """
        assert logits is not None
        logits_adv = logits_adv if logits_adv.dtype == torch.float64 else logits_adv.float()
        label = F.one_hot(y, logits_adv.shape[1]).bool()
        rival = F.one_hot(logits_adv.masked_fill(label, -torch.inf).argmax(1), logits_adv.shape[1]).bool()
        without_rival = logits_adv.masked_fill(rival, -torch.inf).logsumexp(1)
        bce = (ce(logits_adv, y) + logits_adv.logsumexp(1) - without_rival).mean()
        doubt = 1 - torch.exp(-ce(logits, y))
        consistency = (doubt * kl(logits, logits_adv)).mean()
        return bce + self.beta * consistency, {"bce": bce, "kl": consistency}

    def passes(self, bins: float, bws: float) -> float:
        return self.steps * (1 + bins) + 2 * (1 + bws)
