"""The recipes and accelerate configs that come with robustify, as text. Imports no torch, so that listing them is instant."""
from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from robustify.errors import UserError, nearest


def names() -> list[str]:
    """Names of the recipes that come with robustify."""
    return _in(files("robustify.recipes"))


def configs() -> list[str]:
    """Names of the accelerate configs that come with robustify."""
    return _in(files("robustify.recipes") / "accelerate")


def config_text(name: str) -> str:
    """The YAML text of an accelerate config that comes with robustify."""
    return (files("robustify.recipes") / "accelerate" / f"{name}.yaml").read_text(encoding="utf8")


def _in(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def text(name: str, known: list[str] | None = None, hint: str = "") -> str:
    """The YAML text of a recipe: a file, or the name of one that comes with robustify. Raises UserError.

    known: the names to offer for one that is none, those of the recipes unless given. hint: what else it may have meant.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"no recipe file {name}", f"recipes that come with robustify: {', '.join(names())}")
        return path.read_text(encoding="utf8")
    if name not in names():
        raise UserError(
            f"no recipe {name!r}.{nearest(name, known or names())}",
            f"{hint}there are: {', '.join(known or names())}; or the path of a YAML file",
        )
    return (files("robustify.recipes") / f"{name}.yaml").read_text(encoding="utf8")
