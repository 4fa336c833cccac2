"""robustify env: what a figure, or a bug report, may depend on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from robustify import console
from robustify.cli import options
from robustify.errors import UserError

PACKAGES = ("torchvision", "accelerate", "robustbench", "safetensors", "huggingface_hub", "pydantic", "typer")


def run(as_json: options.AsJson = False) -> None:
    """Print versions, devices, threads and folders.

    \b
    robustify env
    """
    with console.status("loading torch"):
        import torch

        from robustify.environment import environment, version_of
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    values: dict[str, Any] = {
        **environment("cuda" if gpus else "cpu"),
        **{name: version_of(name) for name in PACKAGES},
        "gpus": ", ".join(gpus) or "none",
        "robustbench imports": _robustbench(),
        "models folder": _folder("ROBUSTIFY_MODELS_DIR", "robustify/models"),
        "data folder": _folder("ROBUSTIFY_DATA_DIR", "robustify/data"),
        "hub cache": _hub_cache(),
        "hub offline": "yes" if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE") else "no",
    }
    if as_json:
        console.result_json(values)
    else:
        console.facts(values)


def _folder(variable: str, default: str) -> str:
    path = Path(os.environ.get(variable) or Path.home() / ".cache" / default).expanduser()
    return f"{path}{'' if path.is_dir() else ' (not there)'}"


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def _robustbench() -> str:
    with console.status("loading robustbench"):
        from robustify.sources import robustbench

        try:
            robustbench.unlisted()
        except UserError as error:
            return f"no: {error.message}"
    return "yes"
