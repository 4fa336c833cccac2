"""DAT's claim in small: does LAMB with a global batch of 2048 reach what SGD reaches with 128, in as many epochs?

    OMP_NUM_THREADS=1 python benchmarks/large_batch.py --data npz:cifar.npz -o results/large
    OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc-per-node 2 \\
        benchmarks/large_batch.py --data npz:cifar.npz --compress qsgd -o results/large

Every line of the table trains a small network without BatchNorm (61,318 weights, images of 16 x 16 pixels) from random weights
by fast-at. Each rate is tried with seed 0; the one with the best held-out robust accuracy is trained with the other seeds too,
which change weights, order and noise. The test images play no part in the choice. A batch of 2048 is made of 4 passes of 512,
which without BatchNorm is the same to rounding as 4 processes of 512. Under several processes the chosen LAMB line is trained
with compressed gradients. A finished run is a line of OUT.jsonl and is not run again; --tables prints what is there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import append, fit, read
from torch import nn

from robustify import data as datasets
from robustify.data import Data, Resident, Split
from robustify.distributed import World, make_accelerator
from robustify.evaluation import evaluate
from robustify.events import EpochEnd, Event
from robustify.methods import FastAt
from robustify.pixels import PixelModel
from robustify.report import Report, wilson
from robustify.threat import ThreatModel

ATTACKS = ("apgd-ce:steps=20", "apgd-t:steps=20,targets=3")
PASS, PROBE, SIDE = 512, 1000, 16  # images a pass at most; held-out images; pixels


@dataclass(frozen=True)
class Line:
    """A line of the table. rates: the learning rates that are tried."""

    label: str
    batch: int
    optimizer: str
    rates: tuple[float, ...]
    train: tuple[tuple[str, Any], ...] = ()


LINES = (
    Line("SGD, 128", 128, "sgd", (0.02, 0.05)),
    Line(
        "LAMB, 2048",
        2048,
        "lamb",
        (0.01, 0.02, 0.04, 0.08),
        (("weight_decay", 1e-4), ("trust_clip", True), ("warmup_epochs", 2)),
    ),
    # 2 to 16 times 0.05: below root scaling to linear scaling
    Line("SGD, 2048", 2048, "sgd", (0.1, 0.2, 0.4, 0.8), (("warmup_epochs", 2),)),
)
COMPRESSED = LINES[1]


def untrained(seed: int) -> PixelModel:
    """The network with the random weights of a seed."""
    torch.manual_seed(seed)
    return PixelModel(nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 100), nn.ReLU(), nn.Linear(100, 10),
    ))  # fmt: skip


def resized(name: str) -> Data:
    """The data with its images at SIDE pixels, once for all."""
    data = datasets.load(name, input_size=(3, SIDE, SIDE))

    def small(split: Split) -> Split:
        x, y = split.batch(range(len(split)))
        return Resident(x, y, (SIDE, SIDE))

    return replace(data, train=small(data.train), val=small(data.val), test=small(data.test))


def held(report: Report) -> str:
    """Which test images withstand every attack of the report: a bit each, as hex digits."""
    verdicts = [verdict for key, verdict in report.verdicts.items() if key != "clean"]
    return np.packbits(np.logical_and.reduce(verdicts)).tobytes().hex()


def run(line: Line, rate: float, compress: str, seed: int, data: Data, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure once. Returns the row; `held` has a bit for every test image."""
    model, curve = untrained(seed), []
    payload: list[float] = []

    def tell(event: Event) -> None:
        if isinstance(event, EpochEnd):
            curve.append([event.epoch, event.clean, event.robust])
            payload.extend(event.extra[key] for key in ("gradient_bytes_per_step",) if key in event.extra)

    settings = {
        "init": "reinit", "epochs": given.epochs, "probe_images": PROBE, "seed": seed, "batch_size": line.batch,
        "lr": rate, "optimizer": line.optimizer, "compress": compress, **dict(line.train),
        "accumulate": max(1, line.batch // (PASS * int(os.environ.get("WORLD_SIZE", "1")))),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        outcome = fit(model, data, FastAt(), given.threat, Path(folder), tell, **settings)
    threat = ThreatModel.parse(given.threat)
    world = World(make_accelerator())
    report = evaluate(model, data.test, ["clean", *ATTACKS], threat, n=min(given.n, len(data.test)), world=world)
    robust, clean = report.headline(threat.spec), report.clean
    assert clean is not None
    return {
        "label": line.label, "rate": rate, "compress": compress, "processes": world.size, "seed": seed, "epochs": given.epochs,
        "steps": outcome.steps, "train_images": len(data.train), "val": outcome.best, "val_images": min(PROBE, len(data.val)),
        "n": clean.n, "clean": clean.accuracy, "robust": robust.accuracy, "held": held(report),
        "threat": given.threat, "gradient_bytes": payload[0] if payload else 0.0, "seconds": outcome.seconds, "curve": curve,
    }  # fmt: skip


def best_rate(rows: list[dict[str, Any]], label: str) -> float:
    """The rate whose run with seed 0 was the most robust on the held-out images."""
    tried = [row for row in rows if row["label"] == label and row["seed"] == 0 and row["compress"] == "none"]
    return max(tried, key=lambda row: row["val"])["rate"]


def group(rows: list[dict[str, Any]], label: str, rate: float, compress: str) -> list[dict[str, Any]]:
    found = [row for row in rows if (row["label"], row["rate"], row["compress"]) == (label, rate, compress)]
    return sorted(found, key=lambda row: row["seed"])


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Robust accuracy of b less that of a, (mean over the seeds that both have, low, high): 95 % over the test images."""
    bits = [
        [np.unpackbits(np.frombuffer(bytes.fromhex(row["held"]), np.uint8))[: row["n"]] for row in rows]
        for rows in (a, b)
    ]
    seeds = min(map(len, bits))
    gain = np.mean(bits[1][:seeds], 0) - np.mean(bits[0][:seeds], 0)
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    return float(gain.mean()), float(gain.mean() - half), float(gain.mean() + half)


def tables(rows: list[dict[str, Any]]) -> str:
    """What was tried with seed 0, and the chosen rates over the seeds against the first line."""
    tried = ["| line | rate | held-out robust % | clean % | robust % |", "|" + "---|" * 5]
    for row in rows:
        if row["seed"] == 0 and row["compress"] == "none":
            figures = [f"{100 * row[key]:.1f}" for key in ("val", "clean", "robust")]
            tried.append(f"| {row['label']} | {row['rate']:g} | {' | '.join(figures)} |")
    heads = [
        "line",
        "rate",
        "gradients",
        "steps",
        "seeds",
        "clean %",
        "robust %",
        "95 %",
        "of the seeds",
        "less the first, points",
    ]
    chosen = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    first: list[dict[str, Any]] = []
    for label, compress in dict.fromkeys((row["label"], row["compress"]) for row in rows):
        rate = best_rate(rows, label)
        mine = group(rows, label, rate, compress)
        first = first or mine
        robust, n = [row["robust"] for row in mine], mine[0]["n"]
        low, high = (100 * share for share in wilson(statistics.mean(robust) * n, n))
        clean = 100 * statistics.mean(row["clean"] for row in mine)
        gain = "" if mine is first else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * d for d in difference(first, mine)))
        spread = f"{100 * min(robust):.1f} to {100 * max(robust):.1f}"
        chosen.append(
            f"| {label} | {rate:g} | {compress} | {mine[0]['steps']} | {len(mine)} | {clean:.1f} | "
            f"{100 * statistics.mean(robust):.1f} | [{low:.1f}, {high:.1f}] | {spread} | {gain} |"
        )
        if compress != "none":
            plain = group(rows, label, rate, "none")
            gain = "{:+.2f} points [{:+.2f}, {:+.2f}]".format(*(100 * d for d in difference(plain, mine)))
            chosen.append(
                f"\n{compress} against none, {label}: {gain}, {mine[0]['gradient_bytes']:,.0f} bytes a step\n"
            )
    return "\n".join([*tried, "", *chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as in robustify finetune --data: CIFAR-10 pictures")
    parser.add_argument("--lines", nargs="*", default=[line.label for line in LINES])
    parser.add_argument("--compress", default="none", help="under several processes: the LAMB line, with this")
    parser.add_argument("--threat", default="Linf:4/255")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=3000, help="test images")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("-o", "--out", type=Path, default=Path("large_batch"))
    given = parser.parse_args()
    path = given.out.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    data = None if given.tables else resized(given.data)

    def ensure(line: Line, rate: float, seed: int) -> None:
        assert data is not None
        if any(row["seed"] == seed for row in group(rows, line.label, rate, given.compress)):
            return
        row = run(line, rate, given.compress, seed, data, given)
        rows.append(row)
        if os.environ.get("RANK", "0") == "0":
            append(path, row)
            said = ", ".join(f"{key} {row[key]:.3f}" for key in ("val", "clean", "robust"))
            print(
                f"{line.label} {rate:g} {given.compress} seed {seed}: {said}, {row['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    if data is not None:
        lines = [line for line in LINES if line.label in given.lines] if given.compress == "none" else [COMPRESSED]
        if given.compress == "none":
            for line in lines:
                for rate in line.rates:
                    ensure(line, rate, seed=0)
        for seed in range(given.seeds):
            for line in lines:
                ensure(line, best_rate(rows, line.label), seed)
    if os.environ.get("RANK", "0") == "0":
        print(tables(rows))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
