"""RobustBench's models: their architectures and their weight files.

The only file that imports robustbench, and only inside functions. Weight files lie in a folder `models_dir`, by default
~/.cache/robustify/models or what ROBUSTIFY_MODELS_DIR says, in RobustBench's own layout:
models_dir/<dataset>/<threat>/<name>.pt, or .safetensors; models_dir/<name>.pt is found too.
"""
from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from robustify import files, layers
from robustify.errors import UserError, reason
from robustify.pixels import PixelModel
from robustify.sources import filetypes, hub, published, weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import Options
from robustify.sources.published import CLASSES, Row, arch_name, input_size, key

# RobustBench builds these by downloading torchvision's weights; this entry has the same network without them
SAME_NETWORK = {("imagenet", "Standard_R50"): ("Linf", "Salman2020Do_R50")}
TORCHVISION = {("imagenet", "Standard_R50"): "https://download.pytorch.org/models/resnet50-0676ba61.pth"}
# entries of several files, and why none of them is one network whose logits a loss could train
ENSEMBLES = {
    "Chen2020Adversarial": "averages the probabilities of 3 networks, and has no logits",
    "Diffenderfer2021Winning_Binary_CARD_Deck": "averages the probabilities of 6 networks, and has no logits",
    "Diffenderfer2021Winning_LRR_CARD_Deck": "averages the probabilities of 6 networks, and has no logits",
    "Bai2023Improving": "mixes two fixed networks in shares that a third one chooses",
    "Bai2024MixedNUTS": "mixes two fixed networks, one of them by a hard maximum that passes no gradient",
}
# their files lack the normalisation constants, or hold leftovers of training
LENIENT = frozenset((
    "Andriushchenko2020Understanding", "Augustin2020Adversarial", "Augustin2020Adversarial_34_10",
    "Augustin2020Adversarial_34_10_extra", "Chen2020Efficient", "Diffenderfer2021Winning_Binary",
    "Diffenderfer2021Winning_LRR", "Engstrom2019Robustness", "Hendrycks2020AugMix_ResNeXt",
    "Hendrycks2020AugMix_WRN", "Huang2022Revisiting_WRN-A4", "Kireev2021Effectiveness_AugMixNoJSD",
    "Kireev2021Effectiveness_Gauss50percent", "Kireev2021Effectiveness_RLAT", "Kireev2021Effectiveness_RLATAugMix",
    "Kireev2021Effectiveness_RLATAugMixNoJSD", "Pang2020Boosting", "Rice2020Overfitting", "Rony2019Decoupling",
    "Wong2020Fast", "Wu2020Adversarial",
))


# --------------------------------------------------------------------------------------------------- architectures

@cache
def _table() -> dict[Any, Any]:
    """Return RobustBench's own table, data set -> threat -> name -> entry."""
    with _importable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports timm by names of long ago
        try:
            return importlib.import_module("robustbench.model_zoo").model_dicts
        except ImportError as error:
            hint = "pip install 'robustbench>=1.1.1,<1.2'"
            raise UserError(f"RobustBench cannot be imported: {error}", hint) from error


def unlisted() -> list[Row]:
    """Return rows for the entries of the installed robustbench that published.json lacks; imports robustbench."""
    known = {key(row) for row in published.rows()}
    rows = [
        {"id": name, "dataset": dataset.value, "threat": threat.value}
        for dataset, threats in _table().items() for threat, entries in threats.items() for name in entries
    ]
    return [row for row in rows if key(row) not in known]


@contextmanager
def _importable() -> Iterator[None]:
    """Let robustbench 1.1.1 be imported: stand in for two modules under whose names it looks for others.

    Its wheel depends on `pyautoattack` and imports `autoattack`; and for one function it imports `pkg_resources`, which
    setuptools dropped. It binds both at import, so the stand-ins go again afterwards.
    """
    added = []
    if not _exists("autoattack"):
        for name in ("", ".state"):
            sys.modules[f"autoattack{name}"] = importlib.import_module(f"pyautoattack{name}")
            added.append(f"autoattack{name}")
    if not _exists("pkg_resources"):
        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_filename = _resource_filename  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["pkg_resources"] = stand_in
        added.append("pkg_resources")
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _exists(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def why_refused(row: Row) -> str | None:
    """Return why an entry of several networks is not taken; None of one network."""
    return next((text for name, text in ENSEMBLES.items() if row["id"].startswith(name)), None)


def _resource_filename(module: str, name: str) -> str:
    return str(Path(str(sys.modules[module].__file__)).parent / name)


def _entry(row: Row) -> Row:
    """Return RobustBench's entry: `model`, its constructor, and `gdrive_id`. Raises UserError for ensembles."""
    datasets = {d.value: threats for d, threats in _table().items()}
    threats = {t.value: entries for t, entries in datasets[row["dataset"]].items()}
    entries = threats.get(row["threat"], {})
    entry = entries.get(row["id"])
    if entry is None:
        message = f"the installed robustbench does not know {'/'.join(key(row))}"
        raise UserError(message, "pip install -U 'robustbench<1.2'")
    if isinstance(parts := entry["gdrive_id"], list):
        does = why_refused(row) or "is an ensemble"
        member = next((name for name, other in entries.items() if other["gdrive_id"] in parts), None)
        hint = f"load the robust one in it: {member}" if member else "robustify ls models lists others"
        raise UserError(f"{row['id']} {does}; only single networks can be hardened", hint)
    return entry


def _timm_name(row: Row) -> str | None:
    """Return the name under which robustbench registers the network with timm itself (XCiT, DeiT, AlexNet), or None."""
    import timm

    _table()
    dataset, threat, name = key(row)
    registered = f"{name}_{dataset}_{threat}".lower().replace("-", "_")
    return registered if timm.is_model(registered) else None


def build(row: Row, num_classes: int, in_chans: int = 3) -> nn.Module:
    """Return the row's network with random weights, pictures in [0,1] in, logits out. Raises UserError."""
    classes = CLASSES[row["dataset"]]
    if in_chans != 3:
        hint = "it is built for 3 channels: use data with as many, or a model of timm"
        raise UserError(f"RobustBench's {row['id']} cannot be built for {in_chans} channels", hint)
    entry = _entry(row)
    name = _timm_name(row)
    try:
        if name is not None:
            import timm

            net = timm.create_model(name, num_classes=classes)
        else:
            same = SAME_NETWORK.get((row["dataset"], row["id"]))
            source = _entry({"dataset": row["dataset"], "threat": same[0], "id": same[1]}) if same else entry
            net = source["model"]()
    except (RuntimeError, AssertionError) as error:
        if "cuda" not in str(error).lower() and "nvidia" not in str(error).lower():
            raise
        message = f"RobustBench's {row['id']} can only be built on a CUDA device"
        raise UserError(message, "robustify ls models lists others") from error
    _move_with_weights(net)
    if num_classes != classes:
        layers.replace_classifier(net, input_size(row), num_classes)
    vars(net)["num_classes"] = num_classes  # timm asks every model for it
    return net


def _crop(row: Row) -> dict[str, Any]:
    """How RobustBench cuts a picture for this network, in timm's words: Resize to 256 and CenterCrop to 224 is 0.875."""
    said = str(_entry(row).get("preprocessing") or "")
    if not said.endswith("Res256Crop224"):
        return {}
    return {"crop_pct": 0.875, "interpolation": "bicubic" if said.startswith("Bicubic") else "bilinear"}


def _move_with_weights(net: nn.Module) -> None:
    """Make buffers of the normalisation tensors that some architectures keep as plain attributes.

    Otherwise they stay behind when the network changes its device or precision. The state dict stays as it is.
    """
    for module in net.modules():
        for name in ("mean", "std", "mean_cuda", "std_cuda"):
            if name in vars(module):
                module.register_buffer(name, vars(module).pop(name), persistent=False)


# --------------------------------------------------------------------------------------------------- weight files

def load(row: Row, options: Options, models_dir: Path | None = None) -> Checkpoint:
    """Return the row's model. Its weights come from `models_dir`, or are fetched to there. Raises UserError."""
    classes = CLASSES[row["dataset"]]
    if options.args:
        message = f"RobustBench's {row['id']} takes no arguments, such as {next(iter(options.args))}"
        raise UserError(message, "a model of timm takes them")
    size = options.input_size(input_size(row))
    net = build(row, classes, size[0])
    vars(net)["pretrained_cfg"] = {**getattr(net, "pretrained_cfg", {}), **_crop(row)}
    if options.pretrained:
        path = file(row, models_dir) or _fetch(row, _folder(models_dir) / place(row))
        # the files of timm's networks and of ImageNet are those of the network behind RobustBench's normalisation layer
        lenient = row["id"] in LENIENT or row["dataset"] == "imagenet" or _timm_name(row) is not None
        state = weights.named_for(net, weights.read(path, options.allow_pickle))
        weights.fill(net, state, path, row["id"], lenient)
    chosen = options.num_classes or classes
    if chosen != classes:
        layers.replace_classifier(net, size, chosen)
    return Checkpoint(
        model=PixelModel(net).eval(), arch=arch_name(row), arch_args={}, num_classes=chosen, input_size=size,
        base_id="robustbench:" + "/".join(key(row)), published=row if "clean_acc" in row else None,
        dataset=row["dataset"], threat=row["threat"], pretrained=options.pretrained and chosen == classes,
        replaced=classes if chosen != classes else None,
    )


def place(row: Row) -> Path:
    """Return the weight file's place inside the models folder."""
    return Path(row["dataset"], row["threat"], f"{row['id']}.pt")


def file(row: Row, models_dir: Path | None = None) -> Path | None:
    """Return the row's weight file, or None when it is not there."""
    folder = _folder(models_dir)
    for path in (folder / place(row), folder / f"{row['id']}.pt"):
        for candidate in (path, path.with_name(f"{row['id']}.safetensors")):
            if candidate.is_file():
                return candidate
    return None


def _folder(models_dir: Path | None) -> Path:
    chosen = models_dir or os.environ.get("ROBUSTIFY_MODELS_DIR") or "~/.cache/robustify/models"
    return Path(chosen).expanduser()


def _origin(row: Row) -> tuple[str, str | None]:
    """Return (a web page that gives the file, the Google Drive id or None)."""
    drive = _entry(row)["gdrive_id"]
    if drive:
        return f"https://drive.google.com/file/d/{drive}/view", drive
    name = _timm_name(row)
    if name is None:
        return TORCHVISION.get((row["dataset"], row["id"]), "https://github.com/RobustBench/robustbench"), None
    import timm

    return str(timm.get_pretrained_cfg_value(name, "url")), None


def _fetch(row: Row, target: Path) -> Path:
    """Download the row's weight file to `target`, complete or not at all, and return it. Raises UserError."""
    page, drive = _origin(row)
    hint = f"download it from {page} (paper: {row.get('link', 'unknown')}) and put it at {target.absolute()}"
    if hub.offline():
        raise UserError(f"the weights of {row['id']} are not on this machine, and HF_HUB_OFFLINE is set", hint)
    elsewhere = "free some space, or keep the weights on another disk: ROBUSTIFY_MODELS_DIR=FOLDER"
    there = next(folder for folder in target.absolute().parents if folder.is_dir())  # what fails leaves no folders
    with tempfile.TemporaryDirectory(dir=there, prefix=".fetching-") as folder:
        temporary = Path(folder) / target.name
        try:
            _download(page, drive, temporary)
        except Exception as error:  # whatever the network does, the answer is the same
            if full := files.no_room(error, target, hint=elsewhere):
                raise full from error
            raise UserError(f"the weights of {row['id']} could not be downloaded: {reason(error)}", hint) from error
        if (found := filetypes.kind(temporary) if temporary.is_file() else "") not in ("torch", "safetensors"):
            sent = "a web page" if found == "html" else "no complete file"
            raise UserError(f"the server sent {sent} instead of the weights of {row['id']}", hint)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
    return target


def _download(page: str, drive: str | None, target: Path) -> None:
    if drive:
        import gdown

        gdown.download(id=drive, output=str(target), quiet=True)
    else:
        import torch

        torch.hub.download_url_to_file(page, str(target), progress=False)
