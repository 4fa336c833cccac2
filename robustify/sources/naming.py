"""How a source is named: whether it means code of the user's own, and what newer weights of the same network are called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from robustify.errors import UserError
from robustify.sources import python
from robustify.sources.options import split

SOURCES = {
    "local-dir": "a folder with config.json and model.safetensors",
    "robustbench": "RobustBench's models",
    "timm": "timm's models",
    "hf-hub": "folders of the Hugging Face hub, in timm's layout or that of transformers",
    "torchvision": "torchvision's classifiers",
}


def names_code(source: str) -> bool:
    """Return whether loading `source` would import a function of the user's own. Raises UserError."""
    name, told = split(source)
    return any(python.is_name(text) and text.partition(":")[0] not in SOURCES for text in (name, told.get("arch", "")))


def weights_in(folder: str | Path, source: str, num_classes: int | None = None) -> str:
    """Return the source that loads a folder with newer weights of the network that `source` names.

    It is the folder alone, but for a network that a function of the user's own builds: no file names that. num_classes: of
    the new classifier that `source` was loaded with, if any.
    """
    if not names_code(source):
        return str(folder)
    name, told = split(source)
    args = {**told.get("args", {}), **({} if num_classes is None else {"num_classes": num_classes})}
    words = [f"arch={told.get('arch', name)}", *(f"{key}={_as_typed(value)}" for key, value in args.items())]
    return f"{folder}:{','.join(words)}"


def _as_typed(value: Any) -> str:
    """A value as the words behind a name spell it, which YAML reads."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def recorded(folder: Path) -> str | None:
    """Return the source that loads a model's folder whose run began with a function of the user's own; None of another.

    folder: with the config.json. The run's recipe, in it or above it, says which function that was.
    """
    for place in (folder, folder.parent):
        try:
            model = yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf8"))["model"]
            source, num_classes = model["source"], model.get("num_classes")
            return weights_in(folder, source, num_classes) if names_code(source) else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError, UserError):
            continue
    return None
