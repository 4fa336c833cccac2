"""Fine-tuning real networks: the wasserstein method against pointwise TRADES with the same data, steps and compute.

    OMP_NUM_THREADS=1 ROBUSTIFY_ASSETS=FOLDER python benchmarks/wasserstein.py --data folder:cifar10_jpeg -o results/wasserstein

Each network is fine-tuned by each arm with each seed; then the line from the loaded to the trained weights is measured on
held-out images, for the same distributional threat whatever the arm, and the most robust point that costs at most
--drop points of clean accuracy is measured once on the test images, beside the loaded network and the end of the line.
OUT/rows.jsonl gets a line per finished measurement and is never recomputed; OUT/*.npz the flip distances; --table prints the
tables: knapsack accuracy in W_2 balls, with intervals of a bootstrap over the test images, paired against the loaded network
and against pointwise TRADES.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributional import assets
from torch import nn

from robustify import data as datasets
from robustify import harden
from robustify.blend import between, choose, curve
from robustify.data import Data
from robustify.evaluation import evaluate, sample
from robustify.flips import flip_distances
from robustify.knapsack import worst_accuracy
from robustify.pixels import PixelModel
from robustify.threat import ThreatModel

# name: (data, delta of the training in W2-Linf, radii of the table); pointwise TRADES trains at twice delta, about the
# furthest distance t that the distributional adversary pays for
NETWORKS = {
    "resnet2b2_adv8": ("cifar10", 4 / 255, (2 / 255, 4 / 255, 8 / 255)),
    "resnet2b2_adv4": ("cifar10", 4 / 255, (2 / 255, 4 / 255, 8 / 255)),
    "resnet2b_adv2": ("cifar10", 2 / 255, (1 / 255, 2 / 255, 4 / 255)),
    "cnn_a_adv2": ("cifar10", 2 / 255, (1 / 255, 2 / 255, 4 / 255)),
    "mnist_trades": ("mnist", 0.15, (0.1, 0.15, 0.3)),
}
# networks without BatchNorm may diverge at this learning rate: their gradients are clipped, whatever the arm
UNNORMALISED = ("resnet2b_adv2", "cnn_a_adv2", "mnist_trades")
_W = {"name": "wasserstein", "steps": 7}
_OURS = {**_W, "adversary": "random-radius"}
_TRADES = {"name": "trades", "steps": 7}


def _budget(**settings: Any) -> dict[str, Any]:
    return {"method": {**_W, "adversary": {"name": "budget", **settings}}}


# radius: of pointwise TRADES and of W_inf, in units of delta; what else is not the method is a setting of `harden`
ARMS: dict[str, dict[str, Any]] = {
    "trades": {"method": _TRADES},
    "wasserstein": {"method": _OURS},
    "wasserstein-ce": {"method": {**_OURS, "inner_loss": "ce"}},
    "wasserstein-budget": _budget(),
    "wasserstein-batch": {"method": {**_W, "adversary": "batch"}},
    "wasserstein-dual": {"method": {**_W, "adversary": "dual"}},
    "wasserstein-knapsack": {"method": {**_W, "adversary": "knapsack"}},
    # what of the gain is not the random radius: every image at the same one (W_inf), by the same ascent, stopped or not
    "same-radius": {"method": {**_OURS, "adversary": {"name": "random-radius", "stop_at_flip": False}}, "p": math.inf},
    "same-radius-stopped": {"method": _OURS, "p": math.inf},
    "not-stopped": {"method": {**_OURS, "adversary": {"name": "random-radius", "stop_at_flip": False}}},
    "trades-last": {"method": _TRADES, "layers": "last"},
    "wasserstein-last": {"method": _OURS, "layers": "last"},
    # the trade-off by the method's own weights instead of the line
    "trades-narrow": {"method": _TRADES, "radius": 1.4},
    "trades-wide": {"method": _TRADES, "radius": 2.4},
    "trades-beta3": {"method": {**_TRADES, "beta": 3}},
    "trades-beta12": {"method": {**_TRADES, "beta": 12}},
    "wasserstein-beta3": {"method": {**_OURS, "beta": 3}},
    "wasserstein-beta12": {"method": {**_OURS, "beta": 12}},
    # the protocol
    "trades-ema": {"method": _TRADES, "ema": 0.995},
    "wasserstein-ema": {"method": _OURS, "ema": 0.995},
    "wasserstein-reinit": {"method": _OURS, "init": "reinit"},
    "wasserstein-noise": {"method": _OURS, "init": "noise"},
    "wasserstein-last-reinit": {"method": _OURS, "layers": "last", "init": "reinit"},
    # Upsilon's rules and the budgets' loss; wasserstein-budget is `window`, redlr, cap 3
    "budget-epoch": _budget(upsilon="epoch", images=None),
    "budget-epoch-2048": _budget(upsilon="epoch"),
    "budget-every-50": _budget(upsilon="every", every=50),
    "budget-importance-50": _budget(upsilon="importance", every=50),
    "budget-ema": _budget(upsilon="ema"),
    "budget-ce": _budget(loss="ce"),
    "budget-dlr": _budget(loss="dlr"),
    "budget-smooth": _budget(smooth=0.1),
    "budget-uncapped": _budget(cap=None),
    "budget-rescaled": _budget(rescale=True),
    "budget-tempered": _budget(temperature=0.5, rescale=True),
}
SEARCH = {"steps": 20, "targets": 3, "restarts": 1}  # of the test images: 80 passes an image
FURTHEST = 3.0  # of the table's largest radius: no adversary of these buys flips beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="CIFAR-10's pictures; MNIST's are the assets'")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--arms", nargs="*", default=["trades", "wasserstein"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--drop", type=float, default=3.0)
    parser.add_argument("--n", type=int, default=2000, help="test images")
    parser.add_argument("--pointwise", action="store_true", help="APGD-CE and APGD-T too, on 500 test images, seed 0 only")
    parser.add_argument("-o", "--out", type=Path, default=Path("wasserstein"))
    parser.add_argument("--w-pgd", action="store_true", help="W-PGD on the first seed's chosen networks")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.table:
        print(tables(given.out), lines(given.out), sep="\n\n")
        return
    load = assets()

    @cache
    def read(kind: str) -> Data:
        return _mnist(load) if kind == "mnist" else datasets.load(given.data)

    if given.w_pgd:
        w_pgd_of(given, load, read)
        return
    for seed in given.seeds:
        for name in given.networks:
            network, data = load.model(name), read(NETWORKS[name][0])
            if seed == given.seeds[0]:
                measure(given, name, "loaded", 0, 0.0, network, data)
            for arm in given.arms:
                run(given, name, arm, seed, network, data)


def run(given: argparse.Namespace, name: str, arm: str, seed: int, network: nn.Module, data: Data) -> None:
    """Fine-tune, measure the line on the held-out images, and the chosen point and the end on the test images."""
    delta = NETWORKS[name][1]
    w2 = ThreatModel("Linf", delta, 2.0)
    if _done(given.out, name, f"{arm} end", seed):
        return
    begin = time.perf_counter()
    spec = dict(ARMS[arm])
    pointwise = spec["method"]["name"] == "trades"
    # of every image: the pointwise ball, or W_inf
    same = ThreatModel("Linf", spec.pop("radius", 2.0) * delta, spec.pop("p", None))
    result = harden(
        copy.deepcopy(network),
        data,
        threat=same if pointwise or same.p else w2,
        attacks=["clean"],
        n=100,
        epochs=given.epochs,
        batch_size=128,
        lr=0.01,
        seed=seed,
        verify=False,
        clip_norm=1.0 if name in UNNORMALISED else None,
        keep="last",  # the line holds the start, and the choice on it is made on more images than the probe's
        **spec,
    )
    seconds = time.perf_counter() - begin
    start, end = network.state_dict(), {key: value.clone() for key, value in result.model.state_dict().items()}
    model = PixelModel(result.model)
    points = curve(model, start, end, data.val, w2, n=min(600, len(data.val)))
    chosen = choose(points, given.drop)
    facts = {"seconds": seconds, "points": [vars(point) for point in points], "best_epoch": result.outcome.best_epoch}
    model.net.load_state_dict(between(start, end, chosen.alpha))
    measure(given, name, arm, seed, chosen.alpha, model.net, data, **facts)
    model.net.load_state_dict(end)
    measure(given, name, f"{arm} end", seed, 1.0, model.net, data)
    torch.save(end, given.out / f"{name}-{arm}-{seed}.pt")


def measure(
    given: argparse.Namespace, name: str, arm: str, seed: int, alpha: float, net: nn.Module, data: Data, **facts: Any
) -> None:
    """Append the row of one network on the test images."""
    if _done(given.out, name, arm, seed):
        return
    _, _, radii = NETWORKS[name]
    model = PixelModel(net).eval()
    x, y = data.test.batch(sample(len(data.test), min(given.n, len(data.test)), 0))
    flips = flip_distances(model, x, y, norm="Linf", largest=FURTHEST * radii[-1], **SEARCH)
    d = flips.distances.numpy()
    np.savez_compressed(given.out / f"{name}-{arm.replace(' ', '-')}-{seed}.npz", distances=d)
    row = {
        "network": name, "arm": arm, "seed": seed, "alpha": alpha, "n": len(d), "clean": float((d > 0).mean()),
        "w2": {f"{r:.6g}": worst_accuracy(d, r, 2.0) for r in radii},
        "pointwise": {f"{r:.6g}": float((d > r).mean()) for r in radii}, "epochs": given.epochs, **facts,
    }  # fmt: skip
    if given.pointwise and seed == 0 and not arm.endswith("end"):
        eps = radii[-1] if name != "mnist_trades" else 0.3
        threat = ThreatModel("Linf", eps)
        report = evaluate(model, data.test, ["apgd-ce", "apgd-t"], threat, n=min(500, len(data.test)))
        worst = report.headline(threat.spec)
        row["apgd"] = {"eps": eps, "n": worst.n, "accuracy": worst.accuracy, "interval": worst.interval}
        np.savez_compressed(given.out / f"{name}-{arm}-apgd.npz", held=report.held(threat.spec))
    with open(given.out / "rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    told = f"clean {100 * row['clean']:.1f}, W2 " + " ".join(f"{100 * value:.1f}" for value in row["w2"].values())
    print(f"{name} {arm} seed {seed} alpha {alpha:g}: {told}", file=sys.stderr, flush=True)


def w_pgd_of(given: argparse.Namespace, load: Any, read: Callable[[str], Data]) -> None:
    """Write what W-PGD (50 steps) leaves of the loaded and of each arm's chosen network, seed 0, to OUT/w_pgd.json."""
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(given.out):
        name, arm = row["network"], row["arm"]
        if name not in given.networks or row["seed"] or arm.endswith(" end"):
            continue
        data, delta, _ = NETWORKS[name]
        network = load.model(name)
        if arm != "loaded":
            end = torch.load(given.out / f"{name}-{arm}-0.pt", weights_only=True)
            network.load_state_dict(between(network.state_dict(), end, row["alpha"]))
        w2 = ThreatModel("Linf", delta, 2.0)
        report = evaluate(PixelModel(network).eval(), read(data).test, ["clean", "w-pgd"], w2, n=row["n"], batch_size=row["n"])
        found[f"{name} {arm}"] = {"n": row["n"], "clean": report.rows[0].accuracy, "w_pgd": report.rows[1].accuracy}
        print(f"{name} {arm}: {found[f'{name} {arm}']}", file=sys.stderr, flush=True)
        (given.out / "w_pgd.json").write_text(json.dumps(found, indent=1) + "\n")


def _done(out: Path, name: str, arm: str, seed: int) -> bool:
    return any((row["network"], row["arm"], row["seed"]) == (name, arm, seed) for row in _rows(out))


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _mnist(load: Any) -> Data:
    return datasets.from_tensors(load.images("mnist", "train"), None, load.images("mnist", "test"), name="mnist")


def tables(out: Path) -> str:
    """Markdown: a row per network and arm, means over the seeds, with the paired differences at the middle radius."""
    rows = _rows(out)
    lines = [
        "| network | arm | seeds | n | clean | W2 at three radii | gain on loaded | gain on trades | APGD-CE + APGD-T |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        radii = NETWORKS[name][2]
        mine = [row for row in rows if row["network"] == name]
        for arm in dict.fromkeys(row["arm"] for row in mine):
            of_arm = [row for row in mine if row["arm"] == arm]
            clean = 100 * np.mean([row["clean"] for row in of_arm])
            w2 = [100 * float(np.mean([row["w2"][f"{r:.6g}"] for row in of_arm])) for r in radii]
            gains = []
            for other in ("loaded", "trades end" if arm.endswith(" end") else "trades"):
                against = [row for row in mine if row["arm"] == other and (other == "loaded" or row["seed"] in _seeds(of_arm))]
                gains.append(_gain(out, name, of_arm, against, radii[1]) if against and other != arm else "")
            apgd = next((row["apgd"] for row in of_arm if "apgd" in row), None)
            told = f"{100 * apgd['accuracy']:.1f} (n = {apgd['n']})" if apgd else ""
            lines.append(
                f"| {name} | {arm} | {len(of_arm)} | {of_arm[0]['n']} | {clean:.1f} | {' / '.join(f'{v:.1f}' for v in w2)} | "
                f"{gains[0]} | {gains[1]} | {told} |"
            )
    return "\n".join(lines)


def lines(out: Path) -> str:
    """Markdown: held-out knapsack accuracy where each arm's line crosses a clean accuracy so many points below the start's.

    Mean over the seeds and their range; empty where the line does not go so far down.
    """
    drops = (2, 4, 6, 8)
    heads = ["network", "arm", "seeds", "start", *(f"-{drop}" for drop in drops)]
    found = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    rows = [row for row in _rows(out) if "points" in row]
    for name, arm in dict.fromkeys((row["network"], row["arm"]) for row in rows):
        curves = [row["points"] for row in rows if (row["network"], row["arm"]) == (name, arm)]
        cells = []
        for drop in drops:
            values = [v for points in curves if (v := _crossing(points, drop)) is not None]
            whole = len(values) == len(curves)
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if whole else "")
        start = 100 * float(np.mean([points[0]["robust"] for points in curves]))
        found.append(f"| {name} | {arm} | {len(curves)} | {start:.1f} | {' | '.join(cells)} |")
    return "\n".join(found)


def _crossing(points: list[dict[str, float]], drop: float) -> float | None:
    """Robust accuracy in percent where the line is `drop` points of clean accuracy below its start for the first time."""
    goal = points[0]["clean"] - drop / 100
    for a, b in pairwise(points):
        if b["clean"] <= goal:
            share = (a["clean"] - goal) / (a["clean"] - b["clean"])
            return 100 * (a["robust"] + share * (b["robust"] - a["robust"]))
    return None


def _seeds(rows: list[dict[str, Any]]) -> set[int]:
    return {row["seed"] for row in rows}


def _gain(out: Path, name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], delta: float) -> str:
    """Mean difference over the seeds in points, with a 95 % interval of the bootstrap over the test images."""
    a, b = ([_distances(out, name, row) for row in rows] for rows in (ours, theirs))
    rng = np.random.default_rng(0)

    def difference(chosen: np.ndarray) -> float:
        means = [np.mean([worst_accuracy(d[chosen], delta, 2.0) for d in of]) for of in (a, b)]
        return 100 * float(means[0] - means[1])

    n = len(a[0])
    drawn = [difference(rng.integers(0, n, n)) for _ in range(500)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{difference(np.arange(n)):+.1f} [{low:+.1f}, {high:+.1f}]"


def _distances(out: Path, name: str, row: dict[str, Any]) -> np.ndarray:
    return np.load(out / f"{name}-{row['arm'].replace(' ', '-')}-{row['seed']}.npz")["distances"]


if __name__ == "__main__":
    main()
