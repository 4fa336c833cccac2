"""Export: config.json and model.safetensors in timm's layout, read back and compared before they count."""
from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robustify import files
from robustify.environment import version_of
from robustify.equivalents import in_timm
from robustify.errors import UserError
from robustify.formats import check_format, write_format
from robustify.layers import find_classifier
from robustify.model_folder import CONFIG, LICENSE, OURS, SHA256, WEIGHTS, made_there
from robustify.pixels import PixelModel, own_memory
from robustify.report import plain
from robustify.sources import local
from robustify.sources.checkpoint import CUSTOM, Checkpoint

_ROUNDING = 1e-5  # of the largest logit
CROP = ("interpolation", "crop_pct", "crop_mode")


def export(
    checkpoint: Checkpoint,
    model: nn.Module,
    folder: str | Path,
    *,
    robustness: Mapping[str, Any],
    metadata: Mapping[str, Any],
    verify_batch: Tensor,
    class_names: Sequence[str] = (),
    formats: Sequence[str] = (),
    half: bool = False,
    finish: Callable[[Path], object] | None = None,
    force: bool = False,
) -> Path:
    """Write the hardened `model` into `folder` as timm reads it, and return the folder's absolute path.

    checkpoint:   what the model was made from: how to build its network anew, and what is known about it.
    model:        the hardened PixelModel, perhaps wrapped for training; it is exported in single precision. A network
                  of RobustBench that timm has too is exported as timm's.
    robustness:   what config.json says under `robustness`, beside base_model and dataset; sources read its `threat`.
    metadata:     more entries for the head of the weights' file, such as threat and recipe.
    verify_batch: images in [0,1], [N, C, H, W]. A network built anew from the written files must give the same logits.
    formats:      onnx, pt2: model.onnx and model.pt2 beside the weights, see robustify.formats.
    half:         round the weights to half precision; buffers, such as BatchNorm's statistics, stay as they are.
    finish:       called with the folder before it appears, to put the card and more into it.

    The folder appears only when it does; a person's files in an older folder stay, an older model's go, and the license of
    another base model. Raises UserError
    when the network does not survive the way through the files, when files.new_folder refuses the folder, when a format's
    library is missing, and when the disk is full.
    """
    target = files.new_folder(folder, force)
    for name in formats:
        check_format(name)
    net, mean, std = _plain_network(model)
    original = PixelModel(net, mean, std).eval()
    x = verify_batch.detach().to("cpu", torch.float32)
    if checkpoint.arch.startswith("robustbench_") and (same := in_timm(original, x)) is not None:
        checkpoint = dataclasses.replace(checkpoint, arch=same.arch, arch_args=same.arch_args)
        crop = {key: value for key, value in _described(net).items() if key in CROP}
        original = same.model
        vars(original.net)["pretrained_cfg"] = _described(original.net) | crop
    if half:
        round_weights(original)
    net = original.net
    logits = _logits(original, x)
    if not logits.isfinite().all():
        hint = "it needs single precision" if half else "it is not worth exporting: look at the run's losses"
        raise UserError("the model's logits are not finite", hint)

    state = _state(net, half)
    config = _config(checkpoint, original, state, x, class_names, robustness)
    needed = sum(value.nbytes for value in state.values())
    foreign = () if made_there(target, config["robustness"]["base_model"]) else (LICENSE,)
    with files.staged_folder(target, needed=needed, drop=(*OURS, *foreign), force=force) as stage:
        _write_weights(stage / WEIGHTS, state, _head(checkpoint, metadata))
        config["robustness"][SHA256] = files.sha256(stage / WEIGHTS)
        files.write_json(stage / CONFIG, config)
        _compare(original, logits, _read_back(stage, net), x)
        gaps = {name: write_format(name, original, x, stage) for name in formats}
        if gaps:
            config["robustness"]["formats"] = gaps
            files.write_json(stage / CONFIG, config)
        if finish is not None:
            finish(stage)
    return target


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round every weight to half precision, in place; the network stays one that computes in single precision."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.float16))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, (Distributed)DataParallel and weight averaging."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # pyright: ignore[reportAssignmentType]
    return model


def _plain_network(model: nn.Module) -> tuple[nn.Module, list[float], list[float]]:
    """Return a bare copy of the network, on the CPU in single precision and ordinary memory order, and mean, std."""
    pixels = unwrap(model)
    if not isinstance(pixels, PixelModel):
        raise TypeError(f"export takes a PixelModel, not {type(pixels).__name__}")
    net = copy.deepcopy(unwrap(pixels.net)).to(device="cpu", dtype=torch.float32)
    net = net.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    own_memory(net)
    net.train()  # drops what modules have computed from older weights, as modes.borrowed explains
    return net.requires_grad_(False).eval(), _short(pixels.mean), _short(pixels.std)


def _short(values: Tensor) -> list[float]:
    """The shortest numbers that give the same float32: 0.485, not 0.48500001430511475."""
    return [float(str(v)) for v in values.flatten().float().cpu().numpy()]


def _state(net: nn.Module, half: bool) -> dict[str, Tensor]:
    """The state dict as safetensors can hold it: nothing shared, nothing strided, no names of wrappers."""
    state = net.state_dict()
    if half:
        rounded = {name for name, _ in net.named_parameters(remove_duplicate=False)}
        state = {name: value.to(torch.float16) if name in rounded else value for name, value in state.items()}
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"the network's state {odd[0]!r} is not a tensor", "safetensors holds tensors only")
    return unshared({name.replace("_orig_mod.", ""): value for name, value in state.items()})


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, contiguous and each in memory of its own: themselves where that is so, otherwise copies."""
    taken: set[int] = set()
    found = {}
    for name, value in state.items():
        whole = value.detach().contiguous()
        storage = whole.untyped_storage()
        shared = storage.data_ptr() in taken or storage.nbytes() > whole.nbytes
        found[name] = whole.clone() if shared else whole
        taken.add(storage.data_ptr())
    return found


def _write_weights(path: Path, state: dict[str, Tensor], head: dict[str, str]) -> None:
    """Write the weights' file from where the tensors lie: as bytes, a large network's would need its memory twice."""
    path.touch()
    mode = path.stat().st_mode  # safetensors lets nobody but its owner read what it writes
    safetensors.torch.save_file(state, path, head)
    path.chmod(mode)


def _config(
    checkpoint: Checkpoint,
    model: PixelModel,
    state: Mapping[str, Tensor],
    x: Tensor,
    class_names: Sequence[str],
    robustness: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json as timm's save_for_hf lays it out; timm carries the extra key `robustness` along and ignores it."""
    known = _described(model.net)
    channels = checkpoint.input_size[0]
    mean, std = _short(model.mean), _short(model.std)
    classifier = _classifier(model, x, known.get("classifier"), state)
    first = classifier[0] if isinstance(classifier, list) else classifier
    pretrained_cfg = {
        "tag": "robustify",
        "custom_load": False,
        "input_size": checkpoint.input_size,
        "fixed_input_size": known.get("fixed_input_size", False),
        "interpolation": known.get("interpolation", "bicubic"),
        "crop_pct": known.get("crop_pct", 1.0),
        "crop_mode": known.get("crop_mode", "center"),
        "mean": mean if len(mean) == channels else mean * channels,
        "std": std if len(std) == channels else std * channels,
        "num_classes": checkpoint.num_classes,
        "pool_size": known.get("pool_size"),
        "first_conv": known.get("first_conv"),
        "classifier": classifier,
        **({"license": checkpoint.license} if checkpoint.license else {}),
    }
    if class_names and len(class_names) != checkpoint.num_classes:
        raise UserError(f"{len(class_names)} class names for {checkpoint.num_classes} classes", "one name per output")
    features = getattr(model.net, "num_features", None) or (state[f"{first}.weight"].shape[1] if first else None)
    pool = getattr(model.net, "global_pool", None)
    config = {
        "architecture": checkpoint.arch,
        "num_classes": checkpoint.num_classes,
        "num_features": features,
        "global_pool": pool if isinstance(pool, str) else None,
        "label_names": list(class_names),
        "model_args": _looked_up(model.net) | checkpoint.arch_args,
    }
    said = {key: value for key, value in config.items() if value}
    origin = {"base_model": checkpoint.base_id, "dataset": checkpoint.dataset}
    return plain({**said, "pretrained_cfg": pretrained_cfg, "robustness": {**origin, **robustness}})


def _looked_up(net: nn.Module) -> dict[str, Any]:
    """What timm found under the tag of its weights while it built the network: an exported folder has another tag."""
    projects = getattr(net, "encoder_pool", None) in ("align", "merge")  # onto a language model: DeepSeek, Qwen
    return {"out_features": net.num_features} if projects else {}


def _described(net: nn.Module) -> dict[str, Any]:
    """What timm says about a network; nothing about others."""
    return dict(getattr(net, "pretrained_cfg", None) or {})


def _classifier(model: PixelModel, x: Tensor, known: Any, state: Mapping[str, Tensor]) -> str | list[str] | None:
    """The name(s) of the last layer: what timm says if that is so, otherwise what the structure says."""
    names = [known] if isinstance(known, str) else list(known or [])
    if not names or any(f"{name}.weight" not in state for name in names):
        try:
            names = find_classifier(model.net, (x - model.mean) / model.std)
        except UserError:
            return None
    names = [name for name in names if f"{name}.weight" in state]
    return names if len(names) > 1 else next(iter(names), None)


def _head(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The text entries at the head of the weights' file; other readers look for `format`."""
    facts = {"format": "pt", "version": version_of("robustify"), "base_model": checkpoint.base_id}
    facts["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    return facts | {key: _text(value) for key, value in metadata.items() if value is not None}


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return value if isinstance(value, str) else json.dumps(plain(value))


def _read_back(folder: Path, net: nn.Module) -> PixelModel:
    """Build the network that the two files describe, behind the normalisation they describe, and load its weights."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    if config["architecture"] == CUSTOM:  # only its class can build it: a copy that has forgotten every weight
        fresh = copy.deepcopy(net)
        for value in fresh.state_dict().values():
            value.normal_() if value.is_floating_point() else value.zero_()
        fresh.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        cfg = config["pretrained_cfg"]
        return PixelModel(fresh, cfg["mean"], cfg["std"]).eval()
    try:
        return local.load(folder).model
    except UserError as error:
        hint = "the checkpoint's arch and arch_args must build the network that was trained"
        raise UserError(f"nothing was exported: it does not read back: {error.message}", hint) from error


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def buffers_not_held(checkpoint: Checkpoint, model: PixelModel) -> str | None:
    """Return what the user of a class of one's own must know: which buffers the weights do not hold. None without any."""
    held = model.net.state_dict()
    missing = [name for name, _ in model.net.named_buffers() if name not in held]
    if checkpoint.arch != CUSTOM or not missing:
        return None
    names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
    return (
        f"the weights do not hold the buffers {names} (persistent=False): the class must make the same values whenever it "
        "is built, or the logits are others"
    )


def _compare(original: nn.Module, logits: Tensor, again: nn.Module, x: Tensor) -> None:
    """Raise UserError unless both networks have the same state, bit for bit, and give the same logits.

    A product may be rounded otherwise where the same weights lie elsewhere in memory: that much is allowed.
    """
    found = _logits(again, x)
    if torch.equal(found, logits) or (_same_state(original, again) and _only_rounded(found, logits)):
        return
    if not torch.equal(_logits(original, x), logits):
        hint = "it gives other logits each time it is asked: take the randomness out of its eval mode"
    else:
        hint = "its output depends on something that its state dict does not hold: make that a buffer or an argument"
    gap = f"by up to {(found - logits).abs().max():g}" if found.shape == logits.shape else "in shape"
    raise UserError(f"nothing was exported: read back, the network's logits differ {gap} from the trained one's", hint)


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def _only_rounded(found: Tensor, logits: Tensor) -> bool:
    return found.shape == logits.shape and bool((found - logits).abs().max() <= _ROUNDING * logits.abs().max())
