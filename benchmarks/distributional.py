"""W-PGD, the knapsack attack and its dual on the real networks: a table and a JSON.

    OMP_NUM_THREADS=1 ROBUSTIFY_ASSETS=FOLDER python benchmarks/distributional.py --norm Linf -o results/linf

Writes OUT.md, OUT.json and OUT.npz (flip distances by network). Everything is on the first n images of the exact test
sets, in float32, W_2; each adversarial image is classified again by a forward pass of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustify import files
from robustify.attacks import w_pgd
from robustify.bounds import accuracy_estimates
from robustify.duality import PointwiseCurve, distributional_accuracy
from robustify.environment import environment
from robustify.evaluation import counted
from robustify.flips import flip_distances, recheck
from robustify.knapsack import worst_accuracy
from robustify.threat import ThreatModel

ROBUST = {"Linf": [2 / 255, 4 / 255, 8 / 255], "L2": [0.1, 0.25, 0.5]}
STANDARD = {"Linf": [0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255], "L2": [0.02, 0.05, 0.1, 0.25, 0.5]}
DIGITS = {"Linf": [0.1, 0.2, 0.3], "L2": [0.5, 1.0, 2.0]}
NETWORKS = {
    "resnet2b2_adv8": ROBUST, "resnet2b2_adv4": ROBUST, "resnet2b_adv2": ROBUST, "cnn_a_adv2": ROBUST,
    "mnist_trades": DIGITS, "resnet32_standard": STANDARD,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf")
    parser.add_argument("--n", type=int, default=446)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("-o", "--out", default="distributional")
    given = parser.parse_args()
    load = assets()
    rows: list[dict[str, Any]] = []
    distances: dict[str, np.ndarray] = {}
    for name in given.networks:
        x, y = (part[: given.n] for part in load.images(load.MODELS[name][4]))
        more, distances[name] = measure(load.model(name), x, y, given.norm, NETWORKS[name][given.norm])
        rows += [{"network": name, "n": len(x), **row} for row in more]
        write(Path(given.out), rows, distances, given.norm)
        print(f"{name}: done", file=sys.stderr, flush=True)
    print(table(rows, given.norm))


def assets() -> Any:
    folder = Path(os.environ["ROBUSTIFY_ASSETS"]).resolve()
    sys.path.insert(0, str(folder))  # load.py imports its neighbour
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(
    model: Any, x: torch.Tensor, y: torch.Tensor, norm: Any, deltas: list[float]
) -> tuple[list[dict], np.ndarray]:
    begin = time.perf_counter()
    with counted(model) as passes:
        flips = flip_distances(model, x, y, norm=norm)
    seconds = time.perf_counter() - begin
    assert bool(recheck(model, x, y, flips, batch_size=64).all()), "a flip does not hold in other batches"
    d = flips.distances.numpy()
    curve = PointwiseCurve.from_distances(d)
    first_order = accuracy_estimates(model, x, y, deltas, norm=norm)
    rows = []
    for k, delta in enumerate(deltas):
        x_adv = w_pgd(model, x, y, threat=ThreatModel(norm, delta, 2.0))
        with torch.no_grad():
            held = torch.cat([model(part) for part in x_adv.split(256)]).argmax(1) == y
        dual, t = distributional_accuracy(curve, delta, 2.0)
        rows.append({
            "delta": delta, "clean": float(np.mean(d > 0)), "pointwise": curve.at(delta),
            "first_order_lower": float(first_order.lower[k]), "w_fgsm": float(first_order.upper[k]),
            "w_pgd": float(held.double().mean()), "knapsack": worst_accuracy(d, delta, 2.0), "dual": dual, "t": t,
            "search_passes": passes.per_image(len(x)), "search_seconds": seconds,
        })  # fmt: skip
        print({key: round(v, 4) for key, v in rows[-1].items() if isinstance(v, float)}, file=sys.stderr, flush=True)
    return rows, d


def table(rows: list[dict[str, Any]], norm: str) -> str:
    unit = 255 if norm == "Linf" else 1
    heads = ["network", "n", "delta", "clean", "pointwise", "W-FGSM", "W-PGD", "knapsack", "first-order lower", "t"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        keys = ("clean", "pointwise", "w_fgsm", "w_pgd", "knapsack", "first_order_lower")
        figures = [f"{100 * row[key]:.1f}" for key in keys]
        digits = row["network"].startswith("mnist") and norm == "Linf"
        scale, suffix = (1, "") if digits or unit == 1 else (255, "/255")
        delta = f"{row['delta'] * scale:.4g}{suffix}"
        t = "all" if row["t"] == float("inf") else f"{row['t'] * scale:.3g}{suffix}"
        lines.append("| " + " | ".join([row["network"], str(row["n"]), delta, *figures, t]) + " |")
    return "\n".join(lines)


def write(out: Path, rows: list[dict[str, Any]], distances: dict[str, np.ndarray], norm: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    finite = [{k: (v if v != float("inf") else None) for k, v in row.items()} for row in rows]
    files.write_json(out.with_suffix(".json"), {"norm": norm, "p": 2, "environment": environment(), "rows": finite})
    files.write_text(out.with_suffix(".md"), table(rows, norm) + "\n")
    np.savez_compressed(out.with_suffix(".npz"), **distances)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
