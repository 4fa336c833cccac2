"""A folder in timm's layout, config.json and model.safetensors: what robustify exports and what the hub holds."""
from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustify import layers
from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources import naming, shards, transformers, weights
from robustify.sources.checkpoint import CUSTOM, Checkpoint
from robustify.sources.options import AS_IT_IS, Options, Size, refuse_known, refuse_loading

# what a description says about where timm would fetch weights; they are read from the folder alone
FETCHED = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load")


def is_model(folder: Path) -> bool:
    """Return whether `folder`, or `folder`/model as in a run's folder, has a config.json."""
    return (folder / "config.json").is_file() or (folder / "model" / "config.json").is_file()


def load(folder: Path, options: Options = AS_IT_IS, *, base_id: str | None = None) -> Checkpoint:
    """Return the model of a folder. Raises UserError.

    base_id: the name to keep; without it the folder's name.
    """
    folder = model_folder(folder.expanduser())
    config = read_config(folder / "config.json")
    if transformers.is_config(config):
        return transformers.load(folder, options, base_id=base_id or called(folder))
    if not isinstance(config.get("architecture"), str):
        message = f"{folder / 'config.json'} names no architecture"
        raise UserError(message, 'add "architecture": "resnet18", a name timm knows')
    if config["architecture"] == CUSTOM:
        source = naming.recorded(folder) or f"{folder}:arch=module:function"
        raise UserError(
            f"{folder} holds the weights of a class of your own, which its files cannot build",
            f"name the function that does: {shlex.quote(source)}; in Python: net = YourNet();"
            " net.load_state_dict(safetensors.torch.load_file('model.safetensors')); robustify.harden(net, ...)",
        )
    return assemble(config, folder / "config.json", options, base_id or called(folder), folder)


def assemble(
    config: Mapping[str, Any], origin: Path, options: Options, base_id: str, folder: Path | None = None,
    state: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Return the model that a config.json describes, filled with the folder's weights, or with `state`. Raises UserError.

    origin: the file that errors name.
    """
    arch = config["architecture"]
    cfg = config.get("pretrained_cfg", config)  # old folders have one level only
    own = config.get("num_classes", cfg.get("num_classes"))
    if not isinstance(own, int) or own < 1:
        raise UserError(f"{origin} does not say how many classes the model has", 'add "num_classes": 10')
    args = {**(config.get("model_args") or {}), **options.args}
    refuse_loading(args, origin)
    refuse_known(options.args, base_id)
    net = _build(arch, cfg, origin, own, args, options)
    described = vars(net)["default_cfg"]
    size = tuple(described["input_size"])
    if options.pretrained:
        path = origin if folder is None else shards.in_folder(folder)
        state = weights.read(path, options.allow_pickle) if state is None else state
        weights.fill(net, weights.named_for(net, state), path, arch)
    classes = options.num_classes or own
    if classes != own:
        layers.replace_classifier(net, size, classes)
    robustness = config.get("robustness") or {}
    return Checkpoint(
        model=PixelModel(net, described["mean"], described["std"]).eval(), arch=arch, arch_args=args,
        num_classes=classes, input_size=size, base_id=base_id, license=cfg.get("license"),
        dataset=robustness.get("dataset"), threat=robustness.get("threat"),
        pretrained=options.pretrained and classes == own, replaced=own if classes != own else None,
    )


def unfinished(folder: Path) -> UserError | None:
    """Return what to say of a folder whose run has not come to a model yet; None of any other."""
    if is_model(folder) or not (folder / "recipe.yaml").is_file():
        return None
    go_on = f"robustify finetune {shlex.quote(f'{folder}/recipe.yaml')} -o {shlex.quote(str(folder))}"
    return UserError(f"{folder} holds a run that has not finished, so there is no model yet", f"it goes on with: {go_on}")


def model_folder(folder: Path) -> Path:
    """Return the folder with the config.json, which a run keeps in model/."""
    inside = folder / "model"
    return inside if not (folder / "config.json").is_file() and (inside / "config.json").is_file() else folder


def called(folder: Path) -> str:
    """Return the folder's name; of a run's model/ the run's, for that is what a person calls it."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json as a dictionary. Raises UserError."""
    if not path.is_file():
        hint = "a model folder holds config.json and model.safetensors, as robustify and timm write them"
        raise UserError(f"{path} does not exist", hint)
    text = path.read_text(errors="replace")
    try:
        config = json.loads(text)
    except ValueError as error:
        kind = "is a web page" if text.lstrip().startswith("<") else f"is not JSON: {error}"
        raise UserError(f"{path} {kind}", "fetch or export the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no description of a model", "fetch or export the model again")
    if not isinstance(config.get("pretrained_cfg", {}), dict) or not isinstance(config.get("robustness") or {}, dict):
        raise UserError(f"{path}: pretrained_cfg and robustness must be objects", "fetch or export the model again")
    if not isinstance(config.get("model_args") or {}, dict):
        raise UserError(f"{path}: model_args={config['model_args']} must be an object", 'such as {"drop_rate": 0.1}')
    return config


def _size(usual: Any, options: Options, path: Path) -> Size:
    """Return (channels, height, width) of the images; `usual` is what the description says. Raises UserError."""
    if isinstance(options.size, tuple):
        return options.size
    if not isinstance(usual, list | tuple) or len(usual) != 3 or not all(isinstance(n, int) and n > 0 for n in usual):
        said = f"input_size={json.dumps(usual)}"
        raise UserError(f"{path}: {said} must be channels, height and width", "such as [3, 224, 224]")
    return options.input_size(tuple(usual))


def _check_normalisation(key: str, values: Any, channels: int, path: Path) -> None:
    """Raise UserError unless the mean or std that a description gives can be true. path: of the description."""
    what = None
    if not isinstance(values, list | tuple) or not all(isinstance(n, int | float) and math.isfinite(n) for n in values):
        what = "must be a list of numbers"
    elif len(values) not in (1, channels):
        what = f"must have one number a channel, and images have {channels}"
    elif key == "std" and min(values) <= 0:
        what = "must be above 0"
    if what:
        raise UserError(f"{path}: {key}={json.dumps(values)} {what}", _normalisation_hint(key, channels))


def _normalisation_hint(key: str, channels: int) -> str:
    numbers = [0.5] * channels
    return f"such as {numbers}, there or behind the name: {key}={json.dumps(numbers, separators=(',', ':'))}"


def _build(
    arch: str, cfg: Mapping[str, Any], origin: Path, num_classes: int, args: dict[str, Any], options: Options
) -> nn.Module:
    """Return the network that config.json describes, with random weights. Raises UserError.

    Its `default_cfg` is what `options` and `cfg` say, and timm's description of the architecture where they say nothing.
    """
    import timm
    from timm.models import PretrainedCfg, get_pretrained_cfg

    from robustify import registry
    from robustify.sources import robustbench

    if arch.startswith("robustbench_") and not timm.is_model(arch):  # a newer robustbench than our list
        registry.register_robustbench(robustbench.unlisted())
    if not timm.is_model(arch):
        message = f"timm {timm.__version__} has no architecture {arch!r}.{nearest(arch, timm.list_models())}"
        hint = f"see {origin}; a newer timm may know it: pip install -U timm"
        raise UserError(message, hint)
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(FETCHED)
    usual = get_pretrained_cfg(arch) or PretrainedCfg()
    said = {name: value for name, value in cfg.items() if name in known and value is not None}
    both: dict[str, Any] = usual.to_dict(remove_source=True) | said | {"num_classes": num_classes}
    both["input_size"] = _size(both["input_size"], options, origin)
    channels = both["input_size"][0]
    for key, told in (("mean", options.mean), ("std", options.std)):
        if told is not None:
            both[key] = told
        elif key in said:
            _check_normalisation(key, said[key], channels, origin)
        elif len(both[key]) not in (1, channels):
            message = f"{origin} does not say the {key} of its images, which have {channels} channel{'s' * (channels > 1)}"
            raise UserError(f"{message}; timm's for {arch} has {len(both[key])}", _normalisation_hint(key, channels))
    try:
        return timm.create_model(arch, pretrained=False, num_classes=num_classes, pretrained_cfg=both, **args)
    except (TypeError, ValueError, AssertionError) as error:
        message = f"{arch} cannot be built with the arguments {args} (images {both['input_size']}): {error}"
        raise UserError(message, f'see "model_args" in {origin}, or what stands behind its name') from error
