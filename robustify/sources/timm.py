"""timm's models, and folders of the Hugging Face hub in timm's layout.

The file is fetched with huggingface_hub and handed to timm: timm 1.0.9 beside huggingface_hub 1 or newer believes that
there is no hub.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources import local, weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import Options


def exists(name: str) -> bool:
    """Return whether timm knows the architecture of NAME or NAME.TAG. Imports timm."""
    import timm

    return "/" not in name and timm.is_model(name)


def names() -> list[str]:
    """Return the names of timm's architectures. Imports timm."""
    import timm

    return timm.list_models()


def pretrained_names(query: str) -> list[str]:
    """Return the names with `query` in them for which timm has weights. Imports timm."""
    import timm

    return timm.list_pretrained(f"*{query}*")


def load(name: str, options: Options) -> Checkpoint:
    """Return timm's NAME or NAME.TAG. Raises UserError."""
    import timm

    name = name.removeprefix("timm/")
    cfg = _cfg(name)
    arch = name.split(".")[0]
    own = int(cfg.get("num_classes") or 0)
    classes = options.num_classes or own
    pretrained = options.pretrained
    if not classes:
        hint = "say how many: --num-classes 10 (num_classes=10 in Python)"
        raise UserError(f"{name} comes without a classifier, so it has no number of classes", hint)
    size = options.input_size(tuple(cfg["input_size"]))
    overlay: dict[str, Any] = {"tag": cfg.get("tag"), "input_size": size}
    if pretrained:
        overlay |= _weights(name, cfg, options.allow_pickle)
    try:
        net = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=classes, **options.args
        )
    except Exception as error:
        raise _unbuilt(name, options, size, error) from error
    for source in ("state_dict", "file"):  # timm keeps its overlay with the model: a second copy of all weights
        vars(net)["pretrained_cfg"].pop(source, None)
    return Checkpoint(
        model=PixelModel(net, cfg["mean"], cfg["std"]).eval(), arch=arch, arch_args=dict(options.args), num_classes=classes,
        input_size=size, base_id=_base_id(name, cfg) if pretrained else arch,
        license=cfg.get("license") if pretrained else None,
        dataset="imagenet" if pretrained and own == 1000 and "in1k" in str(cfg.get("tag")) else None,
        pretrained=pretrained and classes == own,
    )


def _unbuilt(name: str, options: Options, size: tuple[int, ...], error: Exception) -> UserError:
    """Why timm could not build or fill the network: its arguments, the size of its images, or its weights."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if options.args:
        return UserError(f"{name} cannot be built with {dict(options.args)}: {reason}", "leave out what it does not take")
    if options.size is not None:
        return UserError(f"{name} cannot be built for images of {size}: {reason}", "leave out size=")
    if options.pretrained and isinstance(error, RuntimeError):  # of load_state_dict
        return UserError(f"the weights fetched for {name} do not fit it: {reason}", "clear the hub's cache and try again")
    return UserError(f"timm cannot build {name}: {reason}", "another version of timm may: pip install -U timm")


def load_hub(repo: str, options: Options) -> Checkpoint:
    """Return the model of the hub's folder OWNER/NAME, perhaps with @REVISION. Raises UserError."""
    config = _hub_file(repo, "config.json")
    if options.pretrained:
        _hub_weights(repo)
    return local.load(config.parent, options, base_id=repo.split("@")[0])


def _cfg(name: str) -> dict[str, Any]:
    """Return timm's description of NAME or NAME.TAG. Raises UserError."""
    import timm
    from timm.models import get_pretrained_cfg

    if not exists(name):
        raise UserError(f"timm {timm.__version__} has no model {name!r}.{nearest(name, names())}",
                        "robustify ls models timm: lists them")
    arch, _, tag = name.partition(".")
    cfg = None
    if not tag or name in timm.list_models(f"{arch}.*", include_tags=True):
        cfg = get_pretrained_cfg(name)
    if cfg is None:
        known = timm.list_pretrained(f"{arch}.*")
        message = f"timm {timm.__version__} has no weights {tag!r} for {arch}"
        raise UserError(message, f"it has: {', '.join(known) or 'none'}")
    return cfg.to_dict()


def _base_id(name: str, cfg: dict[str, Any]) -> str:
    return cfg.get("hf_hub_id") or (f"{name}.{cfg['tag']}" if cfg.get("tag") and "." not in name else name)


def _weights(name: str, cfg: dict[str, Any], allow_pickle: bool) -> dict[str, Any]:
    """Return what makes timm load the pretrained weights from a file that is here. Raises UserError."""
    if cfg.get("hf_hub_id"):
        custom = cfg.get("custom_load") == "hf"  # the model's own reader of the original authors' file
        path = _hub_weights(cfg["hf_hub_id"], cfg.get("hf_hub_filename"))
    elif cfg.get("url"):
        custom = bool(cfg.get("custom_load"))
        path = _url_file(name, cfg["url"])
    else:
        raise UserError(f"timm has no pretrained weights for {name}", "random ones: --set model.pretrained=false")
    if custom:
        return {"file": str(path), "custom_load": True}
    return {"state_dict": weights.read(path, allow_pickle), "custom_load": False}


def _hub_weights(repo: str, filename: str | None = None) -> Path:
    """Return the weight file of a hub folder, safetensors where there is one."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    safe, pickled = local.WEIGHTS
    try:
        return _hub_file(repo, filename or safe)
    except UserError as error:
        absent = isinstance(error.__cause__, EntryNotFoundError)
        unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)  # a kind of the former
        if filename or unreachable or not absent:
            raise
    return _hub_file(repo, pickled)


def _hub_file(repo: str, name: str) -> Path:
    """Return the place of a hub folder's file on this machine, fetched if need be. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    owner_name, _, revision = repo.partition("@")
    options: dict[str, Any] = {"repo_id": owner_name, "filename": name, "revision": revision or None}
    try:
        try:  # what is here stays what it was, and needs no network
            return Path(hf_hub_download(**options, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(**options))
    except Exception as error:  # offline, unreachable, not there, not allowed: its own words say which
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        hint = (f"fetch it where there is a network (hf download {owner_name}) and pass its folder as the model;"
                " or start from random weights: --set model.pretrained=false")
        raise UserError(f"{name} of {repo} is not on this machine and could not be fetched: {reason}", hint) from error


def _url_file(name: str, url: str) -> Path:
    from timm.models._hub import download_cached_file

    try:
        return Path(download_cached_file(url, progress=False))
    except Exception as error:
        hint = "start from random weights: --set model.pretrained=false"
        raise UserError(f"the weights of {name} could not be fetched from {url}: {error}", hint) from error
