"""Weight files: what a file really holds, its tensors by name, and fitting them to a network."""
from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustify.errors import UserError, reason
from robustify.sources import filetypes, shards

# Where training scripts put the weights inside what they save; applied in this order. `last` stands beside `best` in
# files that hold two models, of which RobustBench measured the last.
WRAPPINGS = ("last", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
CONSTANTS = ("mu", "sigma", "mean", "std")  # normalisation that some architectures set themselves


def read(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pt file, or of all that an index lists, by name and without the wrappings of
    training scripts.

    Code inside a pickle is never run unless `allow_pickle`. Raises UserError for all but a whole weight file.
    """
    if path.name.endswith(shards.INDEX):
        parts = [path.with_name(name) for name in shards.listed(path)]
        if absent := [part.name for part in parts if not part.is_file()]:
            raise UserError(f"{path} lists what is not beside it: {_some(absent)}", "fetch the rest too")
        return {name: tensor for part in parts for name, tensor in read(part, allow_pickle).items()}
    found = filetypes.kind(path)
    if found == "safetensors":
        return _tensors(_read_safetensors(path), path)
    if found == "torch":
        return _tensors(_read_torch(path, allow_pickle), path)
    if found in filetypes.COMPILED:
        hint = "save its weights where its class is at hand, torch.save(net.state_dict(), FILE), and pass FILE:arch=NAME"
        form = filetypes.COMPILED[found]
        raise UserError(f"{path} is {form}, a compiled network whose layers cannot be found and trained", hint)
    wrong = {
        "html": "is a web page, not a weight file: the server sent its confirmation or error page instead",
        "pointer": "is a git-lfs pointer, not the weight file itself: run `git lfs pull` in its folder",
        "empty": "is empty",
        "truncated": f"({_size(path)}) is truncated: its end is missing",
        "zeros": f"({_size(path)}) begins with zeros alone: its place was kept, but it was never fetched whole",
        "unknown": "is neither a safetensors nor a PyTorch file",
    }
    if found == "unknown":  # it may well be a good file of another kind, such as a report
        raise UserError(f"{path} {wrong[found]}", "name a model's folder or its weight file; robustify compare reads reports")
    raise UserError(f"{path} {wrong[found]}", "delete it and put the real file there")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _read_torch(path: Path, allow_pickle: bool) -> Any:
    # training scripts save their options beside the weights; a Namespace runs nothing (torch 2.4 cannot be told so)
    allowed = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
    try:
        with warnings.catch_warnings(), allowed([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about old formats
            if changed := filetypes.changed_entry(path):
                raise ValueError(f"the checksum of {changed} does not match")
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower() or allow_pickle:
            raise _broken(path, error) from None
        wanted = [name for name in filetypes.code_in(path) if name != "argparse.Namespace"]
        names = f" ({_some(wanted)})" if wanted else ""
        whole = any(name.startswith("torch.nn.modules.") for name in wanted)
        holds = "a whole network, which is more than tensors" if whole else "more than tensors"
        hint = "loading it would run code from the file: only if you trust its author, add --allow-pickle (allow_pickle=True)"
        raise UserError(f"{path} holds {holds}{names} and was not opened", hint) from None
    except Exception as error:  # a damaged file ends in whatever the unpickler met first
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} ({_size(path)}) is truncated or damaged: {reason(error, 120)}", "delete it and fetch it again")


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size:,} byte{'' if size == 1 else 's'}"


def _tensors(stored: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict inside `stored`, its wrappers' prefixes removed."""
    if isinstance(stored, nn.Module):
        stored = stored.state_dict()
    for key in WRAPPINGS:
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if isinstance(stored, Mapping) and len(inside := [value for value in stored.values() if _is_state(value)]) == 1:
        stored = inside[0]  # under a name of its own
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(value, Tensor) for value in stored.values()):
        entries = isinstance(stored, Mapping)
        holds = f"the entries {_some(map(str, stored)) or '(none)'}" if entries else f"a {type(stored).__name__}"
        hint = 'save it with torch.save({"state_dict": net.state_dict()}, ...)'
        raise UserError(f"{path} holds no state dict but {holds}", hint)
    if empty := [str(name) for name, value in stored.items() if value.is_meta]:
        message = f"{path} holds {_count(empty, 'tensor', 'tensors')} without numbers ({_some(empty)}): saved from meta"
        raise UserError(message, "save it from a network that holds its weights")
    return {_bare(str(name)): value for name, value in stored.items()}


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(inner, Tensor) for inner in value.values())


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def named_for(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that `net` uses, as far as known rules lead there.

    The rules: a leading `model.` less or more (a normalisation layer in front of the network puts it there), what stands
    before all names, such as `backbone.`, less, and timm's own translation of older checkpoints.
    """
    shared = os.path.commonprefix(list(state)).rpartition(".")[0]  # noqa: RUF071 (then whole names)
    inners = [{name.removeprefix("model."): value for name, value in state.items()}]
    if shared:
        inners.append({name.removeprefix(f"{shared}."): value for name, value in state.items()})
    forms = [state, *(form for inner in inners for form in _with_and_without_model(inner))]
    core = net.get_submodule("model") if "model" in dict(net.named_children()) else net
    translate = getattr(sys.modules[type(core).__module__], "checkpoint_filter_fn", None)
    wanted = net.state_dict().keys()
    if translate is not None and not any(wanted <= form.keys() for form in forms):
        for inner in inners:
            with contextlib.suppress(Exception):  # not a checkpoint that it knows: `fill` tells what does not fit
                forms += _with_and_without_model(translate(dict(inner), core))
    return min(forms, key=lambda form: len(wanted ^ form.keys()))


def _with_and_without_model(inner: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [inner, {f"model.{name}": value for name, value in inner.items()}]


def fill(net: nn.Module, state: dict[str, Tensor], path: Path, what: str, lenient: bool = False) -> None:
    """Load the tensors into `net`, all of them and strictly. Raises UserError naming what does not fit.

    what:     the architecture's name, for the message.
    lenient:  allow what RobustBench's loader allows: normalisation constants that the file lacks and the architecture
              sets itself, and leftovers in the file.
    """
    wanted = net.state_dict()
    parameters = dict(net.named_parameters())
    # counters came with torch 0.4.1: older files lack them, and nothing in eval mode reads them
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in wanted]
    if lenient:
        missing = [n for n in missing if n in parameters or n.rsplit(".", 1)[-1] not in CONSTANTS]
        extra = []
    shapes = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if not (missing or extra or shapes):
        _check_numbers(net, state, path)
        net.load_state_dict({n: state[n] for n in wanted if n in state}, strict=False)
        return
    parts = []
    if missing:
        parts.append(f"{_count(missing, 'tensor is', 'tensors are')} missing ({_some(missing)})")
    if extra:
        parts.append(f"{_count(extra, 'is', 'are')} too many ({_some(extra)})")
    if shapes:
        n = shapes[0]
        sizes = f"{list(state[n].shape)} instead of {list(wanted[n].shape)}"
        parts.append(f"{_count(shapes, 'has', 'have')} another shape ({n}: {sizes})")
    fitting = [n for n in wanted if n in state and n not in shapes]
    if not any(n in state for n in wanted):
        cause = "none of the names match: this is the file of another architecture"
    elif shapes and not missing and not extra:
        cause = "the same architecture with another number of classes, width or input size"
        cause += f": say it behind its name, as in arch={what},num_classes=7" if ":" in what else ""
    elif len(missing) + len(extra) + len(shapes) <= len(fitting) // 4:
        cause = f"{len(fitting)} tensors fit: it was saved from a changed {what}, which a function of yours could build"
        cause += f", {path}:arch=module:function"
    else:
        cause = "probably the file of another model or architecture"
    raise UserError(f"{path} does not fit {what}: {', '.join(parts)}", cause)


def _check_numbers(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise UserError when a tensor's numbers would be cut: complex ones, or integers as weights, such as quantised ones."""
    tensors: dict[str, Tensor] = net.state_dict(keep_vars=True)
    for name, wanted in tensors.items():
        given = state.get(name, wanted)
        cut = given.is_complex() and not wanted.is_complex()
        whole = isinstance(wanted, nn.Parameter) and wanted.is_floating_point() and not given.is_floating_point()
        if cut or whole:
            types = [str(tensor.dtype).removeprefix("torch.") for tensor in (given, wanted)]
            message = f"{path}: {name} is {types[0]}, where the network has {types[1]}"
            raise UserError(message, "save the network in floating point, before it is quantised or transformed")


def _count(names: Sequence[str], one: str, more: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else more}"


def _some(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
