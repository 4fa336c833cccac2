"""AutoAttack and its four attacks, run by their authors' code (Croce and Hein, ICML 2020, arXiv 2003.01690).

Adapters, not copies: each builds pyautoattack's object with the authors' settings and lets it attack one batch, with
the same random numbers as pyautoattack alone, so every verdict is the same. Frozen weights spare FAB half of each
backward pass; nothing else can be saved with the verdicts certain. A search in half precision takes other paths, and
that its survivors survive the full search too can only be known by running it; so it is never called standard.

Their warnings (zero gradients, and those of `check`) are Python warnings; `evaluate` puts them into the report.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyautoattack import checks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from robustify.attacks.cascade import AUTHORS, Cascade, Stage, in_turn
from robustify.errors import UserError
from robustify.modes import borrowed
from robustify.threat import ThreatModel

STEPS, QUERIES, TARGETS = 100, 5000, 9  # the standard version's
_CHECKED = 64  # images for the authors' checks of the model


def apgd_ce(
    model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, steps: int = STEPS, restarts: int = 1, seed: int = 0
) -> Tensor:
    """APGD on the cross entropy (section 3): adversarial images, [N, ...]; x itself where it finds none.

    Under L1 it comes down from three times the radius, as the authors' standard version does (arXiv 2103.01208).
    """

    def attack(predict: Callable[[Tensor], Tensor]) -> Any:
        return APGDAttack(
            predict,
            n_iter=steps,
            norm=threat.norm,
            n_restarts=restarts,
            eps=threat.eps,
            seed=seed,
            device=x.device,
            use_largereps=threat.norm == "L1",
        )

    return _run(attack, model, x, y)


def apgd_t(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = STEPS,
    targets: int = TARGETS,
    seed: int = 0,
) -> Tensor:
    """APGD on the targeted DLR loss (section 4): adversarial images, [N, ...]; x itself where it finds none.

    targets: how many classes it aims at, the likeliest first. Raises UserError with fewer than four classes.
    """
    classes = _classes(model, x)
    if classes < 4:
        raise UserError(
            f"apgd-t needs at least 4 classes for its loss, the model has {classes}",
            "take apgd-ce, fab-t and square, or autoattack, which leaves it out and says so",
        )

    def attack(predict: Callable[[Tensor], Tensor]) -> Any:
        return APGDAttack_targeted(
            predict,
            n_iter=steps,
            norm=threat.norm,
            eps=threat.eps,
            seed=seed,
            device=x.device,
            n_target_classes=min(targets, classes - 1),
            use_largereps=threat.norm == "L1",
        )

    return _run(attack, model, x, y)


def fab_t(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = STEPS,
    targets: int = TARGETS,
    seed: int = 0,
) -> Tensor:
    """Targeted FAB (Croce and Hein, ICML 2020, arXiv 1907.02044), which looks for the smallest perturbation.

    Returns those within eps, [N, ...]; x itself where it finds none. targets as for `apgd_t`.
    """
    classes = _classes(model, x)

    def attack(predict: Callable[[Tensor], Tensor]) -> Any:
        return FABAttack_PT(
            predict,
            norm=threat.norm,
            n_iter=steps,
            eps=threat.eps,
            seed=seed,
            targeted=True,
            device=x.device,
            n_target_classes=min(targets, classes - 1),
        )

    return _run(attack, model, x, y)


def square(
    model: nn.Module, x: Tensor, y: Tensor, *, threat: ThreatModel, queries: int = QUERIES, seed: int = 0
) -> Tensor:
    """The Square attack (Andriushchenko et al., ECCV 2020, arXiv 1912.00049): random search without gradients.

    Returns adversarial images, [N, ...]; x itself where it finds none. Raises UserError like `check_windows`.
    """
    check_windows(threat, (x.shape[2], x.shape[3]))

    def attack(predict: Callable[[Tensor], Tensor]) -> Any:
        return SquareAttack(
            predict,
            norm=threat.norm,
            n_queries=queries,
            eps=threat.eps,
            p_init=0.8,
            seed=seed,
            device=x.device,
            resc_schedule=False,
        )

    return _run(attack, model, x, y)


def check_windows(threat: ThreatModel, size: tuple[int, int]) -> None:
    """Raise UserError where Square, as its authors wrote it, cannot place its first windows. size: (height, width).

    In L2 and L1 it begins with windows side by side, of a fifth of the height, from the margin that five of them leave. It
    places as many as would fit without that margin, so the last one may stick out (at 12, 14, 18, 19 and 24 pixels), which
    its code does not foresee; windows of one pixel may, and images lower than five pixels have none.
    """
    height, width = size
    side = height // 5
    margin = (height - 5 * side) // 2
    sticks_out = side > 1 and width >= side and any(margin + n // side * side > n for n in size)
    if threat.norm != "Linf" and (side == 0 or sticks_out):
        raise UserError(
            f"Square, as its authors wrote it, cannot place its windows in {threat.norm} on images of {height}x{width}",
            "take AutoAttack's other parts: --attack apgd-ce --attack apgd-t --attack fab-t; Linf works at every size",
        )


AUTHORS.update({apgd_ce, apgd_t, fab_t, square})


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = STEPS,
    queries: int = QUERIES,
    targets: int = TARGETS,
    seed: int = 0,
) -> Tensor:
    """The standard version of AutoAttack on one batch: adversarial images, [N, ...]; x itself where it finds none.

    With other settings, or with fewer than ten classes, it is what `standard` says in its label.
    """
    check_windows(threat, (x.shape[2], x.shape[3]))
    check(model, x, y)
    build = partial(standard, threat, steps=steps, queries=queries, targets=targets)
    return in_turn(build, model, x, y, threat=threat, seed=seed)


def standard(
    threat: ThreatModel, classes: int, *, steps: int = STEPS, queries: int = QUERIES, targets: int = TARGETS
) -> Cascade:
    """Return the standard version's stages for a model of so many classes; the label says where it departs from it."""
    l1 = threat.norm == "L1"
    apgd_targets, fab_targets = (min(wanted, targets, classes - 1) for wanted in (5 if l1 else TARGETS, TARGETS))
    stages = [Stage("apgd-ce", apgd_ce, {"steps": steps, "restarts": 5 if l1 else 1})]
    if classes >= 4:
        stages.append(Stage("apgd-t", apgd_t, {"steps": steps, "targets": apgd_targets}))
    stages.append(Stage("fab-t", fab_t, {"steps": steps, "targets": fab_targets}))
    stages.append(Stage("square", square, {"queries": queries}))
    reduced = (steps, queries, targets) != (STEPS, QUERIES, TARGETS)
    label = f"not standard: steps={steps}, queries={queries}, targets={targets}" if reduced else "standard"
    if classes < 4:
        label += f", without apgd-t, whose loss needs 4 classes (the model has {classes})"
    elif classes <= TARGETS:
        label += f", with all {classes - 1} other classes as targets"
    return Cascade(label, tuple(stages))


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Let the authors' checks look at the model: randomised, dynamic, or probabilities for logits. They warn."""
    x, y = x[:_CHECKED], y[:_CHECKED]
    tracing = sys.gettrace()
    with borrowed(model):
        checks.check_randomized(model, x, y)
        checks.check_range_output(model, x)
        try:
            with torch.no_grad():
                checks.check_dynamic(model, x)
        finally:  # it leaves no tracer behind, not even a debugger's
            sys.settrace(tracing)


def _run(attack: Callable[[Callable[[Tensor], Tensor]], Any], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Build the authors' object and let it attack. They seed the global generators, which come back as they were."""
    devices = [x.device] if x.is_cuda else []
    with borrowed(model), torch.no_grad(), torch.random.fork_rng(devices):
        # they compute in single precision, whatever the model's
        found = attack(lambda images: model(images.to(x.dtype)).to(images.dtype)).perturb(x.float(), y)
    return found.to(x.dtype)


@torch.no_grad()
def _classes(model: nn.Module, x: Tensor) -> int:
    with borrowed(model):
        return model(x[:1]).shape[1]
