"""What to do when robustness collapses: how the loop tells, and what it trains with from then on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from robustify.methods.base import Method, OwnStep
from robustify.methods.fast_at import FastAt
from robustify.methods.gaat import Gaat
from robustify.methods.pgd_at import PgdAt

Remedy = Literal["smaller-alpha", "n-fgsm", "pgd-2", "stop"]
LADDER: tuple[Remedy, ...] = ("smaller-alpha", "n-fgsm", "pgd-2", "stop")  # each dearer or surer than the one before


def has_fallen(score: float, best: float, drop: float, n: int) -> bool:
    """Whether robust accuracy on n images has fallen from the best by more than `drop`, or, where the best is too low for
    such a fall, by more than half of the best and three of its standard errors.

    A high learning rate does that too, for an epoch, with every method. So a fall is a collapse where a one-step attack has
    gone blind as well (`is_blind`), or where the next epoch has not recovered from it.
    """
    noise = 3 * math.sqrt(best * (1 - best) / n)
    return best - score > min(drop, max(best / 2, noise))


def is_blind(alignment: float | None, before: float) -> bool:
    """Whether the gradient alignment (gradients.gradient_alignment) has fallen below half of what it was at the best epoch:
    with catastrophic overfitting it goes to 0 (Andriushchenko and Flammarion 2020, section 4). None: not measured."""
    return alignment is not None and alignment < before / 2


def is_hopeless(clean: float, robust: float, alignment: float | None) -> bool:
    """Whether a one-step method has nothing to fall from: a tenth of what it gets right withstands PGD, or less, while its
    gradients are not aligned (a cosine below 0.5; 0.75 and more in every other run of docs/field-results.md). At a large eps
    one step may overfit within the first epoch. A start that is not robust yet looks the same, so it is a collapse in two
    epochs only."""
    return alignment is not None and alignment < 0.5 and robust < clean / 10


def next_remedy(method: Method | OwnStep, wanted: Remedy | None, tried: Sequence[str]) -> Remedy:
    """The remedy to take now: `wanted`, or the next of LADDER that suits the method and has not been tried.

    wanted None: n-fgsm for fast-at, pgd-2 for gaat. Methods that are not one step long have no cure but to stop.
    """
    suits: dict[Remedy, bool] = {
        "smaller-alpha": isinstance(method, FastAt),
        "n-fgsm": isinstance(method, FastAt) and method.noise != "n-fgsm",
        "pgd-2": isinstance(method, (FastAt, Gaat)),
        "stop": True,
    }
    rungs = LADDER[LADDER.index(wanted or "n-fgsm") :]
    return next(rung for rung in rungs if suits[rung] and rung not in tried)


def remedied(method: Method | OwnStep, remedies: Sequence[str]) -> Method | OwnStep:
    """The method after these remedies, in their order.

    smaller-alpha: half the step. n-fgsm: its noise and step. pgd-2: two steps of eps/2 in place of the one.
    """
    for remedy in remedies:
        if remedy == "pgd-2":
            method = PgdAt(steps=2, step_ratio=1)
        elif isinstance(method, FastAt):
            changed = {"alpha": method.step_length / 2} if remedy == "smaller-alpha" else {"noise": "n-fgsm", "alpha": None}
            method = method.model_copy(update=changed)
    return method
