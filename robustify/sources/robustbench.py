"""RobustBench's models: their published numbers, their architectures, their weight files.

The only file that imports robustbench, and only inside functions. Weight files lie in a folder `models_dir`, by default
~/.cache/robustify/models or what ROBUSTIFY_MODELS_DIR says, in RobustBench's own layout:
models_dir/<dataset>/<threat>/<name>.pt, or .safetensors; models_dir/<name>.pt is found too.
"""
from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
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

from robustify.errors import UserError
from robustify.pixels import PixelModel
from robustify.sources import weights
from robustify.sources.checkpoint import Checkpoint

Row = dict[str, Any]

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
THREATS = ("Linf", "L2", "corruptions")
# the short name of the case study (TRADES); by its letters it would also mean Zhang2019You
ALIASES = {"Zhang2019": "Zhang2019Theoretically"}
# RobustBench builds these by downloading torchvision's weights; this entry has the same network without them
SAME_NETWORK = {("imagenet", "Standard_R50"): ("Linf", "Salman2020Do_R50")}
TORCHVISION = {("imagenet", "Standard_R50"): "https://download.pytorch.org/models/resnet50-0676ba61.pth"}
# RobustBench evaluates this one on larger pictures than the other ImageNet models
SIDES = {("imagenet", "Wong2020Fast"): 288}
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


# ---------------------------------------------------------------------------------------------------------- names

@cache
def published() -> list[Row]:
    """Return the leaderboard's rows: id, dataset, threat, architecture and accuracies as text in per cent.

    `weights` is False in the rows whose authors published no weights.
    """
    from importlib.resources import files

    return json.loads(files("robustify.sources").joinpath("published.json").read_text())


def unlisted() -> list[Row]:
    """Return rows for the entries of the installed robustbench that are not in `published`; imports robustbench."""
    known = {key(row) for row in published()}
    rows = [
        {"id": name, "dataset": dataset.value, "threat": threat.value}
        for dataset, threats in _table().items() for threat, entries in threats.items() for name in entries
    ]
    return [row for row in rows if key(row) not in known]


def key(row: Row) -> tuple[str, str, str]:
    """Return what names an entry: (dataset, threat, id)."""
    return row["dataset"], row["threat"], row["id"]


def arch_name(row: Row) -> str:
    """Return the architecture's name with timm, such as robustbench_cifar10_linf_zhang2019theoretically."""
    return re.sub(r"\W", "_", "_".join(("robustbench", *key(row))).lower())


def input_size(row: Row) -> tuple[int, int, int]:
    """Return (channels, height, width) of the entry's pictures."""
    side = SIDES.get((row["dataset"], row["id"]), 224 if row["dataset"] == "imagenet" else 32)
    return 3, side, side


def find(name: str, dataset: str | None, threat: str | None, rows: list[Row]) -> Row | None:
    """Return the row of exactly this name, or None when there is none; `cifar10/Linf/NAME` says all three.

    Of several, the one for `dataset` and `threat`; where these are not given, cifar10 and Linf are preferred. Raises
    UserError when that leaves none or a choice, and for a model whose weights were never published.
    """
    *place, name = name.split("/")
    if len(place) == 2:
        dataset, threat = place
    same = [row for row in rows if row["id"] == ALIASES.get(name, name)]
    if not same:
        return None
    same = [row for row in same if row.get("weights", True)] or same
    fit = [row for row in same if dataset in (None, row["dataset"]) and threat in (None, row["threat"])]
    preferred = [r for r in fit if (r["dataset"], r["threat"]) == (dataset or "cifar10", threat or "Linf")]
    chosen = preferred or fit
    if len(chosen) != 1:
        places = ", ".join(f"{r['dataset']} {r['threat']}" for r in same)
        asked = " ".join(word for word in (dataset, threat) if word)
        problem = "is published several times" if fit else f"is not published for {asked}"
        first = (fit or same)[0]
        hint = f"it exists for {places}; write robustbench:{first['dataset']}/{first['threat']}/{first['id']}"
        raise UserError(f"{same[0]['id']} {problem}", hint)
    row = chosen[0]
    if not row.get("weights", True):
        hint = f"see {row['link']}; `robustify ls models` lists those with weights"
        raise UserError(f"{row['id']} is on RobustBench's leaderboard, but its weights were never published", hint)
    return row


def find_prefix(name: str, dataset: str | None, threat: str | None, rows: list[Row]) -> Row | None:
    """Return the row of the only model whose name starts so, None when there is none. Raises UserError for several."""
    fit = [r for r in rows if r.get("weights", True) and r["id"].lower().startswith(name.lower())]
    fit = [r for r in fit if dataset in (None, r["dataset"]) and threat in (None, r["threat"])]
    names = sorted({row["id"] for row in fit})
    if len(names) > 1:
        raise UserError(f"{name} can mean {len(names)} RobustBench models", f"write one of: {', '.join(names)}")
    return find(names[0], dataset, threat, fit) if names else None


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


def _resource_filename(module: str, name: str) -> str:
    return str(Path(str(sys.modules[module].__file__)).parent / name)


def _entry(row: Row) -> Row:
    """Return RobustBench's entry: `model`, its constructor, and `gdrive_id`. Raises UserError for ensembles."""
    datasets = {d.value: threats for d, threats in _table().items()}
    threats = {t.value: entries for t, entries in datasets[row["dataset"]].items()}
    entry = threats.get(row["threat"], {}).get(row["id"])
    if entry is None:
        message = f"the installed robustbench does not know {'/'.join(key(row))}"
        raise UserError(message, "pip install -U 'robustbench<1.2'")
    if isinstance(entry["gdrive_id"], list):
        count = len(entry["gdrive_id"])
        message = f"{row['id']} is an ensemble of {count} files, and only single networks can be loaded"
        raise UserError(message, "robustify ls models lists others")
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
    if num_classes != classes or in_chans != 3:
        asked = f"{num_classes} classes" if num_classes != classes else f"{in_chans} channels"
        hint = f"it is built for {classes} classes and 3 channels: use data with as many, or a model of timm"
        raise UserError(f"RobustBench's {row['id']} cannot be built for {asked}", hint)
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
    vars(net)["num_classes"] = classes  # timm asks every model for it
    _move_with_weights(net)
    return net


def _move_with_weights(net: nn.Module) -> None:
    """Make buffers of the normalisation tensors that some architectures keep as plain attributes.

    Otherwise they stay behind when the network changes its device or precision. The state dict stays as it is.
    """
    for module in net.modules():
        for name in ("mean", "std", "mean_cuda", "std_cuda"):
            if name in vars(module):
                module.register_buffer(name, vars(module).pop(name), persistent=False)


# --------------------------------------------------------------------------------------------------- weight files

def load(
    row: Row, *, num_classes: int | None = None, models_dir: Path | None = None, pretrained: bool = True,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Return the row's model. Its weights come from `models_dir`, or are fetched to there. Raises UserError."""
    import timm

    from robustify import registry

    registry.register_robustbench([row])
    classes = CLASSES[row["dataset"]]
    arch = arch_name(row)
    net = timm.create_model(arch, num_classes=num_classes or classes)
    if pretrained:
        path = file(row, models_dir) or _fetch(row, _folder(models_dir) / place(row))
        # the files of timm's networks and of ImageNet are those of the network behind RobustBench's normalisation layer
        lenient = row["id"] in LENIENT or row["dataset"] == "imagenet" or _timm_name(row) is not None
        state = weights.named_for(net, weights.read(path, allow_pickle))
        weights.fill(net, state, path, row["id"], lenient)
    return Checkpoint(
        model=PixelModel(net).eval(), arch=arch, arch_args={}, num_classes=classes, input_size=input_size(row),
        base_id="robustbench:" + "/".join(key(row)), published=row if "clean_acc" in row else None,
        dataset=row["dataset"], threat=row["threat"], pretrained=pretrained,
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
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"the weights of {row['id']} are not on this machine, and HF_HUB_OFFLINE is set", hint)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        temporary = Path(folder) / target.name
        try:
            _download(page, drive, temporary)
        except Exception as error:  # whatever the network does, the answer is the same
            reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
            raise UserError(f"the weights of {row['id']} could not be downloaded: {reason}", hint) from error
        if not temporary.is_file() or not weights.whole(temporary):
            sent = "a web page" if temporary.is_file() and weights.kind(temporary) == "html" else "no complete file"
            raise UserError(f"the server sent {sent} instead of the weights of {row['id']}", hint)
        os.replace(temporary, target)
    return target


def _download(page: str, drive: str | None, target: Path) -> None:
    if drive:
        import gdown

        gdown.download(id=drive, output=str(target), quiet=True)
    else:
        import torch

        torch.hub.download_url_to_file(page, str(target), progress=False)
