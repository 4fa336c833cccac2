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
from robustify.knapsack import worst_accuracy
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

    An image counts, too, when what fooled it is not as far away as the report says; of a knapsack's row, when the nearest
    flip over its own search and the other attacks is not, and all images when those flips do not buy the row's number.
    folder: what `pieces.finish` kept of this report. Every stored image is checked against its row's budget and classified
    again, in full precision and in the same batches. Raises UserError when there are no images, when they cannot be read,
    are another report's or break their budget, and when the model or data are others.
    """
    for row in report.rows:
        if row.key not in report.distances and (_is_knapsack(row) or row.kind == "pointwise"):
            raise UserError(f"the report holds no distances of {row.key}", "evaluate again and keep the images")
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
    unmoved = np.where(clean, np.inf, 0)
    threats = {row.key: ThreatModel.parse(row.threat) for row in report.rows if row.threat}
    for piece in pieces_of(folder, {"model": model_digest(model), "data": measured.data}):
        try:
            key, rows = str(piece["row"]), piece["rows"]
            stands, size = _again(run, piece, threats.get(key))
        except KeyError as error:  # they were not kept, or by older code
            raise UserError(f"the images in {folder} cannot be read: no {error}", "evaluate again and keep them") from None
        held.setdefault(key, clean.copy())[rows] &= stands
        known = nearest.setdefault(key, unmoved.copy())
        known[rows] = np.minimum(known[rows], size)
        tell(f"again: {key}", int(rows.max()) + 1, len(chosen))

    def changed(row: Row) -> int:
        if not _is_knapsack(row):
            other = held.get(row.key, clean) != report.verdicts[row.key]
            if row.kind == "pointwise":
                other |= _apart(nearest.get(row.key, unmoved), report.distances[row.key])
            return int(other.sum())
        threat = threats[row.key]
        search = search_name(AttackSpec("knapsack", row.settings), threat.norm)
        others = [key for key, other in threats.items() if other.norm == threat.norm]
        flips = np.minimum.reduce([unmoved, *(nearest[key] for key in (search, *others) if key in nearest)])
        distances = report.distances[row.key]
        number = row.n * worst_accuracy(distances, threat.eps, np.inf if threat.p is None else threat.p)
        return int(_apart(flips, distances).sum()) if np.isclose(row.correct, number, rtol=_SAME) else row.n

    return {row.key: changed(row) for row in report.rows}


def _is_knapsack(row: Row) -> bool:
    return row.attack.partition(":")[0] == "knapsack"


def _apart(found: np.ndarray, reported: np.ndarray) -> np.ndarray:
    """Which images' distances differ, bool [n]."""
    return ~np.isclose(found, reported, rtol=_SAME, atol=0)


def _again(run: Run, piece: Arrays, threat: ThreatModel | None) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image of a piece withstands what is stored for it, and how far it was moved if not, else inf.

    threat: of the row that the piece belongs to; a knapsack's search has none. Raises KeyError when the piece lacks a part.
    """
    parts = list(run.read(run.lists(piece["rows"])))
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    x_adv = x.clone()
    x_adv[torch.from_numpy(piece["moved"]).to(x.device)] = torch.from_numpy(piece["x_adv"]).to(x.device)
    norm: Norm = str(piece["norm"])  # pyright: ignore[reportAssignmentType]
    try:
        check_range(x_adv)
        if threat is not None:
            check_budget(x, x_adv, threat)
    except AssertionError as error:
        raise UserError(f"the images kept for {piece['row']} are not as they were: {error}", "evaluate again") from error
    batches = zip(x_adv.split(run.batch_size), y.split(run.batch_size), strict=True)
    stands = torch.cat([withstands(run.model, *batch) for batch in batches])
    size = distance(x_adv, x, norm).masked_fill(stands, torch.inf)
    return stands.cpu().numpy(), size.cpu().numpy()
