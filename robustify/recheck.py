"""Verdicts again, from the adversarial images that an evaluation kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from robustify import flips
from robustify.attacks import AttackSpec
from robustify.data import Split
from robustify.distributed import World
from robustify.distributional import search_name
from robustify.evaluation import model_digest, sample
from robustify.measure import Run, Tell, check_budget, measure_clean, withstands
from robustify.modes import full_precision
from robustify.pieces import facts_of, pieces_of
from robustify.report import Report, Row
from robustify.threat import NORMS, Norm, ThreatModel


@full_precision()
def recheck(
    model: nn.Module, split: Split, report: Report, folder: Path, *, workers: int = 0, tell: Tell | None = None
) -> dict[str, int]:
    """Return for each pointwise row's key how many verdicts differ from the report's: 0 everywhere when all is sound.

    Of a knapsack's row it is how many flips of its search do not hold. folder: what `pieces.finish` kept. Every stored
    image is checked against its budget or distance and classified again, in full precision and in the same batches.
    Raises UserError when there are no images, or the model or data are others.
    """
    facts = facts_of(folder)
    chosen = sample(len(split), facts["n"], facts["seed"])
    tell = tell or (lambda stage, done, total: None)
    run = Run(model, split, chosen, facts["batch_size"], facts["seed"], World(), tell, model, workers)
    clean = measure_clean(run)
    held: dict[str, np.ndarray] = {}
    changed: dict[str, int] = {}
    for piece in pieces_of(folder, {"model": model_digest(model), "data": clean.data}):
        if "search" in piece:
            broken = _broken(run, piece)
            for row in report.rows:
                if row.threat and row.attack.startswith("knapsack") and _search_of(row) == str(piece["search"]):
                    changed[row.key] = changed.get(row.key, 0) + broken
        if "row" not in piece:  # it moved the whole set at once
            continue
        key = str(piece["row"])
        right = held.setdefault(key, clean.right.copy())
        right[piece["rows"]] &= _again(run, piece)
    return {key: int((right != report.verdicts[key]).sum()) for key, right in held.items()} | changed


def _search_of(row: Row) -> str:
    return search_name(AttackSpec("knapsack", row.settings), ThreatModel.parse(str(row.threat)).norm)


def _broken(run: Run, piece: Mapping[str, np.ndarray]) -> int:
    """How many flips of a batch are not where they were found, or none."""
    ((x, y),) = run.read([piece["rows"]])
    norm: Norm = next(norm for norm in NORMS if str(piece["search"]).endswith(f" {norm}"))
    distances, images = (torch.from_numpy(piece[what]).to(x.device) for what in ("distance", "x_adv"))
    return int((~flips.recheck(run.model, x, y, flips.Flips(distances, images, norm), len(x))).sum())


def _again(run: Run, piece: Mapping[str, np.ndarray]) -> np.ndarray:
    ((x, y),) = run.read([piece["rows"]])
    x_adv = x.clone()
    x_adv[torch.from_numpy(piece["moved"]).to(x.device)] = torch.from_numpy(piece["x_adv"]).to(x.device)
    check_budget(x, x_adv, ThreatModel.parse(str(piece["threat"])))
    return withstands(run.model, x_adv, y).cpu().numpy()
