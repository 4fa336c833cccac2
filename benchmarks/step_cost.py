"""What a training step costs against the passes it cannot do without.

    python benchmarks/step_cost.py --out docs/step_cost.json

F is one forward pass, Bin and Bw the backward passes to the input and to the weights. Each method's floor is its formula
(docs/speed.md) in passes that are timed here, plain fp32, in the same run; the step is the real one of robustify.train,
with augmentation, optimiser and bookkeeping. Everything is timed in turn, round after round, so that a drift of the
machine's speed meets all alike; ratios of medians are printed. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from robustify import data as datasets
from robustify import layers, sources
from robustify.adversaries.random_radius import RandomRadius
from robustify.data import batches, from_tensors
from robustify.distributed import make_accelerator
from robustify.environment import environment
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.methods import FastAt, FreeAt, Gaat, Mart, MultiNorm, PgdAt, Trades, Wasserstein
from robustify.metrics import Metrics
from robustify.modes import Shadow, borrowed
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.sensitivity import UpsilonTracker
from robustify.step import Setup, prepare, set_train_mode, take_step
from robustify.threat import ThreatModel


def setup_for(model: PixelModel, method, precision: str, batch: int, awp: float | None = None) -> Setup:
    threat = ThreatModel.parse("W2-Linf:8/255" if method.distributional else "Linf:8/255")
    settings = TrainSettings(batch_size=batch, lr=1e-3, precision=precision, awp=awp)
    model = copy.deepcopy(model)
    layers.select(model.net, "full", [])
    setup = prepare(model, method, threat, settings, make_accelerator(precision), "crop-flip", batch)
    if isinstance(setup.tracker, UpsilonTracker):
        setup.tracker.measure(torch.ones(64), 64)
    set_train_mode(setup)
    return setup


def passes(model: PixelModel, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The plain passes, written as simply as torch allows; the last differentiates an input gradient again."""
    train = copy.deepcopy(model).train()

    def forward() -> None:
        with torch.no_grad(), borrowed(model):
            model(x)

    def to_input() -> None:
        with borrowed(model):
            inp = x.clone().requires_grad_(True)
            torch.autograd.grad(ce(model(inp), y).sum(), inp)

    def to_weights() -> None:
        ce(train(x), y).mean().backward()
        train.zero_grad()

    def twice() -> None:
        inp = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(ce(train(inp), y).sum(), inp, create_graph=True)
        g.square().sum().backward()
        train.zero_grad()

    return {"F": forward, "F+Bin": to_input, "F+Bw": to_weights, "F+Bin+Bw of it": twice}


def floor(name: str, steps: int, t: dict[str, float]) -> float:
    f, fin, fw, double = t["F"], t["F+Bin"], t["F+Bw"], t["F+Bin+Bw of it"]
    return {
        "fast-at": fin + fw,
        "fast-at grad_align": fin + fw + 2 * double,
        "free-at": fw,
        "gaat": 2 * fw,
        "gaat exact": double,
        "mart": steps * fin + 2 * fw,
        "pgd-at": steps * fin + fw,
        "pgd-at awp": steps * fin + 2 * fw,
        "multi-norm": steps * fin + fw,
        "trades": f + steps * fin + 2 * fw,
        "wasserstein": (steps + 1) * fin + 2 * fw,
        "wasserstein random-radius": f + steps * fin + 2 * fw,
    }[name]


def as_published(model: PixelModel, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """The step of locuslab/fast_adversarial (Wong et al. 2020), re-stated: both of its passes are in training mode and take the
    gradients of the weights, of which the attack needs none."""
    net = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    eps = 8 / 255

    def step() -> None:
        delta = ((2 * torch.rand_like(x) - 1) * eps).clamp(-x, 1 - x).requires_grad_(True)
        nn.functional.cross_entropy(net(x + delta), y).backward()
        assert delta.grad is not None
        moved = (delta.detach() + 1.25 * eps * delta.grad.sign()).clamp(-eps, eps).clamp(-x, 1 - x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x + moved), y).backward()
        optimizer.step()

    return step


def gradient_cosine(model: PixelModel, method, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Cosine between the parameter gradients of a bf16 and an fp32 step: same images, same noise, same weights."""
    found = []
    for precision in ("no", "bf16"):
        setup = setup_for(model, method, precision, len(batch[0]))
        setup.optimizer.zero_grad = lambda *_, **__: None
        setup.optimizer.step = lambda *_, **__: None
        take_step(setup, iter([batch]), 0)
        found.append(torch.cat([w.grad.float().flatten() for w in setup.model.parameters() if w.grad is not None]))
    return float(nn.functional.cosine_similarity(found[0], found[1], dim=0))


def overhead(setup: Setup, x: torch.Tensor, y: torch.Tensor, batch: int) -> float:
    """Seconds a step spends outside the network: reading the batch, augmenting, writing the log."""
    from robustify.augment import augment
    from robustify.rng import Draws

    pixels, labels = (x * 255).byte().cpu(), y.cpu()
    data = from_tensors((pixels, labels), (pixels, labels), (pixels, labels)).to(x.device)
    with tempfile.TemporaryDirectory() as folder:
        log = Metrics(Path(folder) / "metrics.jsonl", None)
        begin = time.perf_counter()
        for i, (images, _) in enumerate(batches(data.train, [list(range(batch))] * 20, x.device)):
            augment(images, "crop-flip", Draws(i, images.device))
            log.write(step=i, epoch=1, lr=0.1, total=1.0, ce=1.0, kl=1.0)
        took = (time.perf_counter() - begin) / 20
        log.close()
    return took


def compiled_gain(model: PixelModel, x: torch.Tensor, y: torch.Tensor, rounds: int) -> dict[str, float]:
    """F+Bin of the frozen bf16 shadow, eager and through torch.compile, in turn: medians, and what compiling took."""
    shadow = Shadow(model).model
    todo = {"eager": shadow, "compiled": torch.compile(shadow)}
    times: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds + 1):
        for name, net in todo.items():
            times[name].append(timed(lambda net=net: input_gradient(net, x, lambda logits: ce(logits, y))))
    first = times["compiled"][0]
    eager, fast = (statistics.median(times[name][1:]) for name in todo)
    return {"eager_s": eager, "compiled_s": fast, "gain": eager / fast, "first_call_s": first}


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as in robustify finetune --model")
    parser.add_argument("--random", action="store_true", help="random weights: times only, no cosine")
    parser.add_argument("--data", required=True, help="as in robustify finetune --data")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="K of the iterative attacks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", metavar="METHOD", help="these methods only, by the names of the table")
    parser.add_argument("--compile", action="store_true", help="also what torch.compile gains on the attack's passes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint = sources.load(args.model, pretrained=not args.random)
    model = checkpoint.model
    data = datasets.load(args.data, input_size=checkpoint.input_size)
    device = make_accelerator().device
    model.to(device)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: args.batch].tolist()
    x, y = (t.to(device) for t in data.train.batch(chosen))
    k = args.steps
    methods = {
        "fast-at": FastAt(), "fast-at grad_align": FastAt(grad_align=0.2), "free-at": FreeAt(replays=1), "gaat": Gaat(),
        "gaat exact": Gaat(gradient="exact"), "pgd-at": PgdAt(steps=k), "pgd-at awp": PgdAt(steps=k), "mart": Mart(steps=k),
        "multi-norm": MultiNorm(steps=k), "trades": Trades(steps=k), "wasserstein": Wasserstein(steps=k),
        "wasserstein random-radius": Wasserstein(steps=k, adversary=RandomRadius()),
    }  # fmt: skip
    methods = {label: method for label, method in methods.items() if not args.only or label in args.only}
    todo: dict[str, Callable[[], object]] = passes(model, x, y)
    todo["as published"] = as_published(model, x, y)
    for label, method in methods.items():
        twice = getattr(method, "second_derivatives", False)  # not in half precision
        for precision in ("no",) if twice else ("no", "bf16"):
            setup = setup_for(model, method, precision, args.batch, 0.005 if label.endswith("awp") else None)
            todo[f"{label} {precision}"] = lambda setup=setup: take_step(setup, iter([(x, y)]), 0)
    times: dict[str, list[float]] = {name: [] for name in todo}
    for round_ in range(args.rounds + 1):
        for name, work in todo.items():
            if name.startswith("F"):
                work()  # a pass inside a step finds its memory warm; so must the floor's
            took = timed(work)
            if round_:  # the first warms up
                times[name].append(took)
        print(f"round {round_} of {args.rounds}", file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for label, method in methods.items():
        low = floor(label, args.steps, median)
        fp32, bf16 = median[f"{label} no"], median.get(f"{label} bf16", math.nan)
        cosine = math.nan if args.random or math.isnan(bf16) else gradient_cosine(model, method, (x, y))
        rows.append(
            {
                "method": label,
                "floor_s": low,
                "fp32_over_floor": fp32 / low,
                "fp32_over_bf16": fp32 / bf16,
                "cosine": cosine,
            }
        )
    cheapest = min((name for name in median if name.endswith(" no")), key=lambda name: median[name])
    extra = overhead(setup_for(model, FastAt(), "no", args.batch), x, y, args.batch) / median[cheapest]
    print(
        f"{args.model}, batch {args.batch}, K = {args.steps}, {args.rounds} rounds, {torch.get_num_threads()} threads"
    )
    print(
        "F {F:.3f} s, F+Bin {0:.2f} F, F+Bw {1:.2f} F".format(
            median["F+Bin"] / median["F"], median["F+Bw"] / median["F"], **median
        )
    )
    print(f"{'method':18} {'floor s':>8} {'fp32/floor':>11} {'fp32/bf16':>10} {'gradient cosine':>16}")
    for row in rows:
        print(
            f"{row['method']:18} {row['floor_s']:8.2f} {row['fp32_over_floor']:11.3f} {row['fp32_over_bf16']:10.2f} "
            f"{row['cosine']:16.4f}"
        )
    published = median["as published"]
    if "fast-at" in methods:
        fp32, bf16 = (published / median[f"fast-at {precision}"] for precision in ("no", "bf16"))
        print(f"the published fast-at step: {published:.2f} s, {fp32:.2f} times ours in fp32, {bf16:.2f} times ours in bf16")
    print(f"data, augmentation and log: {100 * extra:.2f} % of a step of {cheapest.removesuffix(' no')}")
    compiled = compiled_gain(model, x, y, args.rounds) if args.compile else None
    if compiled:
        print("bf16 F+Bin: torch.compile {gain:.2f} times eager, first call {first_call_s:.0f} s".format(**compiled))
    if args.out:
        result = {
            "settings": vars(args) | {"out": None},
            "environment": environment(str(device)),
            "seconds": times,
            "rows": rows,
            "as_published_s": published,
            "overhead": {"of": cheapest, "share": extra},
            "compiled": compiled,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
