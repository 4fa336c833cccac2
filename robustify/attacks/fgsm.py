"""FGSM: one step of steepest ascent (Goodfellow et al., ICLR 2015, section 4)."""

from __future__ import annotations

from torch import Tensor, nn

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import LOSSES
from robustify.modes import borrowed
from robustify.threat import ThreatModel


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, loss: str = "ce") -> Tensor:
    """Return x moved by one step of length eps along the gradient's steepest direction, [N, ...] in [0,1]."""
    with borrowed(model):
        return ascend(
            lambda x_adv, _: input_gradient(model, x_adv, lambda logits: LOSSES[loss](logits, y))[0],
            x,
            x,
            norm=threat.norm,
            radius=threat.eps,
            steps=1,
            step=threat.eps,
        )
