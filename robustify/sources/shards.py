"""The weights in a model's folder: one file, or several that an index lists."""

from __future__ import annotations

import json
from pathlib import Path

from robustify.errors import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"  # behind the name that the one file would have
NAMES = (*WEIGHTS, *(f"{name}{INDEX}" for name in WEIGHTS))


def in_folder(folder: Path) -> Path:
    """Return the folder's weight file, or its index of several. Raises UserError."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / WEIGHTS[0]} does not exist", f"put the weights beside {folder / 'config.json'}")


def listed(index: Path) -> list[str]:
    """Return the names of the files that an index lists, which lie beside it. Raises UserError."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        plain = all(Path(name).name == name for name in names)
    except (ValueError, TypeError, KeyError, AttributeError):
        names, plain = [], False
    if not names or not plain:
        raise UserError(f"{index} lists no weight files beside it", "fetch or export the model again")
    return names
