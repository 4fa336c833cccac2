"""First-order estimates of the accuracy in a Wasserstein ball, over a range of radii (arXiv 2306.09844, section 5).

With A the clean accuracy, V(delta) ~ V(0) + delta * Upsilon the worst expected loss and W(0) the mean loss over the
misclassified images, the share R_delta = A_delta / A of the accuracy that is kept is estimated

    from above  by the accuracy under an admissible attack, and
    from below  by min{ W(0) - E_Q[J],  W(0) - V(0) - delta * Upsilon } / (W(0) - V(0)),   Q that attack's images.

Both hold to first order in delta: estimates, **not certificates**. The upper one is a true upper bound as well, as its
attack is real; the lower one can be wrong on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustify.attacks.w_pgd import w_fgsm
from robustify.errors import UserError
from robustify.gradients import input_gradient
from robustify.losses import LOSSES
from robustify.modes import borrowed
from robustify.sensitivity import Sensitivity, conjugate, upsilon
from robustify.threat import Norm, ThreatModel, dual_norms


@dataclass(frozen=True)
class Estimates:
    """Estimated accuracies in [0,1], [K] each, at the radii `deltas`.

    upper: accuracy under the attack; lower: the first-order estimate, A * R^l. clean: A. sensitivity: Upsilon.
    """

    deltas: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    clean: float
    sensitivity: Sensitivity


def accuracy_estimates(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    deltas: Sequence[float],
    *,
    norm: Norm,
    p: float = 2.0,
    loss: str = "redlr",
    attack: Callable[..., Tensor] = w_fgsm,
    batch_size: int = 256,
) -> Estimates:
    """Estimate the accuracy in the W_p balls of radii `deltas`, all positive.

    x, y: the whole evaluation set. attack: w_fgsm, or w_pgd for a tighter upper estimate. Spends one forward and one
    backward pass per image, and the attack at every radius. Raises UserError for a loss other than ReDLR when no image
    is misclassified: W(0) is not defined then.
    """
    losses, right, slopes = _first_order(model, x, y, norm, loss, batch_size)
    if loss != "redlr" and bool(right.all()):
        raise UserError(f"no image is misclassified, so the {loss} of such images is unknown", "take the loss redlr")
    of_wrong = 0.0 if loss == "redlr" else float(losses[~right].mean())  # W(0)
    clean, now = float(right.double().mean()), float(losses.mean())
    sensitivity = upsilon(slopes, conjugate(p))
    gap = of_wrong - now
    lower, upper = [], []
    for delta in deltas:
        x_adv = attack(model, x, y, threat=ThreatModel(norm, float(delta), p), loss=loss, batch_size=batch_size)
        attacked, held = _forward(model, x_adv, y, loss, batch_size)
        kept = min(of_wrong - float(attacked.mean()), gap - float(delta) * sensitivity.value) / gap if gap > 0 else 0.0
        lower.append(clean * min(1.0, max(0.0, kept)))
        upper.append(float(held.double().mean()))
    return Estimates(np.asarray(deltas, np.float64), np.array(lower), np.array(upper), clean, sensitivity)


def _first_order(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, loss: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, whether it is classified correctly, dual gradient norm) of each image, [N]."""
    parts = []
    with borrowed(model):
        for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True):
            g, logits, losses = input_gradient(model, a, lambda logits, b=b: LOSSES[loss](logits, b))
            parts.append((losses.double(), logits.argmax(1) == b, dual_norms(g, norm).double()))
    losses, right, slopes = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses, right, slopes


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor, y: Tensor, loss: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """(loss, whether it is classified correctly) of each image, [N]."""
    with borrowed(model):
        logits = torch.cat([model(part) for part in x.split(batch_size)])
    return LOSSES[loss](logits, y).double(), logits.argmax(1) == y
