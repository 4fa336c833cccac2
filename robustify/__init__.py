"""Harden, measure and publish image classifiers.

    result = robustify.harden(model, (images, labels), threat="Linf:8/255")
    report = robustify.evaluate(result.model, (images, labels), threat="Linf:8/255")

The public names load on first use, so that importing the package costs no torch. After it timm knows robustify's
architectures.
"""
from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from robustify import registry
from robustify.errors import UserError

if TYPE_CHECKING:
    from robustify.api import evaluate, export, load
    from robustify.pipeline import finetune, harden
    from robustify.recipe import Recipe
    from robustify.report import Report
    from robustify.threat import ThreatModel

__all__ = ["Recipe", "Report", "ThreatModel", "UserError", "evaluate", "export", "finetune", "harden", "load"]

_HOMES = {
    "evaluate": "api", "export": "api", "load": "api", "finetune": "pipeline", "harden": "pipeline",
    "Recipe": "recipe", "Report": "report", "ThreatModel": "threat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing a submodule binds it to its package; `robustify.export` stays the function, whatever was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
registry.install()
