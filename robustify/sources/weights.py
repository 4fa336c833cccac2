"""Weight files: what a file really holds, its tensors by name, and fitting them to a network."""
from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustify.errors import UserError

# Where training scripts put the weights inside what they save; applied in this order. `last` stands beside `best` in
# files that hold two models, of which RobustBench measured the last.
WRAPPINGS = ("last", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
COMPILED = {"torchscript": "TorchScript", "torch.export": "a program of torch.export", "onnx": "ONNX"}
CONSTANTS = ("mu", "sigma", "mean", "std")  # normalisation that some architectures set themselves


def kind(path: Path) -> str:
    """Return what the first bytes say it is.

    `safetensors`, `torch`; `torchscript`, `torch.export` and `onnx`, which hold a compiled network; `html`, `pointer`
    (of git-lfs), `empty` or `unknown`.
    """
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        return "empty"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK"):
        return _kind_of_archive(path)
    if head.startswith(b"\x80"):
        return "torch"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head):
        return "onnx"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        return "html"
    return "pointer" if head.startswith(b"version https://git-lfs") else "unknown"


def _kind_of_archive(path: Path) -> str:
    """What a zip archive of PyTorch holds; `torch` for a damaged one too, which reading it will tell."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except zipfile.BadZipFile:
        return "torch"
    if any(name in ("constants.pkl", "bytecode.pkl") for name in names):
        return "torchscript"
    exported = ("serialized_exported_program.json", "archive_format", "serialized_state_dict.pt")
    return "torch.export" if any(name in exported or name.startswith("models/") for name in names) else "torch"


def read(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pt file by name, without the wrappings of training scripts.

    Code inside a pickle is never run unless `allow_pickle`. Raises UserError for all but a whole weight file.
    """
    found = kind(path)
    if found == "safetensors":
        return _tensors(_read_safetensors(path), path)
    if found == "torch":
        return _tensors(_read_torch(path, allow_pickle), path)
    if found in COMPILED:
        hint = "save its weights where its class is at hand, torch.save(net.state_dict(), FILE), and pass FILE:arch=NAME"
        raise UserError(f"{path} is {COMPILED[found]}, a compiled network whose layers cannot be found and trained", hint)
    wrong = {
        "html": "is a web page, not a weight file: the server sent its confirmation or error page instead",
        "pointer": "is a git-lfs pointer, not the weight file itself: run `git lfs pull` in its folder",
        "empty": "is empty",
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
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower() or allow_pickle:
            raise _broken(path, error) from None
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        names = f" ({wanted[1]})" if wanted else ""
        hint = "loading it would run code from the file: only if you trust its author, add --allow-pickle (allow_pickle=True)"
        raise UserError(f"{path} holds more than tensors{names} and was not opened", hint) from None
    except Exception as error:  # a damaged file ends in whatever the unpickler met first
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
    size = f"{path.stat().st_size:,} bytes"
    return UserError(f"{path} ({size}) is truncated or damaged: {reason}", "delete it and fetch it again")


def whole(path: Path) -> bool:
    """Return whether a downloaded file looks like a complete weight file."""
    found = kind(path)
    if found == "torch" and path.open("rb").read(2) == b"PK":
        return zipfile.is_zipfile(path)  # its directory stands at the end
    return found in ("torch", "safetensors")


def _tensors(stored: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict inside `stored`, its wrappers' prefixes removed."""
    if isinstance(stored, nn.Module):
        stored = stored.state_dict()
    for key in WRAPPINGS:
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        entries = isinstance(stored, Mapping)
        holds = f"the entries {_some(map(str, stored))}" if entries else f"a {type(stored).__name__}"
        hint = 'save it with torch.save({"state_dict": net.state_dict()}, ...)'
        raise UserError(f"{path} holds no state dict but {holds}", hint)
    return {_bare(str(name)): value for name, value in stored.items()}


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def named_for(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that `net` uses, as far as known rules lead there.

    The rules: a leading `model.` less or more (a normalisation layer in front of the network puts it there), and timm's
    own translation of older checkpoints.
    """
    inner = {name.removeprefix("model."): value for name, value in state.items()}
    forms = [state, inner, {f"model.{name}": value for name, value in inner.items()}]
    core = net.get_submodule("model") if "model" in dict(net.named_children()) else net
    translate = getattr(sys.modules[type(core).__module__], "checkpoint_filter_fn", None)
    wanted = net.state_dict().keys()
    if translate is not None and not any(wanted <= form.keys() for form in forms):
        try:
            new = translate(dict(inner), core)
        except Exception:  # not a checkpoint that it knows: the names stay, and `fill` tells what does not fit
            new = inner
        forms += [new, {f"model.{name}": value for name, value in new.items()}]
    return min(forms, key=lambda form: len(wanted ^ form.keys()))


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
        net.load_state_dict({n: state[n] for n in wanted if n in state}, strict=False)
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if extra:
        parts.append(f"{len(extra)} are too many ({_some(extra)})")
    if shapes:
        n = shapes[0]
        sizes = f"{list(state[n].shape)} instead of {list(wanted[n].shape)}"
        parts.append(f"{len(shapes)} have another shape ({n}: {sizes})")
    if len(missing) == len(wanted) - sum(n.endswith("num_batches_tracked") for n in wanted):
        cause = "none of the names match: this is the file of another architecture"
    elif shapes and not missing and not extra:
        cause = "the same architecture with another number of classes, width or input size"
        cause += f": say it behind its name, as in arch={what},num_classes=7" if ":" in what else ""
    else:
        cause = "probably the file of another model or architecture"
    raise UserError(f"{path} does not fit {what}: {', '.join(parts)}", cause)


def _some(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
