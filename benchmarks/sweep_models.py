"""Every model that robustify says it takes: does it come in, train, go out and come back?

    python benchmarks/sweep_models.py --out rows.jsonl              # all of them; goes on where it stopped
    python benchmarks/sweep_models.py --out rows.jsonl --sample 20 --seed 1
    python benchmarks/sweep_models.py --out rows.jsonl --narrow     # those without a row yet, with fewer blocks
    python benchmarks/sweep_models.py --out rows.jsonl --table docs/coverage.md

For every entry of RobustBench and every classification architecture of the installed timm: random weights are written in
the published file's format and place, and the model is loaded from there by its name; its classifier is found and compared
with what timm says; one step of the last layer and one of the whole network are taken by method wasserstein at the smallest
images the network takes; the result is exported, and another process that only imports timm and robustify reads it back
and must get the same logits, to rounding. A row of `rows.jsonl` is one model:

    passed     all of that
    same       loads as above; its modules, names and shapes are those of a model that passed, so the rest was not repeated
    refused    robustify said in one sentence why not
    failed     anything else, with the stage and the reason
    too large  not tried: it needs more memory than the machine has, see --memory
    narrowed   passed all of that with fewer blocks, as its own builder takes their number; not tried at its full size

The order is one architecture of each of timm's families, then the others; among them, every fourth, RobustBench's entries.
What earlier rows tell the size of comes by size, the smallest first.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

SIDES = (32, 56, 64, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
STEP_SETTINGS = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1.0}
OUTCOMES = ("passed", "same", "refused", "failed", "too large")
# what timm's builders call the number of their blocks; the first is taken that leaves less than NARROW of the weights
FEWER = ({"depth": 2}, {"depths": [2, 2, 2, 2]}, {"depths": [1, 1, 1, 1]}, {"layers": [1, 1, 1, 1]}, {"stages": [1, 1, 1, 1]})
NARROW = 0.6
# While a network is exported there are three copies of its weights: its own, the one written, the one read back; with the file
# mapped into memory four. BASE: bytes for the libraries and the maps of two images. So 20 GB hold 1150 million weights. It took
# 2.3, 5.7, 9.0 and 15.6 GB at 87, 304, 485 and 937 million.
COPIES, BASE = 4, 1.5e9


@dataclass
class Machine:
    """What the sweep of one process shares. folder: for weights and exports; memory: bytes that a model may need."""

    folder: Path
    memory: float
    reader: Reader
    accelerator: Any
    sides: dict[str, int] = field(default_factory=dict)  # family -> the side that its last member took
    seen: dict[str, str] = field(default_factory=dict)  # signature -> the name of the model that passed


# -------------------------------------------------------------------------------------------------------- what there is


def every_model() -> list[dict[str, Any]]:
    """Return every model as {name, family}, in the order of the sweep."""
    import timm
    from timm.models import _registry

    from robustify.sources import published

    entries = [
        {"name": "robustbench:" + "/".join(published.key(row)), "family": f"robustbench {row['architecture']}"}
        for row in published.rows()
        if row.get("weights", True)
    ]
    entries.sort(key=lambda entry: entry["family"])
    ours = ("robustbench_", "robustify_", "torchvision_")
    modules = _registry._model_to_module
    # robustbench registers its own with timm too, under modules of its own
    rest = [n for n in timm.list_models() if not n.startswith(ours) and _is_timms(n)]
    by_family: dict[str, list[str]] = collections.defaultdict(list)
    for name in rest:
        by_family[modules[name]].append(name)
    first = [names[0] for names in by_family.values()]
    ordered = first + [name for names in by_family.values() for name in names[1:]]
    found = []
    for number, name in enumerate(ordered):
        if number % 3 == 0 and entries:
            found.append(entries.pop(0))
        found.append({"name": f"timm:{name}", "family": f"timm {modules[name]}"})
    return found + entries


def _is_timms(name: str) -> bool:
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.startswith("timm.")


def narrowed(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry with `args` that build it with fewer blocks, and how many weights it has in `full`; None without."""
    full = _weights_of(_sketch(entry["name"], {}))
    for args in FEWER if entry["name"].startswith("timm:") else ():
        if 0 < _weights_of(_sketch(entry["name"], args)) < NARROW * full:
            return {**entry, "args": args, "full": full}
    return None


# ------------------------------------------------------------------------------------------------------- one model


def sweep(entry: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Put one model through all stages and return its row."""
    from robustify.errors import UserError

    row: dict[str, Any] = {**entry, "stage": "build"}
    begin = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _stages(row, machine)
    except UserError as error:
        # a refusal of the model itself is an answer; one on the way, of what was accepted, is a failure
        refusal = row["stage"] in ("build", "load", "classifier")
        row |= {"outcome": "refused" if refusal else "failed", "reason": f"{error.message}; {error.hint}"}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        row |= {"outcome": "failed", "reason": f"{type(error).__name__}: {reason} ({Path(where.filename).name}:{where.lineno})"}
    row["seconds"] = round(time.monotonic() - begin, 1)
    for leftover in machine.folder.iterdir():
        shutil.rmtree(leftover, ignore_errors=True)
    return row


def _stages(row: dict[str, Any], machine: Machine) -> None:
    from robustify.export import export
    from robustify.layers import find_classifier
    from robustify.modes import borrowed

    source, args = row["name"], row.get("args", {})
    if _too_large(row, _sketch(source, args), machine.memory):  # without its weights, so that the large ones cost no time
        return
    net = _published_network(source, args)
    if _too_large(row, net, machine.memory):
        return

    row["stage"] = "load"
    written = _publish(source, net, machine.folder)
    row["weights"] = written
    classes = {} if _classes_of(source) else {"num_classes": 10}
    options = {"pretrained": bool(written), "models_dir": machine.folder / "models", **classes}
    checkpoint = _load(_told(source, args), options)
    if written:
        _same_weights(net, checkpoint.model.net, but=() if not classes else _heads(checkpoint.model.net))
    del net

    row["stage"] = "classifier"
    own = checkpoint.input_size[1]
    print_of = _signature(checkpoint.model.net)
    twin = machine.seen.get(print_of)
    if twin is not None and not args:
        row |= {"outcome": "same", "reason": f"the same modules, names and shapes as {twin}"}
        return
    small = _smallest(source, args, checkpoint, machine.sides.get(row["family"]), options)
    row["side"] = side = small.input_size[1]
    machine.sides[row["family"]] = side
    checkpoint = small
    if not written:
        _awaken(checkpoint.model.net)
    batch = 3 if side <= 64 else 2 if side < 256 else 1  # BatchNorm over two maps of 1x1 has no gradient
    x = torch.rand(batch, *checkpoint.input_size, generator=torch.Generator().manual_seed(0))
    model = checkpoint.model
    with borrowed(model), torch.no_grad():
        y = model(x).argmin(1)  # a network of random weights may be very sure of itself; here it is wrong
    row["classifier"] = classifier = find_classifier(model.net, (x - model.mean) / model.std)
    told = getattr(model.net, "default_cfg", None) or {}
    if isinstance(told, dict) and source.startswith("timm:") and told.get("classifier"):
        said = [told["classifier"]] if isinstance(told["classifier"], str) else list(told["classifier"])
        if missing := sorted(set(said) - set(classifier)):  # more is right where timm counts the distilled head apart
            raise AssertionError(f"the classifier found is {classifier}; timm says also {missing}")

    row["stage"] = "last-layer step"
    row["loss_last"] = _step(checkpoint, "last", classifier, x, y, machine)
    row["stage"] = "full step"
    row["loss_full"] = _step(checkpoint, "full", classifier, x, y, machine)

    row["stage"] = "export"
    folder = machine.folder / "exported"
    export(checkpoint, model, folder, robustness={"threat": "W2-Linf:8/255"}, metadata={}, verify_batch=x)
    with borrowed(model), torch.no_grad():
        logits = model(x)
    row["stage"] = "reload"
    save_file({"x": x, "logits": logits.contiguous()}, folder / "expected.safetensors")
    del model, checkpoint, small
    gc.collect()
    machine.reader.read(folder)
    row |= {"outcome": "narrowed" if args else "passed", "stage": "all", "own_side": own}
    if not args:
        machine.seen[print_of] = source
        row["signature"] = print_of


def _classes_of(source: str) -> int:
    from timm.models import get_pretrained_cfg

    from robustify.sources import published

    prefix, name = source.split(":")
    if prefix == "robustbench":
        return published.CLASSES[name.split("/")[0]]
    cfg = get_pretrained_cfg(name)
    return (cfg.num_classes if cfg else 1000) or 0


def _told(source: str, words: dict[str, Any]) -> str:
    """The source with arguments behind its name, as robustify reads them."""
    return source + (":" + ",".join(f"{key}={value}" for key, value in words.items()) if words else "")


def _weights_of(net: nn.Module) -> int:
    return sum(w.numel() for w in net.parameters())


def _sketch(source: str, args: dict[str, Any]) -> nn.Module:
    """The network without memory for its weights, or an empty one where it cannot be built so."""
    import timm

    prefix, name = source.split(":")
    linspace = functools.partial(torch.linspace, device="cpu")  # timm reads numbers from it while it builds
    try:
        with torch.device("meta"), mock.patch("torch.linspace", linspace):
            return timm.create_model(name, **args) if prefix == "timm" else nn.Identity()
    except Exception:  # networks that compute with numbers while they are built, and those that do not take the arguments
        return nn.Identity()


def _too_large(row: dict[str, Any], net: nn.Module, memory: float) -> bool:
    row["parameters"] = _weights_of(net)
    needed = COPIES * 4 * row["parameters"] + BASE
    if needed <= memory:
        return False
    row |= {"outcome": "too large", "reason": f"needs {needed / 1e9:.3g} GB of memory, {memory / 1e9:.3g} are free"}
    return True


def _published_network(source: str, args: dict[str, Any]) -> nn.Module:
    """The network as its publisher would have it, with random weights that no test can pass by accident."""
    import timm

    from robustify.sources import published, robustbench

    prefix, name = source.split(":")
    torch.manual_seed(1)
    with quick_initialisation():
        if prefix == "robustbench":
            dataset, threat, model = name.split("/")
            found = published.find(model, dataset, threat, published.rows())
            assert found is not None
            net = robustbench.build(found, published.CLASSES[dataset])
        else:
            net = timm.create_model(name, **args)
    _awaken(net)
    return net


def _awaken(net: nn.Module) -> None:
    """Give random numbers to what begins at zero, or nearly: a gain of zero hides all that lies behind it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            vector = weight.numel() == max(weight.shape, default=1)
            if not name.endswith("bias") and weight.abs().max() < (0.1 if vector else 1e-9):
                weight.normal_(0, 0.5 if vector else 0.02, generator=generator)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # pyright: ignore[reportOptionalMemberAccess]


def _publish(source: str, net: nn.Module, folder: Path) -> str:
    """Write the weights where `sources.load` looks for them; return their kind, '' where nothing is published."""
    from timm.models import get_pretrained_cfg

    from robustify.export import unshared
    from robustify.sources import robustbench

    prefix, name = source.split(":")
    inside = "image_encoder.trunk." if name.startswith("sam2_") else ""  # a part of the published network
    state = unshared({inside + key: value for key, value in net.state_dict().items()})
    if prefix == "robustbench":
        dataset, threat, model = name.split("/")
        place = robustbench.place({"dataset": dataset, "threat": threat, "id": model})
        path = folder / "models" / place
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
        return "pt"
    cfg = get_pretrained_cfg(name)
    if cfg is None or cfg.custom_load == "hf" or not (cfg.hf_hub_id or cfg.url):
        return ""
    if cfg.hf_hub_id:
        commit = "0" * 40
        root = folder / "hub" / f"models--{cfg.hf_hub_id.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        path = root / "snapshots" / commit / (cfg.hf_hub_filename or "model.safetensors")
        path.parent.mkdir(parents=True)
        if path.suffix == ".safetensors":
            save_file(state, path)
        elif path.suffix == ".npz":
            return ""
        else:
            torch.save(state, path)
        return "hub"
    if cfg.custom_load:
        return ""
    path = folder / "torch" / "hub" / "checkpoints" / cfg.url.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return "url"


def _load(source: str, options: dict[str, Any]) -> Any:
    """The checkpoint, quickly where its weights are random: robustify itself draws none that a file replaces."""
    from robustify import sources

    with contextlib.nullcontext() if options["pretrained"] else quick_initialisation():
        return sources.load(source, **options)


def _same_weights(published: nn.Module, loaded: nn.Module, but: tuple[str, ...]) -> None:
    """Raise unless every tensor of the file has arrived."""
    found = loaded.state_dict()
    for name, value in published.state_dict().items():
        if name.startswith(but or "\0"):
            continue
        if name not in found or not torch.equal(found[name], value):
            raise AssertionError(f"{name} is not what the file holds")


def _heads(net: nn.Module) -> tuple[str, ...]:
    told = getattr(net, "default_cfg", None) or {}
    said = told.get("classifier") or ()
    return (said,) if isinstance(said, str) else tuple(said)


def _signature(net: nn.Module) -> str:
    """A digest of the modules as they print themselves and of the state's names and shapes."""
    shapes = [(name, tuple(value.shape)) for name, value in net.state_dict().items()]
    return hashlib.sha256(f"{type(net).__qualname__}{net}{shapes}".encode()).hexdigest()[:16]


def _smallest(source: str, args: dict[str, Any], own: Any, hint: int | None, options: dict[str, Any]) -> Any:
    """Return the checkpoint for the smallest square images that the network takes, forwards and in training."""
    side = own.input_size[1]
    fixed = bool((getattr(own.model.net, "default_cfg", None) or {}).get("fixed_input_size")) and source.startswith("timm:")
    for smaller in [s for s in SIDES if s < side and s >= (hint or 0)]:
        try:
            chosen = _load(_told(source, {"size": smaller, **args}), options) if fixed else own
            if not fixed:
                chosen = _at(own, smaller)
            _runs(chosen)
        except Exception:  # whatever it cannot do at this size
            continue
        return chosen
    _runs(own)
    return own


def _at(checkpoint: Any, side: int) -> Any:
    import dataclasses

    return dataclasses.replace(checkpoint, input_size=(checkpoint.input_size[0], side, side))


def _runs(checkpoint: Any) -> None:
    with torch.no_grad():
        out = checkpoint.model(torch.rand(1, *checkpoint.input_size))
    if out.shape != (1, checkpoint.num_classes) or not out.isfinite().all():
        raise ValueError(f"logits {tuple(out.shape)}, finite: {bool(out.isfinite().all())}")


def _step(checkpoint: Any, layers_: str, classifier: list[str], x: Any, y: Any, machine: Machine) -> float:
    """Take one real step of the training loop; check which weights it reaches. Returns the loss."""
    from robustify import layers
    from robustify.methods import Wasserstein
    from robustify.recipe import TrainSettings
    from robustify.step import prepare, set_train_mode, take_step
    from robustify.threat import ThreatModel

    net = checkpoint.model.net
    chosen = set(layers.select(net, layers_, classifier).names)
    before = {name: _some(value) for name, value in net.state_dict().items()}
    method, settings = Wasserstein(steps=1), TrainSettings(layers=layers_, batch_size=len(x), **STEP_SETTINGS)
    threat = ThreatModel.parse("W2-Linf:8/255")
    setup = prepare(checkpoint.model, method, threat, settings, machine.accelerator, "none", 64)
    assert setup.tracker is not None
    setup.tracker.measure(torch.ones(64), 64)
    set_train_mode(setup)
    reached: set[str] = set()  # by a gradient: beside the large ones of random weights, small ones move nothing in fp32
    hooks = [
        weight.register_post_accumulate_grad_hook(_note_gradient(name, reached))
        for name, weight in net.named_parameters()
        if weight.requires_grad
    ]
    losses, _ = take_step(setup, iter([(x, y)]), 0)
    for hook in hooks:
        hook.remove()
    machine.accelerator.free_memory()
    checkpoint.model.eval().requires_grad_(True)
    net.zero_grad()  # the gradients of a large network are as large as its weights
    if not losses["total"] == losses["total"] or abs(losses["total"]) == float("inf"):
        raise AssertionError(f"the loss is {losses['total']}")
    moved = {name for name, value in net.state_dict().items() if not torch.equal(_some(value), before[name])}
    if layers_ == "last" and moved - chosen:
        raise AssertionError(f"the last-layer step moved {sorted(moved - chosen)[:3]}")
    if not moved & chosen:
        raise AssertionError("the step moved no weight")
    if layers_ == "full" and len(reached) < 0.5 * len(list(net.parameters())):
        raise AssertionError(f"the full step reached {len(reached)} of {len(list(net.parameters()))} tensors")
    return round(losses["total"], 4)


def _note_gradient(name: str, reached: set[str]) -> Callable[[torch.Tensor], None]:
    def note(weight: torch.Tensor) -> None:
        if weight.grad is not None and weight.grad.abs().max() > 0:
            reached.add(name)

    return note


def _some(value: torch.Tensor) -> torch.Tensor:
    """A copy of 4096 numbers of a tensor, or of all."""
    return value.detach().flatten()[:: max(1, value.numel() // 4096)].clone()


# ----------------------------------------------------------------------------------------- the process that reads back


class Reader:
    """A process of its own that reads exported folders back, as a user of timm would."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.served = 0

    def read(self, folder: Path) -> None:
        """Raise unless the other process gets the logits in folder/expected.safetensors from the folder's model."""
        if self.process is None or self.served >= 200:
            self.close()
            command = [sys.executable, __file__, "--read-back"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.served = 0
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.served += 1
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer != "same":
            raise AssertionError(f"read back in another process: {answer or 'it died'}")

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def read_back() -> None:
    """Answer `same`, or what differs, for every folder named on a line of stdin. Knows timm, and `import robustify`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    import timm
    from safetensors.torch import load_file

    import robustify  # noqa: F401 (registers RobustBench's architectures with timm)

    for line in sys.stdin:
        folder = Path(line.strip())
        try:
            config = json.loads((folder / "config.json").read_text())
            cfg = config["pretrained_cfg"]
            with warnings.catch_warnings(), quick_initialisation():
                warnings.simplefilter("ignore")
                net = timm.create_model(
                    config["architecture"],
                    num_classes=config["num_classes"],
                    pretrained_cfg=cfg,
                    checkpoint_path=str(folder / "model.safetensors"),
                    **config.get("model_args", {}),
                ).eval()
            expected = load_file(folder / "expected.safetensors")
            mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
            plain = not any(cfg["mean"]) and all(s == 1 for s in cfg["std"])
            with torch.no_grad():
                found = net(expected["x"] if plain else (expected["x"] - mean) / std)
            gap = (found - expected["logits"]).abs().max()
            rounded = gap <= 1e-5 * expected["logits"].abs().max()  # as weights may lie elsewhere in memory
            answer = "same" if rounded else f"the logits differ by up to {gap:g}"
            del net
        except Exception as error:
            answer = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(answer, file=answers, flush=True)


# ---------------------------------------------------------------------------------------------------------- the run


@contextlib.contextmanager
def machine(memory: float | None = None, folder: Path | None = None) -> Iterator[Machine]:
    """The sweep's surroundings: an empty hub without a network, a scratch folder. memory: bytes, what is free if None."""
    from huggingface_hub import constants

    from robustify.distributed import make_accelerator
    from robustify.sources import robustbench

    robustbench.unlisted()  # imports it
    torch.set_num_threads(1)
    before = (constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE)
    with tempfile.TemporaryDirectory(dir=folder, prefix="sweep-") as scratch:
        surroundings = {"HF_HUB_OFFLINE": "1", "TORCH_HOME": f"{scratch}/torch"}
        was = {key: os.environ.get(key) for key in surroundings}
        os.environ |= surroundings
        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, f"{scratch}/hub"
        reader = Reader()
        try:
            gc.collect()
            gc.freeze()  # a third of the sweep's time went into looking at the libraries' objects again and again
            yield Machine(Path(scratch), memory or free_memory(), reader, make_accelerator())
        finally:
            reader.close()
            gc.unfreeze()
            constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = before
            for key, value in was.items():
                os.environ.pop(key, None)
                os.environ |= {key: value} if value is not None else {}


def free_memory() -> float:
    """Return the bytes that programs may still take, files in the cache given up."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def give_back_memory() -> None:
    """Return what is freed to the system, where the C library can: it would keep what the largest network has needed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def quick_initialisation() -> Iterator[None]:
    """Large tensors take their first random numbers from a pool, at a place that no other process will hit again."""
    import timm.layers.weight_init as init

    pool = torch.randn(1_000_003)
    flat = torch.erf(pool / 2**0.5)  # uniform in (-1, 1)
    real = (torch.Tensor.normal_, torch.Tensor.uniform_, nn.init._no_grad_trunc_normal_, init._trunc_normal_)
    where = random.SystemRandom()

    def fill(tensor: torch.Tensor, numbers: torch.Tensor, mean: float, scale: float) -> torch.Tensor:
        rest, start = tensor.detach().view(-1), where.randrange(len(numbers))
        while len(rest):
            part = numbers[start : start + len(rest)]
            rest[: len(part)] = part
            rest, start = rest[len(part) :], 0
        return tensor.mul_(scale).add_(mean)

    @torch.no_grad()
    def normal(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0, **more: Any):
        if tensor.numel() < 10_000 or not tensor.is_contiguous():
            return real[0](tensor, mean, std)
        return fill(tensor, pool, mean, std)

    @torch.no_grad()
    def uniform(tensor: torch.Tensor, low: float = 0.0, high: float = 1.0, **more: Any):
        if tensor.numel() < 10_000 or not tensor.is_contiguous():
            return real[1](tensor, low, high)
        return fill(tensor, flat, (low + high) / 2, (high - low) / 2)

    torch.Tensor.normal_, torch.Tensor.uniform_ = normal, uniform  # pyright: ignore[reportAttributeAccessIssue]
    nn.init._no_grad_trunc_normal_ = init._trunc_normal_ = normal
    try:
        yield
    finally:
        torch.Tensor.normal_, torch.Tensor.uniform_ = real[:2]
        nn.init._no_grad_trunc_normal_, init._trunc_normal_ = real[2:]


def _size(row: dict[str, Any]) -> int:
    """How many weights the model has, at its full size."""
    return row.get("full") or row.get("parameters", 0)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last row of every model; one with fewer blocks that did not pass says nothing of the model."""
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {row["name"]: row for row in rows if not row.get("args") or row["outcome"] == "narrowed"}


_NEEDED = f"a model takes {COPIES} times its weights and {BASE / 1e9:.0f} GB, mostly while it is exported."
BY_HAND = "\n<!-- what follows is written by hand -->\n"
COUNTED = (*OUTCOMES, "narrowed", "not reached")


def table(rows: dict[str, dict[str, Any]], every: list[dict[str, Any]], command: str) -> str:
    """Return the page about the outcomes: how many of which, and each that neither passed nor was the same."""
    import timm

    def outcome(entry: dict[str, Any]) -> str:
        found = rows.get(entry["name"], {}).get("outcome")
        return found if found in COUNTED else "not reached"

    def line(name: str, entries: list[dict[str, Any]]) -> str:
        counts = collections.Counter(map(outcome, entries))
        tried = sum(counts[o] for o in ("passed", "same", "refused", "failed"))
        good = counts["passed"] + counts["same"]
        share = f"{100 * good / tried:.1f} %" if tried else ""
        return f"| {name} | {len(entries)} | {tried} | {' | '.join(str(counts[o]) for o in COUNTED)} | {share} |"

    parts = {p: [e for e in every if e["name"].startswith(p)] for p in ("robustbench", "timm")}
    families: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for entry in parts["timm"]:
        families[entry["family"].removeprefix("timm ")].append(entry)
    head = "| | there are | tried | " + " | ".join(COUNTED) + " | passed or same, of those tried |"
    versions = f"timm {timm.__version__}, torch {torch.__version__}"
    about = (__doc__ or "").split("For every entry")[1].split("The order is")[0]
    reached = [name for name, entries in families.items() if any(outcome(e) in ("passed", "same") for e in entries)]
    others = [e for e in every if outcome(e) in ("refused", "failed")]
    large = [rows[e["name"]]["parameters"] for e in every if outcome(e) == "too large"]
    sizes = [_size(rows[e["name"]]) for e in every if outcome(e) in ("narrowed", "not reached") and e["name"] in rows]
    passed = [rows[e["name"]].get("parameters", 0) for e in every if outcome(e) == "passed"]
    lines = [
        "# Coverage: what comes in, trains, goes out and comes back", "", f"    {command}", f"    {command} --narrow", "",
        f"With {versions}. For every entry{about.rstrip()}", "",
        head, "|---" * (len(COUNTED) + 4) + "|", line("RobustBench", parts["robustbench"]), line("timm", parts["timm"]), "",
        f"Of timm's {len(families)} families, {len(reached)} have a member that passed.", "",
        f"The largest that passed has {max(passed, default=0):,} weights.", "",
        *([f"{len(sizes)} models of {min(sizes):,} weights and more were not tried at their full size."] if sizes else []),
        *([f"{len(large)} of {min(large):,} and more are too large for this machine's memory: {_NEEDED}"] if large else []), "",
        "`not reached` has not been tried: the command goes on there, and `--table` writes this page anew. The rows were made",
        "while the code was being repaired; those that failed were repeated afterwards, those that passed were not.", "",
        "## Refused and failed", "", "| model | outcome | stage | reason |", "|---|---|---|---|",
        *(
            f"| `{e['name']}` | {outcome(e)} | {rows[e['name']]['stage']} | {_cell(rows[e['name']]['reason'])} |"
            for e in sorted(others, key=lambda e: e["name"])
        ),
        "", "## timm's families", "", head.replace("| |", "| family |", 1), "|---" * (len(COUNTED) + 4) + "|",
        *(line(name, entries) for name, entries in sorted(families.items())), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]


def run(args: argparse.Namespace) -> None:
    """Sweep what the rows lack, until done or out of time."""
    import timm

    wanted = every_model()
    if args.only:
        wanted = [entry for entry in wanted if any(part in entry["name"] for part in args.only)]
    if args.sample:
        wanted = random.Random(args.seed).sample(wanted, min(args.sample, len(wanted)))
    which, of = map(int, args.share.split("/"))
    wanted = wanted[which - 1 :: of]
    rows = read_rows(args.out)
    again = () if args.retry is None else tuple(args.retry)
    tried = {name for name, row in rows.items() if row["outcome"] in OUTCOMES and row["outcome"] not in again}
    todo = [e for e in wanted if e["name"] not in tried]
    if args.narrow:
        todo = [e for e in todo if rows.get(e["name"], {}).get("outcome") != "narrowed"]
    todo.sort(key=lambda e: _size(rows.get(e["name"], {})))  # what was too large: the smaller ones first
    deadline = time.monotonic() + args.time_limit * 60 if args.time_limit else float("inf")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with machine(args.memory * 1e9 if args.memory else None, args.scratch) as here, open(args.out, "a") as file:
        here.seen = {row["signature"]: row["name"] for row in rows.values() if row.get("signature")}
        for done, entry in enumerate(todo, 1):
            if time.monotonic() > deadline:
                print(f"out of time: {len(todo) - done + 1} left", file=sys.stderr)
                break
            chosen = narrowed(entry) if args.narrow else entry
            if chosen is None:
                continue
            row = {**sweep(chosen, here), "timm": timm.__version__, "torch": torch.__version__}
            file.write(json.dumps(row) + "\n")
            file.flush()
            told = f"{row['outcome']} {row.get('reason', '')}"[:160]
            print(f"{done}/{len(todo)} {row['name']} {row['seconds']} s: {told}", file=sys.stderr, flush=True)
            gc.collect()
            give_back_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the rows, one JSON a line; finished ones are not repeated")
    parser.add_argument("--sample", type=int, help="so many models, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="models with one of these in their name")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="every Nth model from the Kth on: N sweeps, one file")
    parser.add_argument("--narrow", action="store_true", help="those without a row of their full size, with fewer blocks")
    parser.add_argument("--retry", nargs="*", metavar="OUTCOME", help="repeat the rows with these outcomes")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES")
    parser.add_argument("--memory", type=float, metavar="GB", help="what a model may need, if not all that is free")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only write the page about the rows there are")
    parser.add_argument("--read-back", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read_back:
        read_back()
    elif args.out is None:
        parser.error("--out is needed")
    elif args.table:
        page = table(read_rows(args.out), every_model(), f"python benchmarks/sweep_models.py --out {args.out.name}")
        _, by_hand, kept = (args.table.read_text() if args.table.exists() else "").partition(BY_HAND)
        args.table.write_text(page + by_hand + kept)
    else:
        run(args)


if __name__ == "__main__":
    main()
