"""What a file really is, whatever its name: told by its first bytes, by a zip's directory and by what a pickle asks for."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

COMPILED = {"torchscript": "TorchScript", "torch.export": "a program of torch.export", "onnx": "ONNX"}
# what puts tensors together, and plain values: no code of anybody's
HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Tensor|Size|dtype|device|bool|b?float\d\w*|complex\d+|u?int\d+)|collections\.OrderedDict"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|slice|range|int|float|complex|bool|str|bytes|bytearray|object)"
)
PICKLES = 5  # in a file of torch before 1.6: magic number, protocol, system, the state, its storages


def kind(path: Path) -> str:
    """Return what the first bytes say it is.

    `safetensors`, `torch`; `torchscript`, `torch.export` and `onnx`, which hold a compiled network; `html`, `pointer`
    (of git-lfs), `empty`, `truncated`, `zeros` or `unknown`.
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
        return "torch" if len(head) >= 8 else "truncated"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head):
        return "onnx"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        return "html"
    if len(head) < 8 and b"\0" in head:  # of the length that begins a safetensors file
        return "truncated"
    if not any(head):
        return "zeros"
    return "pointer" if head.startswith(b"version https://git-lfs") else "unknown"


def _kind_of_archive(path: Path) -> str:
    """What a zip archive of PyTorch holds; its directory stands at the end, so a part of one has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except zipfile.BadZipFile:
        return "truncated"
    if any(name in ("constants.pkl", "bytecode.pkl") for name in names):
        return "torchscript"
    exported = ("serialized_exported_program.json", "archive_format", "serialized_state_dict.pt")
    return "torch.export" if any(name in exported or name.startswith("models/") for name in names) else "torch"


def changed_entry(path: Path) -> str | None:
    """Return the first entry of a zip whose bytes are not those that were written, by its checksum; None if all are.

    torch.load does not look at them. Without checksums (torch.serialization.set_crc32_options) nothing is checked.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None


def code_in(path: Path) -> list[str]:
    """Return the functions and classes that a pickle, bare or inside a zip, asks for beside those of tensors and plain
    values."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    else:
        pickles = [path.read_bytes()]
    found = [name for data in pickles for name in _names(data)]
    return [name for name in dict.fromkeys(found) if not HARMLESS.fullmatch(name)]


def _names(data: bytes) -> list[str]:
    """Everything that the pickles in `data` import, in order; nothing is imported here."""
    file = io.BytesIO(data)
    found: list[str] = []
    pushed: list[str] = []  # the strings so far: the last two are what STACK_GLOBAL means
    remembered: dict[Any, str] = {}
    with suppress(Exception):  # it is damaged, or tensors follow
        for _ in range(PICKLES):
            for code, value, _at in pickletools.genops(file):
                if code.name == "GLOBAL":
                    found.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.append(".".join(pushed[-2:]))
                elif code.name == "MEMOIZE" or code.name.endswith("PUT"):
                    remembered[len(remembered) if value is None else value] = pushed[-1] if pushed else ""
                elif code.name.endswith("GET"):
                    pushed.append(remembered.get(value, ""))
                elif isinstance(value, str):
                    pushed.append(value)
    return found
