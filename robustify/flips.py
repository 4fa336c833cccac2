"""Flip distances: how far each image must move, in the norm of the threat, before the model errs.

A minimum-norm search in the manner of FMN (Pintor et al., NeurIPS 2021, section 3): every image climbs within a radius
of its own, which shrinks below the image's distance where the model errs and grows where it does not. One run per
runner-up class: a single loss gets stuck on the nearest one (Croce and Hein, ICML 2020, section 4, of FAB and APGD).
Every distance is that of an image in hand which the model misclassifies, so it is an upper bound of the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustify.errors import UserError
from robustify.gradients import input_gradient
from robustify.losses import margin
from robustify.modes import borrowed, full_precision
from robustify.rng import Draws, mix
from robustify.threat import LARGEST_RADIUS, Norm, dual_norms, norms, per_image, project, steepest, uniform_in_ball

Tell = Callable[[int, int], None]
STEP = (1.0, 0.01)  # of the radius, at the first and at the last step of a run
CHANGE = (0.2, 0.001)  # share by which the radius shrinks or grows, at the first and at the last step
FIRST_RADIUS = 1.5  # times the distance at which a linear model would flip
HALVINGS = 10  # of the way back to the clean image, at the end
SURE = 1e-5  # a margin counts from this share of the largest logit on: another batch order rounds differently


@dataclass(frozen=True)
class Flips:
    """The nearest misclassified image found for each image.

    distances: [N] float64, ||images - x|| in `norm`; 0 where x itself is misclassified, inf where nothing was found.
    images:    [N, ...] in [0,1]; x itself where the distance is 0 or inf.
    """

    distances: Tensor
    images: Tensor
    norm: Norm


@full_precision()
def flip_distances(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm,
    largest: float | None = None,
    steps: int = 40,
    targets: int = 5,
    restarts: int = 3,
    batch_size: int = 256,
    seed: int = 0,
    candidates: Sequence[Tensor] = (),
    tell: Tell | None = None,
) -> Flips:
    """Return the smallest distance found at which each image flips, and the flipped images.

    x: [N, ...] in [0,1]; y: [N]. norm: Linf or L2. largest: radius at which the search gives up; by default that of the
    whole pixel range. steps: of one run; targets: runner-up classes attacked in turn, from the image itself; restarts:
    further runs against the class that came nearest, from the nearest image found and from random points in turns.
    candidates: images of other attacks, each [N, ...]: what they flip at a smaller distance wins. tell(done, total) in
    images. Deterministic in seed and batch_size. Spends about steps * (targets + restarts) forward and backward passes
    per correctly classified image. Raises UserError for L1, where steepest ascent moves one pixel at a time.
    """
    parts = []
    for i in range(0, len(x), batch_size):
        rows = slice(i, i + batch_size)
        parts.append(
            flip_batch(
                model,
                x[rows],
                y[rows],
                norm=norm,
                largest=largest,
                steps=steps,
                targets=targets,
                restarts=restarts,
                seed=seed,
                candidates=[images[rows] for images in candidates],
            )
        )
        if tell:
            tell(min(i + batch_size, len(x)), len(x))
    if not parts:
        return Flips(torch.zeros(0, dtype=torch.float64, device=x.device), x, norm)
    return Flips(torch.cat([part.distances for part in parts]), torch.cat([part.images for part in parts]), norm)


def flip_batch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm,
    largest: float | None = None,
    steps: int = 40,
    targets: int = 5,
    restarts: int = 3,
    seed: int = 0,
    candidates: Sequence[Tensor] = (),
) -> Flips:
    """The same for one batch, whose random starts depend on seed and its images: on any process they are the same."""
    if norm not in ("Linf", "L2"):
        raise UserError(f"flip distances are searched in Linf and L2, not in {norm}", "take W2-Linf:8/255 or W2-L2:0.5")
    largest = largest if largest is not None else LARGEST_RADIUS[norm]
    draws = Draws(mix(seed, crc32(x.cpu().numpy().tobytes())), x.device)
    with borrowed(model):
        search = _Search(model, x, y, norm, largest)
        search.shorten(candidates)
        target = search.classes[:, 0].clone()
        for k in range(min(targets, search.classes.shape[1])):
            nearer = search.run(search.classes[:, k], steps, x)
            target = torch.where(nearer, search.classes[:, k], target)
        for k in range(restarts):
            reach = search.distances.clamp_max(largest).to(x.dtype)
            random = (x + uniform_in_ball(x, norm, reach, draws)).clamp(0, 1)
            search.run(target, steps, search.images if k % 2 == 0 else random)
        search.shorten([search.images.clone()])
        return search.confirmed()


def passes(classes: int, *, steps: int = 40, targets: int = 5, restarts: int = 3) -> int:
    """Return how many forward passes `flip_batch` and `recheck` make over a batch of images that all are correct."""
    return (min(targets, classes - 1) + restarts) * (steps + 1) + (HALVINGS + 1) + 3


def recheck(model: nn.Module, x: Tensor, y: Tensor, flips: Flips, batch_size: int = 256) -> Tensor:
    """Return bool [N]: does each entry hold? Its image lies in [0,1], at its distance, and is misclassified.

    An image without a flip (distance inf) holds when it is classified correctly as it is.
    """
    wrong = []
    with borrowed(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            rows = slice(i, i + batch_size)
            wrong.append(model(flips.images[rows]).argmax(1) != y[rows])
    flipped = torch.cat(wrong) if wrong else torch.zeros(0, dtype=torch.bool, device=x.device)
    found = torch.isfinite(flips.distances)
    at = distance(flips.images, x, flips.norm)
    inside = ((flips.images >= 0) & (flips.images <= 1)).flatten(1).all(1)
    return inside & (flipped == found) & torch.where(found, at == flips.distances, at == 0)


def distance(images: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Return ||images - x||, [N] float64, as exact as the images are."""
    return norms(images.double() - x.double(), norm)


class _Search:
    """The nearest flips of one batch so far; model borrowed."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, largest: float) -> None:
        self.model, self.x, self.y, self.largest = model, x, y, largest
        self.norm: Norm = norm
        gradient, logits, losses = input_gradient(model, x, lambda logits: margin(logits, y))
        wrong = logits.argmax(1) != y
        self.images = x.clone()
        self.distances = torch.where(wrong, 0.0, torch.inf).double()
        self.open = torch.nonzero(~wrong)[:, 0]  # the images whose distance is not 0
        tiny = torch.finfo(x.dtype).tiny
        linear = -losses / dual_norms(gradient, norm).clamp_min(tiny)  # exact for a linear model
        self.linear = linear.to(x.dtype).clamp(largest * 1e-6, largest)
        label = F.one_hot(y, logits.shape[1]).bool()
        others = logits.masked_fill(label, -torch.inf)
        self.classes = others.argsort(1, descending=True)[:, :-1]  # [N, C-1], the runner-up first

    def offer(self, rows: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """Keep the images that flip at a smaller distance than known; return where the model errs, [rows]."""
        label = self.y[rows]
        wrong = (margin(logits, label) > SURE * logits.abs().amax(1)) & (logits.argmax(1) != label)
        at = distance(images, self.x[rows], self.norm)
        better = wrong & (at < self.distances[rows]) & (at <= self.largest)
        self.distances[rows[better]] = at[better]
        self.images[rows[better]] = images[better]
        return wrong

    def run(self, target: Tensor, steps: int, start: Tensor) -> Tensor:
        """Climb towards the classes `target`, [N], from `start`; return which images came nearer than before, [N]."""
        before = self.distances.clone()
        rows = self.open
        if not len(rows):
            return before < before
        x, label, towards, moved = self.x[rows], self.y[rows, None], target[rows, None], start[rows]
        radius = torch.where(torch.isfinite(before[rows]), before[rows].to(x.dtype), FIRST_RADIUS * self.linear[rows])

        def objective(logits: Tensor) -> Tensor:
            return (logits.gather(1, towards) - logits.gather(1, label))[:, 0]

        for k in range(steps):
            gradient, logits, _ = input_gradient(self.model, moved, objective)
            wrong = self.offer(rows, moved, logits)
            change, step = _cosine(CHANGE, k, steps), _cosine(STEP, k, steps)
            size = norms(moved - x, self.norm)
            radius = torch.where(wrong, torch.minimum(radius, size) * (1 - change), radius * (1 + change))
            radius = torch.minimum(radius, self.distances[rows].to(x.dtype)).clamp_max(self.largest)
            moved = moved + per_image(step * radius, x) * steepest(gradient, self.norm)
            moved = (x + project(moved - x, self.norm, radius)).clamp(0, 1)
        with torch.no_grad():
            self.offer(rows, moved, self.model(moved))
        return self.distances < before

    @torch.no_grad()
    def shorten(self, several: Iterable[Tensor]) -> None:
        """Take the images, several times [N, ...], back towards the clean ones as far as they stay misclassified."""
        rows = self.open
        if not len(rows):
            return
        x = self.x[rows]
        for images in several:
            moved = images[rows]
            self.offer(rows, moved, self.model(moved))
            d = moved - x
            size = norms(d, self.norm)
            low, high = torch.zeros_like(size), torch.ones_like(size)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                closer = (x + project(d, self.norm, middle * size)).clamp(0, 1)
                wrong = self.offer(rows, closer, self.model(closer))
                low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)

    @torch.no_grad()
    def confirmed(self) -> Flips:
        """The result, after a forward pass of its own: what it does not confirm was not found."""
        right = self.model(self.images).argmax(1) == self.y
        lost = right & torch.isfinite(self.distances)
        self.images[lost] = self.x[lost]
        return Flips(torch.where(right, torch.inf, self.distances), self.images, self.norm)


def _cosine(ends: tuple[float, float], k: int, steps: int) -> float:
    """From the first value to the last along half a cosine, at step k of `steps`."""
    return ends[1] + (ends[0] - ends[1]) * (1 + math.cos(math.pi * k / steps)) / 2
