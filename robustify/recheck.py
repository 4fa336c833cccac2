"""Verdicts again, from the adversarial images that an evaluation kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from robustify.attacks import AttackSpec
from robustify.data import Split
from robustify.distributed import World
from robustify.distributional import search_name
from robustify.errors import UserError
from robustify.evaluation import model_digest, sample
from robustify.flips import distance
from robustify.measure import Run, Tell, check_budget, check_range, measure_clean, withstands
from robustify.modes import full_precision
from robustify.pieces import Arrays, differences, facts_of, pieces_of
from robustify.report import Report, Row
from robustify.threat import Norm, ThreatModel

_SAME = 1e-6  # relative: distances are stored in single precision


@full_precision()
def recheck(
    model: nn.Module, split: Split, report: Report, folder: Path, *, workers: int = 0, tell: Tell | None = None
) -> dict[str, int]:
    """Return for each row's key how many verdicts differ from the report's: 0 everywhere when all is sound.

    Of a knapsack's row it is for how many images the nearest flip, over its own search and the other attacks, is not where the
    report says. folder: what `pieces.finish` kept of this report. Every stored image is checked against its budget and
    classified again, in full precision and in the same batches. Raises UserError when there are no images, when they are
    another report's or break their budget, and when the model or data are others.
    """
    facts = facts_of(folder)
    other = differences(facts, report.facts) if report.facts else "evaluation: the report does not say what it measured"
    if other:
        message = f"the images in {folder} are not those of the report; they are of another {other}"
        raise UserError(message, "give the report that they were kept for, or evaluate again and keep them")
    tell = tell or (lambda stage, done, total: None)
    chosen = sample(len(split), facts["n"], facts["seed"])
    run = Run(model, split, chosen, facts["batch_size"], facts["seed"], World(), tell, model, workers)
    measured = measure_clean(run)
    clean = measured.right
    held: dict[str, np.ndarray] = {}  # of a row's key, or of a search's name
    nearest: dict[str, np.ndarray] = {}
    for piece in pieces_of(folder, {"model": model_digest(model), "data": measured.data}):
        key, rows = str(piece["row"]), piece["rows"]
        stands, size = _again(run, piece)
        held.setdefault(key, clean.copy())[rows] &= stands
        known = nearest.setdefault(key, np.where(clean, np.inf, 0))
        known[rows] = np.minimum(known[rows], size)
        tell(f"again: {key}", int(rows.max()) + 1, len(chosen))

    def changed(row: Row) -> int:
        if row.attack.partition(":")[0] != "knapsack":
            return int((held.get(row.key, clean) != report.verdicts[row.key]).sum())
        norm = ThreatModel.parse(str(row.threat)).norm
        search = search_name(AttackSpec("knapsack", row.settings), norm)
        others = [r.key for r in report.rows if r.threat and ThreatModel.parse(r.threat).norm == norm]
        flips = np.minimum.reduce([nearest[key] for key in (search, *others) if key in nearest])
        return int((~np.isclose(flips, report.distances[row.key], rtol=_SAME, atol=0)).sum())

    return {row.key: changed(row) for row in report.rows}


def _again(run: Run, piece: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image of a piece withstands what is stored for it, and how far it was moved if not, else inf."""
    parts = list(run.read(run.lists(piece["rows"])))
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    x_adv = x.clone()
    x_adv[torch.from_numpy(piece["moved"]).to(x.device)] = torch.from_numpy(piece["x_adv"]).to(x.device)
    norm: Norm = str(piece["norm"])  # pyright: ignore[reportAssignmentType]
    try:
        check_range(x_adv)
        if "threat" in piece:
            check_budget(x, x_adv, ThreatModel.parse(str(piece["threat"])))
    except AssertionError as error:
        raise UserError(f"the images kept for {piece['row']} are not as they were: {error}", "evaluate again") from error
    batches = zip(x_adv.split(run.batch_size), y.split(run.batch_size), strict=True)
    stands = torch.cat([withstands(run.model, *batch) for batch in batches])
    size = distance(x_adv, x, norm).masked_fill(stands, torch.inf)
    return stands.cpu().numpy(), size.cpu().numpy()
