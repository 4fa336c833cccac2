"""The pictures of a model card, where matplotlib is there to draw them: accuracies, the training, gradients."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from robustify import plots
from robustify.data import Data
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.modes import borrowed
from robustify.report import Report

PUBLIC = ("digits", "cifar10", "cifar100")  # whose images may stand on a card; a folder's may be private
ROWS = 6


@dataclass(frozen=True)
class Gallery:
    """Some test images with their classes, and the loss's gradient in their pixels before the training."""

    x: Tensor
    y: Tensor
    before: Tensor
    labels: list[str]

    @classmethod
    def begin(cls, model: nn.Module, data: Data) -> Gallery | None:
        """Return the first test images of a public data set with their gradients; None for others.

        Costs a forward and a backward pass on six images.
        """
        if data.name not in PUBLIC or not drawable():
            return None
        x, y = data.test.batch(range(min(ROWS, len(data.test))))
        x, y = x.to(next(model.parameters()).device), y.to(next(model.parameters()).device)
        names = data.class_names or [str(k) for k in range(data.num_classes)]
        return cls(x, y, gradient(model, x, y), [names[int(k)] for k in y])


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the cross entropy in the images, [N, C, H, W]."""
    with borrowed(model):
        return input_gradient(model, x, lambda logits: ce(logits, y))[0]


def draw(
    folder: Path, before: Report, after: Report, metrics: Path, gallery: Gallery | None, model: nn.Module
) -> None:
    """Draw accuracy.png, training.png and gradients.png into `folder`; nothing without matplotlib.

    metrics: the run's metrics.jsonl. gallery: of the model before the training; model: after it.
    """
    if not drawable():
        return
    if {row.key for row in before.rows} & {row.key for row in after.rows}:
        plots.before_after(folder / "accuracy.png", before, after)
    epochs = _epochs(metrics)
    if len(epochs) > 1:
        held_out = {"clean": [e["clean"] for e in epochs], epochs[0]["probe"]: [e["robust"] for e in epochs]}
        plots.training(folder / "training.png", [e["epoch"] for e in epochs], held_out)
    if gallery is not None:
        columns = {"image": gallery.x, "gradient before": gallery.before}
        columns["gradient after"] = gradient(model, gallery.x, gallery.y)
        arrays: dict[str, np.ndarray] = {name: values.cpu().numpy() for name, values in columns.items()}
        plots.gallery(folder / "gradients.png", arrays, gallery.labels, gradients=list(columns)[1:])


def _epochs(metrics: Path) -> list[dict]:
    """The lines of metrics.jsonl that hold an epoch's held-out accuracies."""
    lines = metrics.read_text(encoding="utf8").splitlines() if metrics.is_file() else []
    return [line for line in map(json.loads, lines) if "robust" in line]
