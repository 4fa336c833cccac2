"""Where models come from. `load` takes one line of text and returns a Checkpoint.

    PATH, local-dir:PATH         a folder in timm's layout, or a run's folder with model/ in it
    digits                       a small network that comes with robustify, as every folder in model_cards/ does
    NAME, robustbench:NAME       a model of RobustBench; robustbench:cifar10/Linf/NAME leaves no doubt
    NAME, timm:NAME              a model of timm, such as resnet18.a1_in1k
    hf-hub:OWNER/NAME            a folder of the Hugging Face hub, in timm's layout or that of transformers
    torchvision:NAME             a classifier of torchvision, such as torchvision:resnet50.IMAGENET1K_V1
    FILE:arch=NAME               a weight file and the network it belongs to
    MODULE:FUNCTION              what a function of yours returns

Behind each may stand how to load it: NAME:size=64,mean=[0.5,0.5,0.5], see options.py.

Importing this imports none of timm, robustbench and torchvision; loading does.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources import bare, local, published, python, robustbench, timm, torchvision
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.naming import SOURCES, names_code, weights_in
from robustify.sources.options import Options, split

__all__ = ["SOURCES", "Checkpoint", "ModelInfo", "check", "load", "names", "names_code", "weights_in"]

DIGITS = "digits"


@dataclass(frozen=True)
class ModelInfo:
    """A line of `robustify ls models`. Accuracies as published, in per cent; None when unknown.

    parameters: how many weights it has; None where only building it would tell. robust_acc: of AutoAttack, or on the
    corrupted pictures for the threat `corruptions`. file: the weights, if here. refused: why it is not taken, if so.
    """

    id: str
    source: str
    dataset: str | None = None
    threat: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    clean_acc: float | None = None
    robust_acc: float | None = None
    additional_data: bool | None = None
    file: Path | None = None
    refused: str | None = None


def load(
    source: str, *, dataset: str | None = None, threat: str | None = None, num_classes: int | None = None,
    models_dir: Path | None = None, pretrained: bool = True, allow_pickle: bool = False,
) -> Checkpoint:
    """Return the model that `source` names, in eval mode. Raises UserError.

    A name without prefix means, in this order: a folder, `digits`, a RobustBench model, a timm model, the only
    RobustBench model whose name starts so.

    dataset, threat: which RobustBench entry, where a name has several; cifar10 and Linf are preferred.
    num_classes:     another number than the model's own puts a new classifier in.
    models_dir:      the folder of RobustBench's weight files, see robustbench.py.
    pretrained:      False for random weights; no weight file is needed then.
    allow_pickle:    run the code that a weight file may hold.
    """
    name, told = split(source)
    if "://" in name:
        raise _no_folder(name)
    options = Options(num_classes=num_classes, pretrained=pretrained, allow_pickle=allow_pickle, **told)
    if _is_bare(name, told):
        checkpoint = bare.load(_path(name), options)
    else:
        checkpoint = _resolve(name, dataset, threat, models_dir)(options)
    if options.mean is None and options.std is None:
        return checkpoint
    there, channels = checkpoint.model, checkpoint.input_size[0]
    mean, std = options.mean or there.mean.flatten().tolist(), options.std or there.std.flatten().tolist()
    if {len(mean), len(std)} - {1, channels}:
        message = f"the images have {channels} channels, mean {len(mean)} numbers, std {len(std)}"
        raise UserError(message, "one number a channel, or one for all")
    return replace(checkpoint, model=PixelModel(there.net, mean, std).eval())


def check(source: str, dataset: str | None = None, threat: str | None = None) -> None:
    """Raise UserError when no source knows this name, without loading anything; arguments as for `load`."""
    name, told = split(source)
    if not _is_bare(name, told):
        _resolve(name, dataset, threat, None)


def _path(name: str) -> Path:
    return Path(name.removeprefix("local-dir:")).expanduser()


def _is_bare(name: str, told: Mapping[str, Any]) -> bool:
    """Whether this is a weight file without its network. told: the words behind the name."""
    path = _path(name)
    return told.get("arch") is not None or (bare.is_file(path) and not local.is_model(path))


def _resolve(
    source: str, dataset: str | None, threat: str | None, models_dir: Path | None
) -> Callable[[Options], Checkpoint]:
    """Return the function that loads what `source` names. Raises UserError."""
    prefix, colon, name = source.partition(":")
    if colon and prefix in SOURCES:
        if not name:
            raise UserError(f"{source} names no model", f"{prefix}: takes {SOURCES[prefix]}")
        if prefix == "local-dir":
            return lambda options: local.load(Path(name), options)
        if prefix == "timm":
            return lambda options: timm.load(name, options)
        if prefix == "hf-hub":
            return lambda options: timm.load_hub(name, options)
        if prefix == "torchvision":
            return lambda options: torchvision.load(name, options)
        row = _robustbench(name, dataset, threat)
        return lambda options: robustbench.load(row, options, models_dir)
    if local.is_model(Path(source).expanduser()):
        return lambda options: local.load(Path(source), options)
    if source in embedded():
        return lambda options: local.load(embedded()[source], options, base_id=source)
    if python.is_name(source):
        return lambda options: python.load(source, options)
    found = published.find(source, dataset, threat, published.rows())
    if found is None and timm.exists(source.removeprefix("timm/")):
        return lambda options: timm.load(source, options)
    if found is None and (colon or "/" in source or Path(source).exists()):
        raise _no_folder(source)
    row = found or _robustbench(source, dataset, threat, timm.names())
    return lambda options: robustbench.load(row, options, models_dir)


def _robustbench(
    name: str, dataset: str | None, threat: str | None, others: Iterable[str] = ()
) -> published.Row:
    """Return RobustBench's entry of this name, or of the only one that starts so. Raises UserError.

    others: names that may have been meant too.
    """
    rows = published.rows()
    row = published.find(name, dataset, threat, rows) or published.find_prefix(name, dataset, threat, rows)
    row = row or published.find(name, dataset, threat, robustbench.unlisted())
    if row is None:
        narrowed = " ".join(word for word in (dataset, threat) if word)
        message = f"no model is called {name!r}" + (f" for {narrowed}" if narrowed else "")
        close = nearest(name, [*embedded(), *{r["id"]: 0 for r in rows if r.get("weights", True)}, *others])
        hint = "robustify ls models lists RobustBench's; folders and timm's names do as well"
        raise UserError(f"{message}.{close}", hint)
    return row


def _no_folder(source: str) -> UserError:
    if not source:
        return UserError("no model is named", "robustify ls models lists those of RobustBench; a folder will do as well")
    if refused := local.unfinished(Path(source).expanduser()):
        return refused
    if Path(source).exists():
        hint = "a model folder holds config.json and model.safetensors, as robustify and timm write them"
        return UserError(f"{source} is no model folder: it has no config.json", hint)
    if page := re.match(r"https?://(?:www\.)?huggingface\.co/([^/?#]+(?:/[^/?#]+)?)", source):
        return UserError(f"{source} is a web page", f"name the folder of the hub: hf-hub:{page[1]}")
    if "://" in source:
        return UserError(f"{source} is a web address", "fetch the file, and name it with its network: weights.pt:arch=resnet18")
    prefixes = ", ".join(f"{name}:" for name in SOURCES)
    hint = f"prefixes: {prefixes}; for the Hugging Face hub: hf-hub:{source.split(':')[-1]}"
    return UserError(f"there is no folder {source}", hint)


def embedded() -> dict[str, Path]:
    """Return the models that come with robustify, name -> folder; digits-cnn is `digits` for short."""
    from importlib.resources import files

    folders = sorted(Path(str(files("robustify.model_cards"))).iterdir())
    return {DIGITS if path.name == "digits-cnn" else path.name: path for path in folders if local.is_model(path)}


def names(
    query: str = "", dataset: str | None = None, threat: str | None = None, models_dir: Path | None = None
) -> list[ModelInfo]:
    """Return what can be loaded by name: those with `query` in their name, for that data set and threat, best first.

    timm's and torchvision's models are listed when the query starts with `timm:` or `torchvision:`, because importing
    them takes seconds. dataset, threat: however their letters are. Raises UserError when no model is for them.
    """
    if query.startswith("timm:"):
        found = timm.pretrained_names(query.removeprefix("timm:"))
        return [ModelInfo(f"timm:{name}", "timm", architecture=name.split(".")[0], file=timm.cached(name)) for name in found]
    if query.startswith("torchvision:"):
        found = [name for name in torchvision.names() if query.removeprefix("torchvision:").lower() in name]
        return [ModelInfo(id=f"torchvision:{name}", source="torchvision", architecture=name) for name in found]
    found = []
    for name, folder in embedded().items():
        config = local.read_config(folder / "config.json")
        data, kind = name.partition("-")[0], config["architecture"]
        found.append(ModelInfo(id=name, source="local-dir", dataset=data, architecture=kind, file=folder))
    for row in published.rows():
        if row.get("weights", True):
            robust = row.get("autoattack_acc", row.get("corruptions_acc"))
            found.append(ModelInfo(
                id=row["id"], source="robustbench", dataset=row["dataset"], threat=row["threat"],
                architecture=row["architecture"], parameters=row.get("parameters"), clean_acc=float(row["clean_acc"]),
                robust_acc=None if robust is None else float(robust), additional_data=row["additional_data"],
                file=robustbench.file(row, models_dir), refused=robustbench.why_refused(row),
            ))
    dataset = _one_of("data set", dataset, [info.dataset for info in found])
    threat = _one_of("threat", threat, [info.threat for info in found])
    wanted = [
        info for info in found
        if query.lower() in info.id.lower() and dataset in (None, info.dataset) and threat in (None, info.threat)
    ]
    places = [(info.dataset, info.threat) for info in found]
    return sorted(wanted, key=lambda info: (places.index((info.dataset, info.threat)), -(info.robust_acc or 0)))


def _one_of(what: str, asked: str | None, known: Iterable[str | None]) -> str | None:
    """The one of `known` that was asked for, spelled as it is there. Raises UserError."""
    names = list(dict.fromkeys(name for name in known if name))
    found = next((name for name in names if asked and name.lower() == asked.lower()), None)
    if asked and found is None:
        message = f"no model is listed for the {what} {asked!r}.{nearest(asked, names)}"
        raise UserError(message, f"there are: {', '.join(names)}")
    return found
