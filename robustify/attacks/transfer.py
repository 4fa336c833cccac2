"""Transfer: adversarial images of another network (Papernot et al. 2016, arXiv 1605.07277).

They need no gradient of the model that is attacked. Where they beat the attacks that use it, its gradients mislead.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.modes import borrowed
from robustify.rng import Draws, mix
from robustify.threat import ThreatModel, uniform_in_ball


def transfer(surrogate: nn.Module) -> Callable[..., Tensor]:
    """Return an attack that climbs the surrogate's cross entropy and gives its last iterates to the model.

    surrogate: [0,1] images to logits of the same classes. The attack returns images, [N, ...] in [0,1], within eps of x,
    and spends `steps` forward and backward passes of the surrogate, none of the model.
    """

    def attack(
        model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, steps: int = 20, seed: int = 0
    ) -> Tensor:
        start = (x + uniform_in_ball(x, threat.norm, threat.eps, Draws(mix(seed), x.device))).clamp(0, 1)
        with borrowed(surrogate):
            return ascend(
                lambda moved, _: input_gradient(surrogate, moved, lambda logits: ce(logits, y))[0],
                x,
                start,
                norm=threat.norm,
                radius=threat.eps,
                steps=steps,
                step=2.5 * threat.eps / steps,
            )

    return attack
