"""Image classifiers of Hugging Face transformers: a folder with their config.json, here or on the hub.

timm builds them by the name robustify_transformers, with the folder's config.json as its argument, once robustify is
imported; so what is exported reads back. Needs the package transformers, which nothing else here does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustify.errors import UserError
from robustify.sources import hub, python, shards, weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import Options

ARCH = "robustify_transformers"
PREPROCESSOR = "preprocessor_config.json"


class Logits(nn.Module):
    """A model of transformers whose output is the logits alone. net: maps `pixel_values` [N, C, H, W] to its output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        hint = "pip install 'robustify[transformers]'"
        raise UserError(f"this model needs the package transformers: {error}", hint) from error
    return transformers


def build(config: Mapping[str, Any], num_classes: int | None = None, in_chans: int = 3) -> Logits:
    """Return the network that a config.json of transformers describes, with random weights. Raises UserError."""
    library = _library()
    _refuse_loading(config)
    try:
        described = library.AutoConfig.for_model(**config)
        if num_classes not in (None, described.num_labels):
            described.num_labels = num_classes
        return Logits(library.AutoModelForImageClassification.from_config(described)).eval()
    except Exception as error:  # whatever a class of theirs says of values that it cannot take
        raise _no_classifier(config, error) from error


def _refuse_loading(config: Any) -> None:
    """Raise a UserError when the description has transformers ask timm for weights, of which some are pickles."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if value and key in ("checkpoint_path", "pretrained", "use_pretrained_backbone"):
            hint = "leave it out: the weights are read from the folder's own file"
            raise UserError(f"the model's config.json asks for other weights: {key} = {value!r}", hint)
        _refuse_loading(value)


def _no_classifier(config: Mapping[str, Any], error: Exception) -> UserError:
    kind = ", ".join(config.get("architectures") or ()) or config.get("model_type")
    reason = str(error).strip().split("\n")[0].partition(" Should contain one of")[0][:160]
    hint = "take one of the task image classification"
    if isinstance(error, ValueError) and "for this kind of AutoModel" in reason:  # a list of all that there are follows
        return UserError(f"{kind} is no image classifier of transformers", hint)
    return UserError(f"transformers cannot build {kind}: {reason}", f"see its config.json; {hint}")


def is_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is one of transformers', not of timm's."""
    return "architecture" not in config and "model_type" in config


def load_hub(repo: str, options: Options) -> Checkpoint:
    """Return the model of the hub's folder OWNER/NAME, perhaps with @REVISION. Raises UserError."""
    config = hub.file(repo, "config.json")
    commit = hub.same_commit(repo, config)
    hub.optional_file(commit, PREPROCESSOR)
    if options.pretrained:
        hub.weight_file(commit)
    return load(config.parent, options, base_id=repo.split("@")[0])


def load(folder: Path, options: Options, *, base_id: str | None = None) -> Checkpoint:
    """Return the model of a folder that transformers wrote. Raises UserError."""
    library = _library()
    config = {**json.loads((folder / "config.json").read_text(encoding="utf8")), **options.args}
    _refuse_loading(config)
    own = len(config.get("id2label") or ()) or config.get("num_labels") or 2  # transformers' default is 2
    classes = options.num_classes or own
    net: Any = _filled(library, config, folder, classes, options) if options.pretrained else build(config, classes).net
    size, mean, std = _preprocessing(folder, config)
    kept = {key: value for key, value in net.config.to_dict().items() if key not in ("id2label", "label2id")}
    kept["num_labels"] = classes
    told = {"input_size": size, "mean": mean, "std": std}
    checkpoint = python.describe(Logits(net), base_id or folder.resolve().name, options, str(folder), told)
    return replace(
        checkpoint, arch=ARCH, arch_args={"config": kept}, num_classes=classes,
        pretrained=options.pretrained and classes == own, replaced=own if classes != own else None,
    )  # fmt: skip


def _filled(library: Any, config: Mapping[str, Any], folder: Path, classes: int, options: Options) -> Any:
    """The network with the folder's weights, fitted to it by transformers: it knows the names its older versions used."""
    path = shards.in_folder(folder)
    state = weights.read(path, options.allow_pickle)
    with torch.device("meta"):
        empty: Any = build(config, classes).net
    try:
        with _silent(library):
            net, report = type(empty).from_pretrained(
                None, config=empty.config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True,
                torch_dtype=torch.float32,
            )  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"transformers cannot load {path}: {reason}", "fetch it again, or update transformers") from error
    lacking = {name for name in report["missing_keys"] if not name.endswith("num_batches_tracked")}
    other = {entry[0]: entry[1:] for entry in report["mismatched_keys"]}
    new = {name for name, (there, wanted) in other.items() if len(there) and wanted[0] == classes}
    if lacking or set(other) - new:
        named = ", ".join(sorted(lacking | (set(other) - new))[:3])
        raise UserError(f"the weights in {folder} do not fit its config.json: {named}", "is it an image classifier at all?")
    return net


def _preprocessing(folder: Path, config: Mapping[str, Any]) -> tuple[tuple[int, int, int], list[float], list[float]]:
    """Return (channels, height, width), mean and std for images in [0,1]."""
    path = folder / PREPROCESSOR
    told = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    size = told.get("crop_size") if told.get("do_center_crop") else told.get("size")
    size = size or config.get("image_size") or 224
    if isinstance(size, dict):
        side = size.get("shortest_edge", 224)
        size = [size.get("height", side), size.get("width", side)]
    height, width = size if isinstance(size, list) else (size, size)
    channels = config.get("num_channels", 3)
    # it takes pixels from 0 to 255, multiplies, then normalises
    scale = 255 * told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 255.0
    mean, std = told.get("image_mean", [0.5] * channels), told.get("image_std", [0.5] * channels)
    if not told.get("do_normalize", bool(told)):
        mean, std = [0.0] * channels, [1.0] * channels
    return (channels, int(height), int(width)), [m / scale for m in mean], [s / scale for s in std]


@contextmanager
def _silent(library: Any) -> Iterator[None]:
    """What transformers prints about a load is said here in a sentence, or not at all."""
    logging = library.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
