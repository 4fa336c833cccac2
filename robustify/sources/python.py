"""A network that a function of the user's own returns: `module:function`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from robustify import layers
from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources.checkpoint import CUSTOM, Checkpoint
from robustify.sources.options import Options, Size


def is_name(text: str) -> bool:
    """Return whether the text has the form `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None


def build(name: str, args: Mapping[str, Any]) -> tuple[nn.Module, int | None]:
    """Call `module:function` with the arguments and return the network. Raises UserError.

    Of a function that does not take `num_classes` that argument is kept back and returned beside the network.

    This runs the user's code, who named it on the command line or in Python; a config.json cannot, and a recipe's file is
    refused by resolve.resolve.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` would have it
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module_name)
    except ImportError as error:
        hint = f"{name} means the function {function_name} in {module_name.replace('.', '/')}.py, here or installed"
        raise UserError(f"the module {module_name} cannot be imported: {error}", hint) from error
    for part in function_name.split("."):
        known = [n for n in dir(function) if not n.startswith("_")]
        function = getattr(function, part, None)
        if function is None:
            raise UserError(f"{module_name} has no {part!r}.{nearest(part, known)}", f"it has: {', '.join(known[:8])}")
    args = dict(args)
    kept_back = args.pop("num_classes", None) if not _takes(function, "num_classes") else None
    try:
        net = function(**args)
    except Exception as error:
        message = f"{name}({', '.join(f'{k}={v!r}' for k, v in args.items())}) raised {type(error).__name__}: {error}"
        raise UserError(message, "it is called with the arguments behind its name: module:function:depth=20") from error
    if not isinstance(net, nn.Module):
        hint = "it must return an nn.Module that maps images [N, C, H, W] to logits [N, classes]"
        raise UserError(f"{name} returned a {type(net).__name__}", hint)
    return net, kept_back


def _takes(function: Any, argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not everything that can be called says what it takes
        return True
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def load(name: str, options: Options) -> Checkpoint:
    """Return what `module:function` returns, with the weights it has. Raises UserError.

    Another number of classes goes to the function if it takes `num_classes`; else a new classifier is put in.
    """
    told = {} if options.num_classes is None else {"num_classes": options.num_classes}
    net, classes = build(name, {**options.args, **told})
    return with_classes(describe(net, name, options, name), classes)


def with_classes(checkpoint: Checkpoint, num_classes: int | None) -> Checkpoint:
    """Return the checkpoint with a new classifier where it has another number of classes. Raises UserError."""
    own = checkpoint.num_classes
    if num_classes in (None, own):
        return checkpoint
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes={num_classes!r} is no number of classes", "a whole number, such as num_classes=7")
    layers.replace_classifier(checkpoint.model.net, checkpoint.input_size, num_classes)
    return replace(checkpoint, num_classes=num_classes, pretrained=False, replaced=own)


def describe(
    net: nn.Module, base_id: str, options: Options, example: str, usual: dict[str, Any] | None = None
) -> Checkpoint:
    """Return a user's network as a Checkpoint; `size` and the normalisation come from the options or from `usual`.

    usual: a description in timm's words; without it the network's own `pretrained_cfg`, where it has one; without
    that, [0,1] goes in as it is. Raises UserError when the size of the images is not known, or does not fit.
    """
    cfg = usual or getattr(net, "pretrained_cfg", None) or {}
    behind = "," if "=" in example else ":"
    if options.size is None and "input_size" not in cfg:
        hint = f"say it: {example}{behind}size=32, or with the channels {example}{behind}size=[1,28,28]"
        raise UserError(f"{base_id} does not say the size of its images", hint)
    size: Size = options.input_size(tuple(cfg.get("input_size", (3, 0, 0))))
    mean, std = options.mean or cfg.get("mean", (0.0,)), options.std or cfg.get("std", (1.0,))
    model = PixelModel(net, mean, std).eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *size))
    except UserError:  # it returns no logits
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        hint = f"say the size, with the channels: {example}{behind}size=[1,28,28]"
        raise UserError(f"{base_id} does not take images of {size}: {reason}", hint) from error
    if logits.ndim != 2:
        hint = "it must map images [N, C, H, W] to logits [N, classes]"
        raise UserError(f"{base_id} returns a tensor of shape {tuple(logits.shape)} for one image", hint)
    return Checkpoint(
        model=model, arch=CUSTOM, arch_args={}, num_classes=logits.shape[1], input_size=size, base_id=base_id,
        pretrained=options.pretrained,
    )  # fmt: skip
