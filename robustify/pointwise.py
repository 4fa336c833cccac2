"""The row of a pointwise attack: every image on its own, batch by batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustify.attacks.cascade import Cascade, Stage
from robustify.flips import distance
from robustify.measure import Clean, Passes, Run, check_budget, counted, gathered, kept_images, withstands
from robustify.pieces import Arrays
from robustify.report import Row
from robustify.threat import ThreatModel


def pointwise(
    run: Run, name: str, cascade: Cascade, settings: dict[str, Any], threat: ThreatModel, clean: Clean
) -> tuple[Row, np.ndarray, np.ndarray]:
    """The row of a pointwise attack, whether each image withstands it, and the size of what fooled it."""
    held, distance = clean.right.copy(), np.where(clean.right, np.inf, 0).astype(np.float32)
    forward, backward, seconds = 0.0, 0.0, 0.0
    left: list[int] = []
    for index, stage in enumerate(cascade.stages):
        active = np.flatnonzero(held)
        lists = run.lists(active)
        done = list(_attacked(run, f"{name} {threat.spec} {index}", stage, threat, lists))
        held[active] = gathered(run.world, [torch.from_numpy(piece["held"]) for piece in done], torch.bool)
        distance[active] = gathered(run.world, [torch.from_numpy(piece["distance"]) for piece in done], torch.float32)
        spent = [sum(float(piece[what]) for piece in done) for what in ("forward", "backward", "seconds")]
        total = run.world.sum(torch.tensor(spent, dtype=torch.float64, device=run.device)).tolist()
        forward, backward, seconds = forward + total[0], backward + total[1], seconds + total[2] / run.world.size
        run.warned += [str(text) for piece in done for text in piece["warnings"]]
        left.append(int(held.sum()))
    settings = dict(settings)
    if cascade.label:
        settings |= {"version": cascade.label, "stages": [str(stage) for stage in cascade.stages], "left": left}
    if run.search is not run.model:
        settings["search"] = "bf16"
    passes = Passes(int(forward), int(backward)).per_image(len(held))
    return Row(name, threat.spec, len(held), left[-1], settings, passes, seconds), held, distance


def _attacked(run: Run, name: str, stage: Stage, threat: ThreatModel, lists: Sequence[np.ndarray]) -> Iterator[Arrays]:
    """This process's batches, attacked now or by a run before; see `_attack` for what each holds, but for the images."""
    mine = run.mine(len(lists))
    known = {number for number in mine if run.pieces and f"{name} {number}" in run.pieces}
    images = run.read([lists[number] for number in mine if number not in known])
    for done, number in enumerate(mine, start=1):
        if run.pieces and number in known:
            piece = run.pieces.read(f"{name} {number}")
        else:
            piece = _attack(run, stage, threat, number, *next(images))
            piece |= {"rows": lists[number], "row": np.array(name.rpartition(" ")[0])}
            piece |= {"threat": np.array(threat.spec), "norm": np.array(threat.norm)}
            if run.pieces:
                run.pieces.write(f"{name} {number}", piece)
        run.tell(f"{stage.name} {threat}", done, len(mine))
        yield {what: value for what, value in piece.items() if what not in ("moved", "x_adv")}


def _attack(run: Run, stage: Stage, threat: ThreatModel, number: int, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Attack one batch: held bool [b], distance float32 [b], passes, seconds, warnings; on request what moved."""
    begin = time.perf_counter()
    with counted(*{run.model, run.search, *stage.through}) as passes, heard() as texts:
        x_adv = stage.attack(run.search, x, y, threat, run.seed, number)
        check_budget(x, x_adv, threat)
        held = withstands(run.model, x_adv, y)
    size = distance(x_adv, x, threat.norm).float().masked_fill(held, torch.inf)
    piece = {
        "held": held.cpu().numpy(),
        "distance": size.cpu().numpy(),
        "warnings": np.array(texts, dtype=str),
        "forward": np.array(passes.forward),
        "backward": np.array(passes.backward),
        "seconds": np.array(time.perf_counter() - begin),
    }
    if run.keep:
        piece |= kept_images(x, x_adv)
    return piece


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what pyautoattack warns of, by its bare category; every other warning goes on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for warning in caught:
        if warning.category is Warning:
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
