"""timm's models, and folders of the Hugging Face hub in timm's layout."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from robustify import layers
from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources import hub, local, shards, transformers, weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import Options, refuse_known, refuse_loading

# what timm sets where it fills a network with its weights, and not where it builds the exported one again
_WITH_WEIGHTS: dict[str, dict[str, Any]] = {"fbnetc_100": {"bn_eps": 1e-3}}


def exists(name: str) -> bool:
    """Return whether timm knows the architecture of NAME or NAME.TAG. Imports timm."""
    import timm

    return "/" not in name and timm.is_model(name)


def current(name: str) -> str:
    """Return what timm calls a model now that it once called `name`, such as resnet50.tv_in1k for tv_resnet50; or `name`.

    timm builds these under the older name too, but knows neither their weights nor their normalisation there.
    """
    from timm.models import _registry

    return _registry._deprecated_models.get(name) or name


def names() -> list[str]:
    """Return the names of timm's architectures. Imports timm."""
    import timm

    return timm.list_models()


def pretrained_names(query: str) -> list[str]:
    """Return the names with `query` in them for which timm has weights. Imports timm."""
    import timm

    return timm.list_pretrained(f"*{query}*")


def cached(name: str) -> Path | None:
    """Return the weight file of NAME.TAG where the hub's cache or torch's has it. Imports timm."""
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg
    from timm.models._hub import get_cache_dir

    cfg = get_pretrained_cfg(name)
    if cfg is None:
        return None
    told: dict[str, Any] = cfg.to_dict()
    repo, own, url = (told.get(key) for key in ("hf_hub_id", "hf_hub_filename", "url"))
    if repo:
        found = [try_to_load_from_cache(repo, file) for file in ([own] if own else shards.WEIGHTS)]
        return next((Path(path) for path in found if isinstance(path, str)), None)
    path = Path(get_cache_dir()) / url.rsplit("/", 1)[-1] if url else None
    return path if path and path.is_file() else None


def load(name: str, options: Options) -> Checkpoint:
    """Return timm's NAME or NAME.TAG. Raises UserError."""
    import timm

    name = current(name.removeprefix("timm/"))
    refuse_loading(options.args, f"timm:{name}")
    refuse_known(options.args, name)
    cfg = _cfg(name)
    arch = name.split(".")[0]
    own = int(cfg.get("num_classes") or 0)
    classes = options.num_classes or own
    pretrained = options.pretrained
    if not classes:
        hint = "say how many when it is trained: robustify finetune --num-classes 10 (num_classes=10 in Python)"
        raise UserError(f"{name} comes without a classifier, so it has no number of classes", hint)
    size = options.input_size(tuple(cfg["input_size"]))
    overlay: dict[str, Any] = {"tag": cfg.get("tag"), "input_size": size}
    source = _weights(name, cfg, options.allow_pickle) if pretrained else {}
    args = {**(_WITH_WEIGHTS.get(arch, {}) if pretrained else {}), **options.args}
    arguments: dict[str, Any] = {"pretrained_cfg_overlay": overlay | source, "num_classes": classes, **args}
    try:
        net = timm.create_model(name, pretrained=pretrained, **arguments)
    except AssertionError as error:  # timm 1.0.9 takes LeViT's tensors in the order of the file
        if "state_dict" not in source:
            raise _unbuilt(name, options, size, error) from error
        net = timm.create_model(name, pretrained=False, **{**arguments, "num_classes": own})
        state = weights.named_for(net, source["state_dict"])
        weights.fill(net, state, path=Path(name), what=name)
        if classes != own:
            layers.replace_classifier(net, size, classes)
    except Exception as error:
        raise _unbuilt(name, options, size, error) from error
    if getattr(net, "num_classes", classes) == 0:  # an encoder: it ignores the number
        raise UserError(f"timm's {name} returns features and takes no classifier", "robustify ls models timm: lists others")
    for key in ("state_dict", "file"):  # timm keeps its overlay with the model: a second copy of all weights
        vars(net)["pretrained_cfg"].pop(key, None)
    return Checkpoint(
        model=PixelModel(net, cfg["mean"], cfg["std"]).eval(), arch=arch, arch_args=args, num_classes=classes,
        input_size=size, base_id=_base_id(name, cfg) if pretrained else arch,
        license=cfg.get("license") if pretrained else None,
        dataset="imagenet" if pretrained and own == 1000 and "in1k" in str(cfg.get("tag")) else None,
        pretrained=pretrained and classes == own, replaced=own if pretrained and own and classes != own else None,
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
    config = hub.file(repo, "config.json")
    if transformers.is_config(local.read_config(config)):
        return transformers.load_hub(repo, options)
    if options.pretrained:
        hub.weight_file(hub.same_commit(repo, config))
    return local.load(config.parent, options, base_id=repo.split("@")[0])


def _cfg(name: str) -> dict[str, Any]:
    """Return timm's description of NAME or NAME.TAG. Raises UserError."""
    import timm
    from timm.models import PretrainedCfg, get_pretrained_cfg

    if not exists(name):
        raise UserError(f"timm {timm.__version__} has no model {name!r}.{nearest(name, names())}",
                        "robustify ls models timm: lists them")
    arch, _, tag = name.partition(".")
    cfg = None
    if not tag or name in timm.list_models(f"{arch}.*", include_tags=True):
        cfg = get_pretrained_cfg(name)
    if cfg is None and not tag:  # an architecture that nobody has described: timm's defaults
        cfg = PretrainedCfg()
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
        path = hub.weight_file(cfg["hf_hub_id"], cfg.get("hf_hub_filename"))
    elif cfg.get("url"):
        custom = bool(cfg.get("custom_load"))
        path = hub.url_file(name, cfg["url"])
    else:
        raise UserError(f"timm has no pretrained weights for {name}", f"take weights of your own, {hub.RANDOM}")
    if custom:
        return {"file": str(path), "custom_load": True}
    return {"state_dict": weights.read(path, allow_pickle), "custom_load": False}
