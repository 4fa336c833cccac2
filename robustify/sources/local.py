"""A folder in timm's layout, config.json and model.safetensors: what robustify exports and what the hub holds."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources import weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import AS_IT_IS, Options

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def is_model(folder: Path) -> bool:
    """Return whether `folder`, or `folder`/model as in a run's folder, has a config.json."""
    return (folder / "config.json").is_file() or (folder / "model" / "config.json").is_file()


def load(folder: Path, options: Options = AS_IT_IS, *, base_id: str | None = None) -> Checkpoint:
    """Return the model of a folder. Raises UserError.

    base_id: the name to keep; without it the folder's `robustness.base_model`, or the folder's name.
    """
    folder = folder.expanduser()
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    config = _config(folder / "config.json")
    cfg = config.get("pretrained_cfg", config)  # old folders have one level only
    own = config.get("num_classes", cfg.get("num_classes"))
    args = {**(config.get("model_args") or {}), **options.args}
    if not isinstance(own, int) or own < 1:
        message = f"{folder / 'config.json'} does not say how many classes the model has"
        raise UserError(message, 'add "num_classes": 10')
    net = _build(config["architecture"], cfg, folder, own, args, options)
    described = vars(net)["default_cfg"]
    if options.pretrained:
        path = _weight_file(folder)
        state = weights.named_for(net, weights.read(path, options.allow_pickle))
        weights.fill(net, state, path, config["architecture"])
    replaced = options.num_classes not in (None, own)
    if options.num_classes is not None and replaced:
        _reset(net, options.num_classes, config["architecture"])
    robustness = config.get("robustness") or {}
    return Checkpoint(
        model=PixelModel(net, described["mean"], described["std"]).eval(), arch=config["architecture"], arch_args=args,
        num_classes=options.num_classes or own, input_size=tuple(described["input_size"]),
        base_id=base_id or _called(folder), license=cfg.get("license"),
        dataset=robustness.get("dataset"), threat=robustness.get("threat"), pretrained=options.pretrained and not replaced,
    )


def _called(folder: Path) -> str:
    """The folder's name; of a run's model/ the run's, for that is what a person calls it."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _config(path: Path) -> dict[str, Any]:
    """Return config.json as a dictionary that names an architecture. Raises UserError."""
    if not path.is_file():
        hint = "a model folder holds config.json and model.safetensors, as robustify and timm write them"
        raise UserError(f"{path} does not exist", hint)
    text = path.read_text(errors="replace")
    try:
        config = json.loads(text)
    except ValueError as error:
        kind = "is a web page" if text.lstrip().startswith("<") else f"is not JSON: {error}"
        raise UserError(f"{path} {kind}", "fetch or export the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{path} names no architecture", 'add "architecture": "resnet18", a name timm knows')
    if not isinstance(config.get("pretrained_cfg", {}), dict) or not isinstance(config.get("robustness") or {}, dict):
        raise UserError(f"{path}: pretrained_cfg and robustness must be objects", "fetch or export the model again")
    return config


def _build(
    arch: str, cfg: dict[str, Any], folder: Path, num_classes: int, args: dict[str, Any], options: Options
) -> nn.Module:
    """Return the network that config.json describes, with random weights. Raises UserError.

    Its `default_cfg` is what `cfg` says, and timm's description of the architecture where that says nothing.
    """
    import timm
    from timm.models import PretrainedCfg, get_pretrained_cfg

    from robustify import registry
    from robustify.sources import robustbench

    if arch == "custom":
        raise UserError(
            f"{folder} holds the weights of a class of your own, which its files cannot build",
            "in Python: net = YourNet(); net.load_state_dict(safetensors.torch.load_file('model.safetensors'));"
            " robustify.harden(net, ...)",
        )
    if arch.startswith("robustbench_") and not timm.is_model(arch):  # a newer robustbench than our list
        registry.register_robustbench(robustbench.unlisted())
    if not timm.is_model(arch):
        message = f"timm {timm.__version__} has no architecture {arch!r}.{nearest(arch, timm.list_models())}"
        hint = f"see {folder / 'config.json'}; a newer timm may know it: pip install -U timm"
        raise UserError(message, hint)
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    usual = get_pretrained_cfg(arch) or PretrainedCfg()
    said = {name: value for name, value in cfg.items() if name in known and value is not None}
    both = usual.to_dict(remove_source=True) | said | {"num_classes": num_classes}
    both["input_size"] = options.input_size(tuple(both["input_size"]))
    try:
        return timm.create_model(arch, num_classes=num_classes, pretrained_cfg=both, **args)
    except (TypeError, ValueError, AssertionError) as error:
        message = f"{arch} cannot be built with the arguments in {folder / 'config.json'}: {error}"
        raise UserError(message, f'see its "model_args": {args}') from error


def _weight_file(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / WEIGHTS[0]} does not exist", f"put the weights beside {folder / 'config.json'}")


def _reset(net: nn.Module, num_classes: int, arch: str) -> None:
    reset = getattr(net, "reset_classifier", None)
    if reset is None:
        message = f"{arch} cannot be given another number of classes ({num_classes})"
        raise UserError(message, "use data with as many classes as it has")
    reset(num_classes)
