"""Signs that the numbers of an evaluation mean less than they seem to: each is a note with its evidence.

Gradient masking makes a model look robust (Athalye et al., ICML 2018, section 3.1; Carlini et al. 2019, arXiv
1902.06705): one step beats many, black box beats white box, unbounded attacks fail, gradients are zero.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robustify.attacks.ascent import ascend
from robustify.errors import UserError
from robustify.gradients import input_gradient
from robustify.intervals import percent
from robustify.losses import ce
from robustify.modes import borrowed
from robustify.readings import others
from robustify.report import Row

IMAGES = 64  # that the checks look at
LARGE = 0.5  # Linf radius at which every image can be made grey
_STEPS = 20
_SLACK = 0.002  # of accuracy: what pyautoattack's own check allows Square to gain
_FEW = 3  # images more or less are no sign of anything
_ENOUGH = 20  # images of which a share says something
_MANY = 0.1  # share of images that is no accident
_DIFFERENT = 1e-4  # of the largest logit: beyond rounding


def probabilities(logits: Tensor) -> bool:
    """Whether every row is non-negative and sums to one."""
    return bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return a digest of each weight and buffer, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    raw = {name: t.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for name, t in tensors.items()}
    return {name: digest(data.numpy().tobytes()) for name, data in raw.items()}


def digest(data: bytes) -> str:
    """Return 16 hex digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise UserError when a weight or buffer changed: then every image met another model."""
    changed = [name for name in after if after[name] != before.get(name)]
    if changed:
        raise UserError(
            f"the model changed while it was evaluated: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}",
            "its forward pass writes into them even in eval mode; statistics and caches must be frozen to be measured",
        )


def of_clean(row: Row, classes: int) -> list[str]:
    """Notes on the clean accuracy alone."""
    chance = 1 / classes
    if row.accuracy > chance + 3 * (chance * (1 - chance) / row.n) ** 0.5:
        return []
    return [
        f"Clean accuracy {percent(row.accuracy)} is no better than chance ({classes} classes): does the model expect "
        "normalised images (give mean and std), another order of the classes, or another size?"
    ]


def of_rows(rows: Sequence[Row], verdicts: Mapping[str, np.ndarray]) -> list[str]:
    """Notes on weak attacks that beat strong ones on the same images, by more than a few of them."""
    notes = []
    for threat in dict.fromkeys(row.threat for row in rows if row.kind == "pointwise"):
        named: dict[str, list[Row]] = {}
        for row in rows:
            if row.threat == threat and row.kind == "pointwise":
                named.setdefault(row.attack.partition(":")[0], []).append(row)
        for pgd in named.get("pgd", []):
            for fgsm in named.get("fgsm", []):
                if _beats(fgsm.correct, pgd.correct, pgd.n):
                    only = int((verdicts[pgd.key] & ~verdicts[fgsm.key]).sum())
                    notes.append(
                        f"One step (FGSM, {percent(fgsm.accuracy)}) beats many (PGD, {percent(pgd.accuracy)}) under "
                        f"{threat}, and fools {only} images that PGD does not: a sign of gradient masking."
                    )
        names = ("pgd", "apgd-ce", "apgd-t", "fab-t", "screen")
        white = [(row.correct, row.attack) for name in names for row in named.get(name, [])]
        for row in named.get("autoattack", []):
            left = row.settings["left"]
            if len(left) == len(row.settings["stages"]) and len(left) > 1:
                notes += _black_beats_white(row, "Square", left[-1], (left[-2], "the three before it"))
                white.append((left[-2], "AutoAttack's white-box attacks"))
        for row in named.get("square", []) if white else []:
            notes += _black_beats_white(row, "Square", row.correct, min(white))
        for row in named.get("transfer", []) if white else []:
            right = percent(row.settings["surrogate_accuracy"])
            source = f"Transfer from {row.settings['surrogate']} (itself {right} on the first clean images)"
            notes += _black_beats_white(row, source, row.correct, min(white))
    return notes


def _beats(weak: float, strong: float, n: int) -> bool:
    """Whether an attack that should be weaker leaves clearly fewer of n images."""
    return strong - weak >= _FEW and strong - weak > _SLACK * n


def _black_beats_white(row: Row, black: str, left: float, white: tuple[float, str]) -> list[str]:
    """left, white[0]: images that withstand the black-box attack, and the best of the others."""
    if not _beats(left, white[0], row.n):
        return []
    return [
        f"{black}, which sees no gradients of the model, brings {percent(white[0] / row.n)} ({white[1]}) down to "
        f"{percent(left / row.n)} under {row.threat}: a sign of gradient masking. Run it with more queries or steps, or "
        "an attack made for this model."
    ]


@dataclass
class Findings:
    """evidence: what was measured, JSON values, also where all is well. notes: what is wrong."""

    evidence: dict[str, float | int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def of_model(model: nn.Module, x: Tensor, y: Tensor) -> Findings:
    """Look at the model on the first images of a set. Costs at most 28 forward and 20 backward passes on at most 64 images."""
    x, y = x[:IMAGES], y[:IMAGES]
    found = Findings({"images": len(x)})
    with borrowed(model), torch.no_grad():
        logits = model(x)
        _is_a_function(model, x, logits, found)
        right = logits.argmax(1) == y
        _is_read_well(model, x, y, right, found)
        if right.any():
            _gradients_lead_somewhere(model, x[right], y[right], found)
    return found


def _is_a_function(model: nn.Module, x: Tensor, logits: Tensor, found: Findings) -> None:
    """The same image gives the same logits, again and in other company."""
    scale = float(logits.abs().max())
    again = float((model(x) - logits).abs().max()) / max(scale, 1e-12)
    alone = float((model(x[::2]) - logits[::2]).abs().max()) / max(scale, 1e-12)
    found.evidence.update(logits_change_on_repeat=again, logits_change_in_another_batch=alone)
    if again > _DIFFERENT:
        found.notes.append(
            f"The same batch twice gives logits that differ by {percent(again)} of the largest: the model draws random "
            "numbers even in eval mode (dropout left on?). Every verdict is that of one draw, a repeated check may "
            "differ, and AutoAttack's standard version is not valid for it."
        )
    elif alone > _DIFFERENT:
        found.notes.append(
            f"An image's logits change by {percent(alone)} of the largest with the other images of its batch: the "
            "model uses the batch's statistics even in eval mode. The verdicts hold for these batches only."
        )


def _is_read_well(model: nn.Module, x: Tensor, y: Tensor, right: Tensor, found: Findings) -> None:
    """No other normalisation makes it right more often."""
    best, better = others(model, x, y, right)
    if best:
        found.evidence["accuracy_in_another_reading"] = best.accuracy
    if better:
        plain = percent(float(right.double().mean()))
        found.notes.append(
            f"With the normalisation {better} ({better.name}) the accuracy would be {percent(better.accuracy)} instead of "
            f"{plain} (first {len(x)} images): either the model expects that (give its mean and std), or these images are "
            "unlike those it was trained on."
        )


def _gradients_lead_somewhere(model: nn.Module, x: Tensor, y: Tensor, found: Findings) -> None:
    """PGD without a budget worth the name must fool everything, and climb on the way."""
    losses, zeros, wrong = [], [], []

    def gradient(x_adv: Tensor, _: int) -> Tensor:
        g, logits, loss = input_gradient(model, x_adv, lambda logits: ce(logits, y))
        losses.append(loss)
        zeros.append(g.flatten(1).abs().amax(1) == 0)
        wrong.append(logits.argmax(1) != y)
        return g

    x_adv = ascend(gradient, x, x, norm="Linf", radius=LARGE, steps=_STEPS, step=2.5 * LARGE / _STEPS)
    standing = ~torch.stack([*wrong, model(x_adv).argmax(1) != y]).any(0)
    stands = float(standing.double().mean())
    stuck = float((standing & (losses[-1] <= losses[0])).double().mean())
    none = float(zeros[0].double().mean())
    found.evidence.update(accuracy_at_large_eps=stands, zero_gradients=none, iterates_not_improving=stuck)
    if len(x) < _ENOUGH:
        return
    if none > _MANY:
        found.notes.append(
            f"The gradient of the cross entropy is exactly zero on {percent(none)} of {len(x)} images: saturated "
            "logits or a step that is not differentiable. Attacks on the cross entropy say nothing there; take apgd-t, "
            "fab-t and square."
        )
    if stands > _MANY / 2:
        found.notes.append(
            f"PGD with a radius of Linf {LARGE:g}, where any image can be made grey, leaves {percent(stands)} of "
            f"{len(x)} correctly classified images standing: a sign of gradient masking."
        )
    if stuck > _MANY:
        found.notes.append(
            f"{_STEPS} steps of PGD did not raise the loss of {percent(stuck)} of {len(x)} images: a sign of gradient "
            "masking."
        )


def of_warnings(texts: Sequence[str], source: str) -> list[str]:
    """One note for each kind of warning that `source` gave; kinds differ by more than their numbers."""
    kinds: dict[str, list[str]] = {}
    for text in texts:
        text = re.sub(r"tensor\((\d+)[^)]*\)", r"\1", text)
        kinds.setdefault(re.sub(r"\d+", "", text), []).append(text)
    return [f"{source} warned{f' {len(same)} times' if len(same) > 1 else ''}: {same[0]}" for same in kinds.values()]
