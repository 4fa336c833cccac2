"""Several processes against one: throughput, exactness, bytes on the wire; step_time.py's formulas against what is measured.

    export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/scaling.py -o scaling
    python -m torch.distributed.run --standalone --nproc-per-node 8 benchmarks/scaling.py --batch 2048 -o scaling

One set of processes takes turns, round after round, so that a drift of the machine's speed meets all alike:

    one, a core     the first process alone with its share of the batch, one thread
    one, all cores  the first process alone with the whole batch and as many threads as there are processes (not on GPUs)
    apart           every process with its share and no exchange: what the cores can do
    none, ...       every process with its share, gradients exchanged by DDP under each hook

The others wait at a barrier meanwhile. Every call adds to OUT.jsonl; --tables prints what is there. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from field import read
from step_time import buckets, step_seconds
from torch import Tensor

from robustify import layers, sources
from robustify.compression import BUCKET, GradientHook, Quantised, attach, gradient_bytes, quantise
from robustify.distributed import World, make_accelerator
from robustify.environment import environment
from robustify.methods import METHODS
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.step import Setup, prepare, set_train_mode, take_step
from robustify.threat import ThreatModel

HOOKS = ("none", "fp16", "bf16", "power_sgd", "qsgd")
SIZES = [2**k for k in (12, 18, 20, 22, 24, 25)]  # bytes, for the link
PARTS = ("exact", "link", "own", "rounds")


def make_setup(model: PixelModel, given: argparse.Namespace, batch: int, **settings: Any) -> Setup:
    model = copy.deepcopy(model)
    layers.select(model.net, "full", [])
    method = METHODS[given.method]()
    threat = ThreatModel.parse("Linf:8/255")
    s = TrainSettings(batch_size=batch, lr=1e-3, **settings)
    setup = prepare(model, method, threat, s, make_accelerator(s.precision), "crop-flip", batch)
    setup.hook = attach(
        setup.forward,
        s.compress,
        torch.rand(2, *given.size, device=setup.world.device),
        seed=0,
        error_feedback=False,
        rank=2,
    )
    if setup.hook is not None and setup.hook.power_sgd is not None:
        setup.hook.power_sgd.iter = 10  # past its plain steps
    set_train_mode(setup)
    return setup


def alone(setup: Setup) -> Setup:
    """The same network and optimiser as a world of its own: DDP is passed by."""
    return replace(setup, forward=setup.forward.module, world=World(), hook=None)


def a_batch(size: tuple[int, ...], rows: slice, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This process's rows of a random batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, *size, generator=generator, dtype=dtype), torch.randint(10, (batch,), generator=generator)
    return x[rows], y[rows]


def exact(model: PixelModel, given: argparse.Namespace, world: World) -> dict[str, Any]:
    """Three steps of the whole batch on one process, and of its shares on all: the weights' largest difference over their
    largest change."""
    row: dict[str, Any] = {"part": "exact", "processes": world.size, "steps": 3, "method": given.method}
    batch = 4 * world.size
    for dtype in (torch.float64, torch.float32):
        weights = []
        for together in (False, True):
            setup = make_setup(copy.deepcopy(model).to(dtype), given, batch, batchnorm="frozen")
            setup = setup if together else alone(setup)
            x, y = (t.to(world.device) for t in a_batch(given.size, setup.world.rows(batch), batch, dtype))
            for step in range(3):
                take_step(setup, iter([(x, y)]), step)
            weights.append(torch.cat([w.detach().flatten() for w in setup.model.parameters()]))
        first = torch.cat([w.detach().to(world.device, dtype).flatten() for w in model.parameters()])
        apart, moved = (float((weights[0] - other).abs().max()) for other in (weights[1], first))
        row[str(dtype).removeprefix("torch.")] = apart / moved
    return row


def timed(world: World, work: Callable[[], object], mine: bool = True) -> float:
    """Seconds until every process is through; those for which it is not `mine` only wait."""
    synchronise = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    world.wait()
    begin = time.perf_counter()
    if mine:
        work()
        synchronise()
    world.wait()
    return time.perf_counter() - begin


def on_wire() -> int | None:
    """Bytes that went over the loopback so far, of all processes; None where Linux does not count them."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
        return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))
    except (OSError, StopIteration):
        return None


def link(world: World, repeats: int = 7) -> list[dict[str, Any]]:
    """Median seconds of each collective that the hooks use, by bytes."""
    rows, n, device = [], world.size, world.device

    def collective(name: str, size: int) -> Callable[[], object]:
        if name == "all_to_all":
            given, got = (torch.zeros(size // n * n, dtype=torch.int8, device=device) for _ in range(2))
            return lambda: dist.all_to_all_single(got, given)
        if name == "all_gather":
            given, got = (torch.zeros(size // n * k, dtype=torch.int8, device=device) for k in (1, n))
            return lambda: dist.all_gather_into_tensor(got, given)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name.split()[1]]
        tensor = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
        return lambda: dist.all_reduce(tensor)

    for name in ("all_reduce fp32", "all_reduce fp16", "all_reduce bf16", "all_to_all", "all_gather"):
        works = [(size, collective(name, size)) for size in SIZES]
        found: dict[int, list[float]] = {size: [] for size in SIZES}
        for turn in range(repeats + 1):
            for size, work in works:
                took = timed(world, work)
                if turn:
                    found[size].append(took)
        rows.append({"part": "link", "processes": n, "collective": name,
                     "points": [[size, statistics.median(times)] for size, times in found.items()]})  # fmt: skip
    return rows


def own(model: PixelModel, world: World, repeats: int = 5) -> dict[str, Any]:
    """Median seconds that each hook computes for the model's gradients, on all processes at once. none: what DDP copies."""
    device = world.device
    flat = torch.randn(gradient_bytes(model) // 4, device=device)
    other, mean = torch.empty_like(flat), flat[: len(flat) // world.size // BUCKET * BUCKET].view(-1, BUCKET)
    matrices = [w.detach().reshape(len(w), -1) for w in model.parameters() if w.dim() > 1]

    def copies() -> None:
        other.copy_(flat).div_(world.size)
        flat.copy_(other)

    def half(dtype: torch.dtype) -> None:
        other.copy_(flat.to(dtype).div_(world.size))

    def qsgd() -> None:
        values = torch.cat([flat, flat.new_zeros(-len(flat) % BUCKET)]).view(-1, BUCKET)
        mine = quantise(values, torch.rand_like(values))
        mine.values().mean(0)
        answer = quantise(mean, torch.rand_like(mean))
        Quantised(mine.codes, mine.norms).values()
        assert len(answer.norms)

    def power_sgd() -> None:  # P = MQ, orthogonalised; Q = M'P; the gradient is PQ' and the rest is kept
        for matrix in matrices:
            q = torch.ones(matrix.shape[1], 2, device=device)
            p = torch.linalg.qr(matrix @ q)[0]
            q = matrix.T @ p
            _ = matrix - p @ q.T

    works: dict[str, Callable[[], object]] = {
        "none": copies, "fp16": lambda: half(torch.float16), "bf16": lambda: half(torch.bfloat16),
        "power_sgd": power_sgd, "qsgd": qsgd,
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            took = timed(world, work)
            if turn:
                found[name].append(took)
    seconds = {name: statistics.median(times) for name, times in found.items()}
    return {"part": "own", "processes": world.size, "seconds": seconds}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def rounds(model: PixelModel, given: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """Seconds of every layout's step and bytes of every hook, round by round; the first warms up and is not given."""
    batch, share, cores = given.batch, given.batch // world.size, torch.get_num_threads()
    dtype = torch.float32
    together = {hook: make_setup(model, given, batch, compress=hook, precision=given.precision) for hook in HOOKS}
    parts = {"share": alone(make_setup(model, given, share, precision=given.precision)),
             "whole": alone(make_setup(model, given, batch, precision=given.precision))}  # fmt: skip
    mine, whole = (
        tuple(t.to(world.device) for t in a_batch(given.size, rows, batch, dtype))
        for rows in (world.rows(batch), slice(0, batch))
    )

    def step(setup: Setup, pair: tuple[Tensor, ...]) -> Callable[[], object]:
        return lambda: take_step(setup, iter([pair]), 1)

    for turn in range(given.rounds + 1):
        seconds = {"one, a core": timed(world, step(parts["share"], mine), world.is_main)}
        if world.device.type == "cpu":
            with threads(cores * world.size):
                seconds["one, all cores"] = timed(world, step(parts["whole"], whole), world.is_main)
        seconds["apart"] = timed(world, step(parts["share"], mine))
        wire: dict[str, float | None] = {}
        payload: dict[str, float] = {}
        for hook, setup in together.items():
            before = on_wire()
            seconds[hook] = timed(world, step(setup, mine))
            after = on_wire()
            wire[hook] = (
                None if before is None or after is None or world.device.type != "cpu" else (after - before) / world.size
            )
            payload[hook] = (
                setup.hook.payload() if isinstance(setup.hook, GradientHook) else float(gradient_bytes(model))
            )
        if turn:
            yield {"part": "round", "processes": world.size, "model": given.model, "method": given.method, "batch": batch,
                   "precision": given.precision, "gradient_bytes": gradient_bytes(model), "threads": cores,
                   "seconds": seconds, "wire": wire, "payload": payload,
                   "environment": environment(str(world.device))}  # fmt: skip


def fitted(row: dict[str, Any]) -> tuple[float, float]:
    """(seconds of a call, seconds a byte) through the points of a collective, by least squares of the relative errors."""
    sizes, seconds = np.array(row["points"]).T
    columns = np.stack([np.ones_like(sizes), sizes]) / seconds
    (call, byte), *_ = np.linalg.lstsq(columns.T, np.ones_like(sizes), rcond=None)
    return max(call, 0.0), byte


def exchange_seconds(hook: str, gradients: int, payload: float, links: dict[str, tuple[float, float]]) -> float:
    """Seconds of a step's exchange, by the fitted collectives."""

    def cost(name: str, calls: int, size: float) -> float:
        call, byte = links[name]
        return calls * call + byte * size

    pieces = len(buckets(gradients))
    if hook == "qsgd":  # codes and norms, twice
        return cost("all_to_all", 2 * pieces, payload) + cost("all_gather", 2 * pieces, payload)
    if hook == "power_sgd":  # what is not compressed, P, Q
        return cost("all_reduce fp32", 3 * pieces, payload)
    return cost("all_reduce " + ("fp32" if hook == "none" else hook), pieces, payload)


def tables(rows: list[dict[str, Any]]) -> str:
    """Ratios within each round, medians over the rounds; the model's prediction beside them."""
    lines = []
    for row in rows:
        if row["part"] == "exact":
            said = "{method}, {steps} steps, {processes} processes against one: weights differ by {float64:.1e} of"
            lines.append((said + " their largest change in fp64, {float32:.1e} in fp32").format(**row))
    links = {row["collective"]: fitted(row) for row in rows if row["part"] == "link"}
    for name, (call, byte) in links.items():
        lines.append(f"{name}: {1e6 * call:.0f} us a call, {1e-9 / byte:.2f} GB/s")
    done = [row for row in rows if row["part"] == "round"]
    if not done:
        return "\n".join(lines)
    computed = [row["seconds"] for row in rows if row["part"] == "own"]
    n, gradients = done[0]["processes"], done[0]["gradient_bytes"]
    names = list(done[0]["seconds"])

    def ratio(over: str, name: str) -> str:
        if over not in names:
            return ""
        found = sorted(row["seconds"][over] / row["seconds"][name] for row in done)
        return f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"

    apart = statistics.median(row["seconds"]["apart"] for row in done)
    lines.append(
        f"{n} processes, {done[0]['model']}, {done[0]['method']}, batch {done[0]['batch']}, {len(done)} rounds\n"
    )
    heads = ["layout", "seconds a step", "against apart", "against one process with all cores", "against one core, per core",
             "payload, bytes", "on the wire, bytes a process", "predicted s", "error"]  # fmt: skip
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in names:
        seconds = statistics.median(row["seconds"][name] for row in done)
        per_core = "" if name == "one, a core" else ratio("one, a core", name)
        cells = [name, f"{seconds:.3f}", ratio("apart", name) if name in (*HOOKS, "apart") else "",
                 ratio("one, all cores", name) if name not in ("one, a core", "one, all cores") else "", per_core]  # fmt: skip
        if name in HOOKS:
            payload = done[-1]["payload"][name]
            wires = [row["wire"][name] for row in done if row["wire"][name] is not None]
            cells += [f"{payload:,.0f}", f"{statistics.median(wires):,.0f}" if wires else ""]
            if links and computed:
                mine = computed[-1]["none"] + (computed[-1][name] if name != "none" else 0.0)
                predicted = step_seconds(apart, mine, exchange_seconds(name, gradients, payload, links))
                cells += [f"{predicted:.3f}", f"{100 * (predicted / seconds - 1):+.1f} %"]
        lines.append("| " + " | ".join([*cells, *[""] * (len(heads) - len(cells))]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="robustbench_cifar10_linf_sehwag2021proxy_r18", help="with random weights")
    parser.add_argument("--method", choices=METHODS, default="fast-at")
    parser.add_argument("--batch", type=int, default=64, help="images a step, over all processes")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("-o", "--out", type=Path, default=Path("scaling"))
    given = parser.parse_args()
    path = given.out.with_suffix(".jsonl")
    if given.tables:
        print(tables(read(path)))
        return
    world = World(make_accelerator())
    checkpoint = sources.load(given.model, pretrained=False)
    given.size, model = checkpoint.input_size, checkpoint.model

    def keep(row: dict[str, Any]) -> None:
        if world.is_main:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row.get("seconds", row)), file=sys.stderr, flush=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    if "exact" in given.part:
        keep(exact(model, given, world))
    for row in link(world) if "link" in given.part else ():
        keep(row)
    if "own" in given.part:
        keep(own(model.to(world.device), world))
    for row in rounds(model, given, world) if "rounds" in given.part else ():
        keep(row)
    if world.is_main:
        print(tables(read(path)))
    world.wait()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
