"""Losses per example, never a batch mean, in at least single precision: pure functions of logits [N, C] and labels [N].

A batch mean would divide every gradient norm by the batch size, and budgets are read off gradient norms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustify.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, [N]."""
    return F.cross_entropy(_exact(logits), y, reduction="none")


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) between the softmaxes, [N]; finite with finite logits (the log-target form; others give NaN at 0)."""
    p, q = F.log_softmax(_exact(logits_p), 1), F.log_softmax(_exact(logits_q), 1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the label's, [N]: positive exactly where the image is misclassified."""
    logits = _exact(logits)
    label = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]


def dlr(logits: Tensor, y: Tensor, smooth: float = 0.0) -> Tensor:
    """Difference of logits ratio, [N], at least 3 classes (Croce and Hein, ICML 2020, section 4).

    The margin over the gap between the largest and the third logit: -(z_y - z_(2)) / (z_(1) - z_(3)) where y is predicted.
    smooth: added to that gap; where it goes to 0 the slope explodes otherwise. Raises UserError with fewer than 3 classes.
    """
    if logits.shape[1] < 3:
        raise UserError(f"DLR needs at least 3 classes, the model has {logits.shape[1]}", "use the loss ce")
    logits = _exact(logits)
    top = logits.topk(3, dim=1).values
    tiny = torch.finfo(logits.dtype).tiny
    return margin(logits, y) / (top[:, 0] - top[:, 2] + smooth).clamp_min(tiny)


def redlr(logits: Tensor, y: Tensor, smooth: float = 0.0) -> Tensor:
    """Rectified DLR, [N]: DLR where the image is classified correctly, 0 with zero gradient elsewhere.

    A distributional attacker spends nothing on images that are already wrong (arXiv 2306.09844, section 3).
    """
    return dlr(logits, y, smooth).clamp_max(0)


LOSSES: dict[str, Loss] = {"ce": ce, "dlr": dlr, "redlr": redlr}
SEARCH_LOSSES: dict[str, Loss] = {
    **LOSSES,
    "margin": margin,
}  # the margin has no Upsilon worth reporting, but PGD climbs it
