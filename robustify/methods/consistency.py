"""The outer loss that TRADES and its Wasserstein form share."""

from __future__ import annotations

from torch import Tensor

from robustify.losses import ce, kl


def trades_loss(logits: Tensor | None, logits_adv: Tensor, y: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """CE(f(x), y) + beta * KL(f(x) || f(x')), batch means (Zhang et al., ICML 2019, equation 5).

    Images without a label, y = -1, are in the second term alone.
    """
    assert logits is not None
    known = y >= 0
    natural, robust = ce(logits[known], y[known]).mean(), kl(logits, logits_adv).mean()
    return natural + beta * robust, {"ce": natural, "kl": robust}
