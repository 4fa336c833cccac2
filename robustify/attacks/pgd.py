"""PGD with random restarts, the best adversarial image kept per example (Madry et al., ICLR 2018, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import SEARCH_LOSSES
from robustify.modes import borrowed
from robustify.rng import Draws, mix
from robustify.threat import ThreatModel, uniform_in_ball


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    loss: str = "ce",
    steps: int = 20,
    restarts: int = 1,
    step_ratio: float = 2.5,
    seed: int = 0,
) -> Tensor:
    """Return adversarial images, [N, ...] in [0,1], within eps of x.

    step_ratio: the step is step_ratio * eps / steps. Each restart begins uniformly in the ball and works only on the images
    that no earlier iterate fooled. The first iterate that fools the model is kept, read off the gradient pass itself; an
    image never fooled keeps its last iterate. Spends steps forward and backward passes per restart, and one more forward
    pass per restart but the last.
    """
    best = x.clone()
    left = torch.arange(len(x), device=x.device)
    with borrowed(model):
        for restart in range(restarts):
            x_adv, fooled = _one_start(
                model, x[left], y[left], threat, loss, steps, step_ratio, Draws(mix(seed, restart), x.device)
            )
            best[left] = x_adv
            if restart + 1 == restarts:
                break
            with torch.no_grad():
                fooled |= model(x_adv).argmax(1) != y[left]
            left = left[~fooled]
            if not len(left):
                break
    return best


def _one_start(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, loss: str, steps: int, step_ratio: float, draws: Draws
) -> tuple[Tensor, Tensor]:
    """One run of PGD: (images, whether an iterate before the last was seen to fool the model)."""
    found = x.clone()
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def gradient(x_adv: Tensor, _: int) -> Tensor:
        g, logits = input_gradient(model, x_adv, lambda logits: SEARCH_LOSSES[loss](logits, y))[:2]
        new = (logits.argmax(1) != y) & ~fooled
        found[new] = x_adv[new]
        fooled[new] = True
        return g

    start = (x + uniform_in_ball(x, threat.norm, threat.eps, draws)).clamp(0, 1)
    last = ascend(
        gradient, x, start, norm=threat.norm, radius=threat.eps, steps=steps, step=step_ratio * threat.eps / steps
    )
    found[~fooled] = last[~fooled]
    return found, fooled
