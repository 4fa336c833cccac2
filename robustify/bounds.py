"""First-order estimates of the accuracy in a Wasserstein ball, over a range of radii (arXiv 2306.09844, section 5).

With A the clean accuracy, V(delta) ~ V(0) + delta * Upsilon the worst expected loss and W(0) the mean loss over the
misclassified images, the share R_delta = A_delta / A of the accuracy that is kept is estimated

    R^u  from above  by the accuracy under an admissible attack, here W-FGSM, over A, and
    R^l  from below  by min{ W(0) - E_Q[J],  W(0) - V(0) - delta * Upsilon } / (W(0) - V(0)),   Q that attack's images.

Both hold to first order in delta: estimates, **not certificates**. The upper one is a true upper bound as well, as its
attack is real; the lower one can be wrong on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustify.errors import UserError
from robustify.gradients import input_gradient
from robustify.losses import LOSSES
from robustify.modes import borrowed, full_precision
from robustify.sensitivity import Sensitivity, budgets, conjugate, upsilon
from robustify.threat import Norm, dual_norms, per_image, steepest


@dataclass(frozen=True)
class Estimates:
    """Estimated accuracies in [0,1], [K] each, at the radii `deltas`: lower = A * R^l, upper = A * R^u.

    clean: A. losses: V(0) + delta * Upsilon, [K]. sensitivity: Upsilon.
    """

    deltas: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    losses: np.ndarray
    clean: float
    sensitivity: Sensitivity

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (R^l, R^u), [K] each; 0 where no image is right."""
        a = self.clean or 1.0
        return self.lower / a, self.upper / a


@full_precision()
def accuracy_estimates(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    deltas: Sequence[float],
    *,
    norm: Norm,
    p: float = 2.0,
    loss: str = "redlr",
    population: int | None = None,
    batch_size: int = 256,
    tell: Callable[[int, int], None] | None = None,
) -> Estimates:
    """Estimate the accuracy in the W_p balls of radii `deltas`, all positive.

    x, y: the whole evaluation set, or a sample of a set of `population` images. tell(done, total) in passes over them.
    Spends one forward and one backward pass per image, and one forward pass per radius: W-FGSM's direction is the same
    for all. Raises UserError for a loss other than ReDLR when no image is misclassified: W(0) is not defined then.
    """
    tell = tell or (lambda done, total: None)
    directions, slopes, losses, right = _first_order(model, x, y, norm, loss, batch_size)
    tell(1, 1 + len(deltas))
    if loss != "redlr" and bool(right.all()):
        raise UserError(f"no image is misclassified, so the {loss} of such images is unknown", "take the loss redlr")
    of_wrong = 0.0 if loss == "redlr" else float(losses[~right].mean())  # W(0)
    clean, now = float(right.double().mean()), float(losses.mean())
    q = conjugate(p)
    sensitivity = upsilon(slopes, q, population)
    scale = sensitivity.value ** (1 - q) if sensitivity.value > 0 else 0.0
    gap = of_wrong - now
    lower, upper = [], []
    for number, delta in enumerate(deltas, start=2):
        lengths = budgets(slopes, scale, q - 1, float(delta), p).to(x.dtype)
        moved = (x + per_image(lengths, x) * directions).clamp(0, 1)
        attacked, held = _forward(model, moved, y, loss, batch_size)
        kept = min(of_wrong - float(attacked.mean()), gap - float(delta) * sensitivity.value) / gap if gap > 0 else 0.0
        lower.append(clean * min(1.0, max(0.0, kept)))
        upper.append(float((held & right).double().mean()))
        tell(number, 1 + len(deltas))
    at = np.asarray(deltas, np.float64)
    return Estimates(at, np.array(lower), np.array(upper), now + at * sensitivity.value, clean, sensitivity)


def _first_order(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, loss: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(steepest direction [N, ...], dual gradient norm [N], loss [N], whether it is classified correctly [N])."""
    parts = []
    with borrowed(model):
        for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True):
            g, logits, losses = input_gradient(model, a, lambda logits, b=b: LOSSES[loss](logits, b))
            parts.append((steepest(g, norm), dual_norms(g, norm).double(), losses.double(), logits.argmax(1) == b))
    directions, slopes, losses, right = (torch.cat(part) for part in zip(*parts, strict=True))
    return directions, slopes, losses, right


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor, y: Tensor, loss: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """(loss, whether it is classified correctly) of each image, [N]."""
    with borrowed(model):
        logits = torch.cat([model(part) for part in x.split(batch_size)])
    return LOSSES[loss](logits, y).double(), logits.argmax(1) == y
