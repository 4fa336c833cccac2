"""The rows of distributional attacks, whose budget all images share.

W-PGD moves the whole set at once. The knapsack buys flips that are known, so one search serves every radius of a norm.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustify import flips
from robustify.attacks import AttackSpec
from robustify.knapsack import worst_accuracy
from robustify.measure import Passes, Run, check_budget, counted, gathered, kept_images, withstands
from robustify.pieces import Arrays
from robustify.report import Row
from robustify.threat import Norm, ThreatModel, per_image


def moved_together(
    run: Run, name: str, spec: AttackSpec, threat: ThreatModel, clean: np.ndarray
) -> tuple[Row, np.ndarray, np.ndarray]:
    """The row of an attack that moves the whole set at once, whether each image withstands, and how far what fell went.

    It is one piece: all of it is stored, or nothing.
    """
    begin = time.perf_counter()
    if run.pieces and f"{name} {threat.spec}" in run.pieces:
        piece = run.pieces.read(f"{name} {threat.spec}")
    else:
        with counted(run.model) as passes:
            held, size, images = _whole_set(run, spec, threat)
        spent = torch.tensor([passes.forward, passes.backward], device=run.device, dtype=torch.float64)
        forward, backward = run.world.sum(spent).tolist()
        piece = {
            "held": held & clean,
            "distance": np.where(held, np.inf, size).astype(np.float32),
            "row": np.array(f"{name} {threat.spec}"),
            "rows": np.arange(len(clean)),
            "threat": np.array(threat.spec),
            "norm": np.array(threat.norm),
            **images,
            "forward": np.array(forward),
            "backward": np.array(backward),
            "seconds": np.array(time.perf_counter() - begin),
        }
        if run.pieces and run.world.is_main:
            run.pieces.write(f"{name} {threat.spec}", piece)
    held, n = piece["held"], len(clean)
    passes = Passes(int(piece["forward"]), int(piece["backward"])).per_image(n)
    row = Row(name, threat.spec, n, int(held.sum()), spec.settings, passes, float(piece["seconds"]), "distributional")
    return row, held, piece["distance"]


def _whole_set(
    run: Run, spec: AttackSpec, threat: ThreatModel
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Whether each image withstands, how far it was moved, and on request the images that moved, of all processes.

    The budget is checked over all of them, too.
    """
    lists = run.lists(np.arange(len(run.chosen)))
    parts = list(run.read([lists[i] for i in run.mine(len(lists))]))
    device = run.device
    x = torch.cat([x for x, _ in parts]) if parts else torch.zeros(0, 1, 1, 1, device=device)
    y = torch.cat([y for _, y in parts]) if parts else torch.zeros(0, dtype=torch.int64, device=device)
    with _told(run, f"{spec.name} {threat}", (spec.settings.get("steps", 1) + 1) * len(parts)):
        x_adv = spec.info.run(
            run.model, x, y, threat=threat, batch_size=run.batch_size, reduce=run.world.sum, **spec.settings
        )
    check_budget(x, x_adv, threat, run.world)
    steps = range(0, len(x), run.batch_size)
    found = [withstands(run.model, x_adv[i : i + run.batch_size], y[i : i + run.batch_size]).cpu() for i in steps]
    sizes = [flips.distance(x_adv, x, threat.norm).cpu()]
    mine = kept_images(x, x_adv) if run.keep else {}
    images = {what: run.world.gather(torch.from_numpy(part)).numpy() for what, part in mine.items()}
    return gathered(run.world, found, torch.bool), gathered(run.world, sizes, torch.float64), images


@dataclass
class Search:
    """Flip distances of all images, float32 [n], and what it cost to find them."""

    distances: np.ndarray
    passes: Passes
    seconds: float


def search(run: Run, spec: AttackSpec, norm: Norm, clean: np.ndarray, classes: int) -> Search:
    """Search every image's nearest flip: 0 where the clean image is wrong, inf where none is found. A batch is a piece."""
    lists = run.lists(np.arange(len(run.chosen)))
    mine, name = run.mine(len(lists)), search_name(spec, norm)
    known = [number for number in mine if run.pieces and f"{name} {number}" in run.pieces]
    images = run.read([lists[number] for number in mine if number not in known])
    done = []
    with _told(run, f"{spec.name} {norm}", flips.passes(classes, **spec.settings) * (len(mine) - len(known))):
        for number in mine:
            if run.pieces and number in known:
                done.append(run.pieces.read(f"{name} {number}"))
                continue
            piece = {**_search_batch(run, spec, norm, *next(images)), "row": np.array(name), "rows": lists[number]}
            if run.pieces:
                run.pieces.write(f"{name} {number}", piece)
            done.append({what: value for what, value in piece.items() if what not in ("moved", "x_adv")})
    found = gathered(run.world, [torch.from_numpy(piece["distance"]) for piece in done], torch.float64)
    spent = [sum(float(piece[what]) for piece in done) for what in ("forward", "backward", "seconds")]
    forward, backward, seconds = run.world.sum(torch.tensor(spent, dtype=torch.float64, device=run.device)).tolist()
    distances = np.where(clean, found, 0).astype(np.float32)
    return Search(distances, Passes(int(forward), int(backward)), seconds / run.world.size)


def search_name(spec: AttackSpec, norm: Norm) -> str:
    """What names a search and its pieces: rows of the same name share it."""
    return f"flips {spec} {norm}"


def _search_batch(run: Run, spec: AttackSpec, norm: Norm, x: Tensor, y: Tensor) -> Arrays:
    """Search one batch; a flip that a forward pass of its own does not confirm is none."""
    begin = time.perf_counter()
    with counted(run.model) as passes:
        found = flips.flip_batch(run.model, x, y, norm=norm, seed=run.seed, **spec.settings)
        holds = flips.recheck(run.model, x, y, found, batch_size=len(x))
    piece = {
        "distance": torch.where(holds, found.distances, torch.inf).cpu().numpy(),
        "forward": np.array(passes.forward),
        "backward": np.array(passes.backward),
        "seconds": np.array(time.perf_counter() - begin),
        "norm": np.array(norm),
    }
    return piece | kept_images(x, torch.where(per_image(holds, x), found.images, x)) if run.keep else piece


def bought(
    name: str, spec: AttackSpec, threat: ThreatModel, found: Search, nearest: np.ndarray
) -> tuple[Row, np.ndarray]:
    """The row of a knapsack, and the flip distances it buys at, float32 [n]: the search's, or `nearest` where nearer.

    nearest: by which other attacks of this report flipped each image, [n]. So it leaves no more than any of them.
    """
    distances = np.minimum(found.distances, nearest).astype(np.float32)
    n = len(distances)
    correct = n * worst_accuracy(distances, threat.eps, threat.p if threat.p is not None else np.inf)
    cost = found.passes.per_image(n)
    return Row(name, threat.spec, n, correct, spec.settings, cost, found.seconds, "distributional"), distances


@contextmanager
def _told(run: Run, stage: str, total: int) -> Iterator[None]:
    """Tell the forward passes of the model as progress towards about so many."""
    done = itertools.count(1)
    hook = run.model.register_forward_hook(lambda *_: run.tell(stage, min(next(done), total), total))
    try:
        yield
    finally:
        hook.remove()
