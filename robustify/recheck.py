"""Verdicts again, from the adversarial images that an evaluation kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from robustify.data import Split
from robustify.distributed import World
from robustify.evaluation import model_digest, sample
from robustify.measure import Run, Tell, check_budget, measure_clean, withstands
from robustify.pieces import facts_of, pieces_of
from robustify.report import Report
from robustify.threat import ThreatModel


def recheck(
    model: nn.Module, split: Split, report: Report, folder: Path, *, workers: int = 0, tell: Tell | None = None
) -> dict[str, int]:
    """Return for each pointwise row's key how many verdicts differ from the report's: 0 everywhere when all is sound.

    folder: what `pieces.finish` kept. Every stored image is checked against its budget and classified again, in full
    precision and in the same batches. Raises UserError when there are no images, or the model or data are others.
    """
    facts = facts_of(folder)
    chosen = sample(len(split), facts["n"], facts["seed"])
    tell = tell or (lambda stage, done, total: None)
    run = Run(model, split, chosen, facts["batch_size"], facts["seed"], World(), tell, model, workers)
    clean = measure_clean(run)
    held: dict[str, np.ndarray] = {}
    for piece in pieces_of(folder, {"model": model_digest(model), "data": clean.data}):
        if "row" not in piece:  # a distributional attack's
            continue
        key = str(piece["row"])
        right = held.setdefault(key, clean.right.copy())
        right[piece["rows"]] &= _again(run, piece)
    return {key: int((right != report.verdicts[key]).sum()) for key, right in held.items()}


def _again(run: Run, piece: Mapping[str, np.ndarray]) -> np.ndarray:
    ((x, y),) = run.read([piece["rows"]])
    x_adv = x.clone()
    x_adv[torch.from_numpy(piece["moved"]).to(x.device)] = torch.from_numpy(piece["x_adv"]).to(x.device)
    check_budget(x, x_adv, ThreatModel.parse(str(piece["threat"])))
    return withstands(run.model, x_adv, y).cpu().numpy()
