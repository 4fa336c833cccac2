"""A weight file, or a folder, whose network the user names: `weights.pt:arch=resnet18`, `runs/mine:arch=module:function`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from robustify.errors import UserError
from robustify.sources import local, published, python, shards, weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import Options

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".tar", ".pt2", ".ts", ".onnx")


def is_file(path: Path) -> bool:
    """Return whether this is a weight file, or would be one if it were there."""
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


def load(path: Path, options: Options) -> Checkpoint:
    """Return the network `options.arch` with the file's weights. Raises UserError.

    arch: a name timm knows, so also torchvision_resnet50 and those of RobustBench's networks; or module:function, with its
    arguments. The number of classes is the file's, of a function's network the function's or its argument num_classes;
    another `num_classes` puts a new classifier in.
    """
    path = path.expanduser()
    base_id = local.called(path) if path.is_dir() else path.name
    cfg: dict[str, Any] = {}
    if path.is_dir():
        if refused := local.unfinished(path):
            raise refused
        folder = local.model_folder(path)
        config = local.read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
        cfg = config.get("pretrained_cfg", {})
        path = shards.in_folder(folder)
    if not path.is_file():
        raise UserError(f"there is no file {path}", "check its place and name")
    state = weights.read(path, options.allow_pickle)
    if options.arch is None:
        hint = f"say it: {path}:arch=resnet18, a name timm knows, or {path}:arch=module:function of your own"
        raise UserError(f"{path} holds {len(state)} tensors, but not the network that they belong to", hint)
    arch = _known_to_timm(options.arch)
    if python.is_name(arch):
        net, classes = python.build(arch, options.args)
        checkpoint = python.describe(net, base_id, options, f"{path}:arch={arch}", cfg or None)
        checkpoint = replace(python.with_classes(checkpoint, classes), pretrained=options.pretrained, replaced=None)
        weights.fill(net, weights.named_for(net, state), path, arch)
        return python.with_classes(checkpoint, options.num_classes)
    config = {"architecture": arch, "pretrained_cfg": cfg, "num_classes": _classes(arch, state)}
    return local.assemble(config, path, options, base_id, state=state)


def _known_to_timm(arch: str) -> str:
    """Return how timm calls what `--model` calls robustbench:NAME, torchvision:NAME or timm:NAME; other names as they are."""
    prefix, colon, name = arch.partition(":")
    if colon and prefix in ("timm", "torchvision"):
        return name if prefix == "timm" else f"torchvision_{name}"
    row = published.find(name if prefix == "robustbench" else arch, None, None, published.rows())
    return published.arch_name(row) if row else arch


def _classes(arch: str, state: dict[str, Tensor]) -> int:
    """The outputs of the file's classifier: the rows of the tensor that timm calls so, else of the last matrix."""
    import timm
    from timm.models import get_pretrained_cfg

    cfg = (get_pretrained_cfg(arch) if timm.is_model(arch) else None) or None
    told = cfg.classifier if cfg else None  # pyright: ignore[reportAttributeAccessIssue]
    heads = [told] if isinstance(told, str) else list(told or ())
    ends = tuple(f".{head}.{part}" for head in heads for part in ("weight", "bias"))
    found = [value for name, value in state.items() if f".{name}".endswith(ends)]
    matrices = found or [value for value in state.values() if value.ndim in (2, 4)]
    return len(matrices[-1]) if matrices else 1
