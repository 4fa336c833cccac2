"""The KL ascent and the outer loss that TRADES and its Wasserstein form share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce, kl
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import Norm, Radius, per_image, project

START_NOISE = 0.001  # as in the TRADES code: KL has no slope at x' = x, so the ascent must begin beside it


def ascend_kl(
    nets: Nets, x: Tensor, clean_logits: Tensor, *, norm: Norm, radius: Radius, steps: int, step: Radius, draws: Draws
) -> Tensor:
    """Climb KL(f(x) || f(x')) inside the ball. Returns x', [N, ...]; spends `steps` gradients.

    The first of them is taken on the exact network: next to x the slope of KL is smaller than bfloat16 can tell from
    rounding. d/dx' KL(p||q) = d/dx' CE(p,q), so the entropy of p is left out.
    """
    target = F.softmax(clean_logits, 1)

    def gradient(x_adv: Tensor, k: int) -> Tensor:
        net = nets.exact if k == 0 else nets.search
        return input_gradient(net, x_adv, lambda logits: -(target * F.log_softmax(logits, 1)).sum(1))[0]

    noise = START_NOISE * draws.normal(x)
    if isinstance(radius, Tensor):  # an image without budget stays where it is
        noise = noise * per_image(radius > 0, x)
    start = (x + project(noise, norm, radius)).clamp(0, 1)
    return ascend(gradient, x, start, norm=norm, radius=radius, steps=steps, step=step)


def trades_loss(logits: Tensor | None, logits_adv: Tensor, y: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """CE(f(x), y) + beta * KL(f(x) || f(x')), batch means (Zhang et al., ICML 2019, equation 5)."""
    assert logits is not None
    natural, robust = ce(logits, y).mean(), kl(logits, logits_adv).mean()
    return natural + beta * robust, {"ce": natural, "kl": robust}
