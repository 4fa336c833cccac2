"""How a source is loaded: the caller's wishes, and the words behind the name, as in `resnet18:size=64,drop_rate=0.1`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from robustify.errors import UserError

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """What every source is told beside the name of the model.

    num_classes:  another number than the model's own puts a new classifier in; None keeps its own.
    pretrained:   False for random weights; no weight file is needed then.
    allow_pickle: run the code that a weight file may hold.
    arch:         what builds the network of a bare weight file, see sources/bare.py.
    size:         side or (channels, height, width) of the images; None for the model's own.
    mean, std:    the normalisation in front of the network, per channel; None for the model's own.
    args:         further arguments of the architecture, as its library takes them.
    """

    num_classes: int | None = None
    pretrained: bool = True
    allow_pickle: bool = False
    arch: str | None = None
    size: int | Size | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def input_size(self, usual: Size) -> Size:
        """Return (channels, height, width) of the images, of a model that usually takes `usual`."""
        if self.size is None:
            return usual
        return (usual[0], self.size, self.size) if isinstance(self.size, int) else self.size


AS_IT_IS = Options()
WORDS = tuple(f.name for f in fields(Options) if f.name not in ("num_classes", "pretrained", "allow_pickle", "args"))


def split(source: str) -> tuple[str, dict[str, Any]]:
    """Return (the name, the fields of Options that stand behind it as `:key=value,key=value`). Raises UserError.

    Values are written as in YAML: `weights.pt:arch=resnet18,size=32,mean=[0.49,0.48,0.45],std=[0.25,0.24,0.26]`. Words
    that are no field of Options are arguments of the architecture.
    """
    source = source.strip()
    found = re.search(r":(?=\w+=)", source)
    if found is None:
        return source, {}
    name, words = source[: found.start()], source[found.end() :]
    try:
        given = yaml.safe_load("{" + re.sub(r"(^|,)\s*(\w+)=", r"\1\2: ", words) + "}")
    except yaml.YAMLError:
        hint = f"for instance {name}:size=64,mean=[0.5,0.5,0.5]; options: {', '.join(WORDS)}, or the architecture's own"
        raise UserError(f"{words!r} cannot be read as options", hint) from None
    told = {key: _checked(key, given.pop(key)) for key in WORDS if key in given}
    return name, told | ({"args": given} if given else {})


# what timm.create_model takes beside the architecture's own arguments: it would open files, pickles too, and addresses
LOADING = (
    "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable",
)  # fmt: skip


# arguments of the architecture that robustify knows by another name, and must know
KNOWN = {
    "num_classes": "--num-classes N (num_classes=N in Python)",
    "in_chans": "size=[1,28,28]: channels, height, width",
    "img_size": "size=64",
}


def refuse_known(args: Mapping[str, Any], name: str) -> None:
    """Raise a UserError for words behind a library's model that would change what robustify believes of it."""
    for word in KNOWN:
        if word in args:
            raise UserError(f"{name}: {word} cannot stand behind the name", f"say {KNOWN[word]}")


def refuse_loading(args: Mapping[str, Any], origin: object) -> None:
    """Raise a UserError when the arguments of an architecture would have timm load weights, past robustify's own reader.

    origin: where the arguments stand.
    """
    found = [name for name in LOADING if name in args]
    if found:
        hint = "leave it out: weights are read from the model's own file, or from one named as FILE:arch=NAME"
        raise UserError(f"{origin}: {found[0]} is no argument of an architecture", hint)


def _checked(key: str, value: Any) -> Any:
    """Return an option's value in the type of its field. Raises UserError."""
    if key == "arch" and isinstance(value, str):
        return value
    if key == "size":
        side = [value] if isinstance(value, int) else value
        if isinstance(side, list) and len(side) in (1, 3) and all(isinstance(n, int) and n > 0 for n in side):
            return side[0] if len(side) == 1 else tuple(side)
        raise UserError(f"size={value} is no size of images", "size=64, or size=[1,28,28] for channels, height, width")
    numbers = value if isinstance(value, list) else [value]
    if key != "arch" and numbers and all(isinstance(n, int | float) for n in numbers):
        if key == "mean" and max(numbers) > 1:
            shown = ",".join(f"{n / 255:.3g}" for n in numbers)
            raise UserError(f"mean={value} is not in pixel units of [0,1]", f"did you mean mean=[{shown}], std likewise?")
        if key == "std" and min(numbers) <= 0:
            raise UserError(f"std={value} must be above 0", "one standard deviation a channel, in pixel units of [0,1]")
        return tuple(float(n) for n in numbers)
    raise UserError(f"{key}={value!r} cannot be read", "arch=NAME, mean=[0.49,0.48,0.45], std=[0.25,0.24,0.26]")
