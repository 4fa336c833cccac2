"""Other formats of an exported model: ONNX and torch.export, the normalisation inside, compared with the original.

Both take images in [0,1], float32 [N, C, H, W] of any N, and give logits [N, classes]. Other libraries sum in another
order, so the logits agree up to rounding; by how much is written down.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustify import files
from robustify.errors import UserError, reason
from robustify.model_folder import FORMATS

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
CLOSE = 1e-3  # of the largest logit


def check_format(name: str) -> None:
    """Raise UserError for an unknown format, or when its libraries are missing."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}", f"formats: {', '.join(FORMATS)}")
    missing = [module for module in NEEDED[name] if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)}", "pip install 'robustify[onnx]'")


def write_format(name: str, model: nn.Module, x: Tensor, folder: Path) -> dict[str, Any]:
    """Write `model` as onnx or pt2 into `folder`, load the file, and compare. Returns what the comparison found.

    model: on the CPU, in eval mode, images in [0,1] to logits. x: images to compare on, [N, C, H, W], N >= 2. The result
    says on how many images, by how much the logits differ at most, and how often the predicted class does. Raises
    UserError when the model cannot be written so, or when the logits differ by more than rounding.
    """
    model = copy.deepcopy(model)  # exporting leaves traces in a module
    with torch.no_grad():
        wanted = model(x)
    try:
        with _quiet():
            content = _onnx(model, x) if name == "onnx" else _pt2(model, x)
    except Exception as error:  # whatever the exporter meets in a network it cannot follow
        raise UserError(f"the network cannot be written as {name}: {reason(error)}", "export it without that format") from error
    path = folder / FORMATS[name]
    files.write_bytes(path, content)
    with _quiet():
        found = _run_onnx(path, x) if name == "onnx" else _run_pt2(path, x)
    gap, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not gap <= CLOSE * scale:
        message = f"nothing was exported: the logits of {path.name} differ by up to {gap:g} from the model's"
        raise UserError(message, "the exporter changed the network: export it without that format")
    changed = int((found.argmax(1) != wanted.argmax(1)).sum())
    return {"file": path.name, "images": len(x), "largest_difference": gap, "other_predictions": changed}


def _exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(model, (x[:2],), dynamic_shapes=(batch,))


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    program: Any = torch.onnx.export(
        _exported(model, x), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False,
        dynamic_shapes=({0: "batch"},),  # the name that the exported program has lost
    )  # fmt: skip
    return program.model_proto.SerializeToString()


def _run_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    return torch.from_numpy(logits)


def _pt2(model: nn.Module, x: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_exported(model, x), buffer)
    return buffer.getvalue()


@torch.no_grad()
def _run_pt2(path: Path, x: Tensor) -> Tensor:
    return torch.export.load(str(path)).module()(x)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk to their developers."""
    log = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")
    levels = [logger.level for logger in log]
    try:
        for logger in log:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(log, levels, strict=True):
            logger.setLevel(level)
