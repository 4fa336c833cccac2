"""What a figure may depend on: versions, the device, threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("robustify", "torch", "timm", "pyautoattack")  # whose versions decide what a verdict is
UNKNOWN = "unknown"  # the version of what is not installed as a package


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what a figure may depend on: versions, the device's name, threads, platform."""
    import torch

    versions = {name: version_of(name) for name in (*PACKAGES, "numpy")}
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(torch.device(device)) if on_gpu else _processor()
    place = {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"python": platform.python_version(), **versions, **place, "platform": f"{platform.system()} {platform.machine()}"}


def version_of(package: str) -> str:
    """Return the installed version of a package, `unknown` when it is not installed as one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def released(version: str) -> str:
    """Return a version as package indexes have it: 2.6.0 of 2.6.0+cu121."""
    return version.partition("+")[0]


def _processor() -> str:
    """The processor's name: Linux hides it in a file, elsewhere Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
