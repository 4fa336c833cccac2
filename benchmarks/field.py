"""The fast methods of the field against PGD training: same network, data and epochs, several seeds, one table a part.

    OMP_NUM_THREADS=1 python benchmarks/field.py --part fast-at --networks digits -o results/field

A finished run is a line of OUT.jsonl and is not run again, so a killed script goes on where it was; --tables prints what is
there. digits comes with robustify; the other networks need ROBUSTIFY_ASSETS=FOLDER, those on CIFAR-10 also --cifar FILE.npz
with more training images (x_train uint8 [N,H,W,3], y_train); they are tested on the folder's exact images. A start that is not
in the folder is trained here once: by `standard`, and by PGD-7 for multi-norm, which begins with a robust network.

Robust accuracy: the worst case per image of APGD-CE and APGD-T. Seconds are the loop's own and mean something on an idle
machine only; passes are the methods' formulas, in forward passes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributional import assets
from safetensors.torch import load_file, save_file
from torch import nn

from robustify import data as datasets
from robustify import layers, sources
from robustify.data import Data, from_tensors
from robustify.distributed import make_accelerator
from robustify.evaluation import evaluate
from robustify.events import Collapsed, EpochEnd, Event
from robustify.methods import FastAt, FreeAt, Gaat, Mart, MultiNorm, PgdAt, Standard, Trades
from robustify.order import Pool
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.report import wilson
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import follow, train

PGD7 = PgdAt(steps=7, step_ratio=1.75)
PGD2 = PgdAt(steps=2, step_ratio=1)


@dataclass(frozen=True)
class Network:
    """radii: Linf, L2, and the Linf radius at which one step overfits; union: for multi-norm. train: settings of every run.

    trained: whether `start` gives weights worth starting from; robust: whether it withstands the Linf threat already.
    """

    start: Callable[[], nn.Module]
    data: str
    radii: tuple[str, str, str]
    union: tuple[str, ...]
    train: dict[str, Any]
    trained: bool = True
    robust: bool = False


def _asset(name: str) -> Callable[[], nn.Module]:
    return lambda: assets().model(name)


def _untrained(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = assets().model(name)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model

    return build


CIFAR = {"batch_size": 128, "lr": 0.05, "schedule": "cyclic", "epochs": 10, "weight_decay": 5e-4}
CIFAR_RADII, CIFAR_UNION = ("Linf:8/255", "L2:0.5", "Linf:16/255"), ("Linf:8/255", "L2:0.5", "L1:12")
NETWORKS = {
    "digits": Network(
        lambda: sources.load("digits").model, "digits", ("Linf:0.1", "L2:0.5", "Linf:0.25"), ("Linf:0.1", "L2:0.5", "L1:2"),
        {"batch_size": 64, "lr": 0.1, "schedule": "cyclic", "epochs": 15},
    ),
    "mnist-cnn": Network(_untrained("mnist_trades"), "mnist", ("Linf:0.2", "L2:1.5", "Linf:0.3"),
                         ("Linf:0.3", "L2:2", "L1:10"), {**CIFAR, "lr": 0.02}, trained=False),
    "mnist-trades": Network(_asset("mnist_trades"), "mnist", ("Linf:0.3", "L2:2", "Linf:0.4"),
                            ("Linf:0.3", "L2:2", "L1:10"), {**CIFAR, "lr": 0.01}, robust=True),
    "cifar-cnn": Network(_untrained("cnn_a_adv2"), "cifar10", CIFAR_RADII, CIFAR_UNION, CIFAR, trained=False),
    "cifar-resnet32": Network(_asset("resnet32_standard"), "cifar10", CIFAR_RADII, CIFAR_UNION, CIFAR),
    "cifar-resnet2b-adv8": Network(_asset("resnet2b2_adv8"), "cifar10", CIFAR_RADII, ("Linf:4/255", *CIFAR_UNION[1:]),
                                   {**CIFAR, "lr": 0.01}, robust=True),
    "cifar-resnet18": Network(
        lambda: sources.load("Sehwag2021Proxy_R18").model, "cifar10", CIFAR_RADII, CIFAR_UNION, {**CIFAR, "precision": "bf16"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One line of a table. epochs: as a share of the network's."""

    label: str
    method: Any
    threat: str
    epochs: float = 1.0
    train: tuple[tuple[str, Any], ...] = ()


def trials(part: str, network: Network) -> list[Trial]:
    linf, l2, large = network.radii
    never = (("collapse_drop", 1.0), ("on_collapse", "stop"))
    if part == "fast-at":
        both = [
            trial
            for threat in (linf, l2)
            for trial in (
                Trial("pgd-7", PGD7, threat),
                Trial("fast-at", FastAt(), threat),
                Trial("fast-at n-fgsm", FastAt(noise="n-fgsm"), threat),
                Trial("pgd-2", PGD2, threat),
                Trial("pgd-7, passes of fast-at", PGD7, threat, FastAt().passes(1.2, 2.6) / PGD7.passes(1.2, 2.6)),
            )
        ]
        return [
            *both,
            Trial("fast-at uniform-radius", FastAt(noise="uniform-radius"), l2),
            Trial("fast-at grad_align 0.2", FastAt(grad_align=0.2), linf),
            Trial("free-at, 4 replays", FreeAt(replays=4), linf, 0.25),
        ]
    if part == "controls":
        return [
            Trial("pgd-7", PGD7, linf),
            Trial("trades", Trades(steps=7), linf),
            Trial("mart", Mart(steps=7), linf),
            Trial("pgd-7 awp 0.005", PGD7, linf, train=(("awp", 0.005),)),
        ]
    if part == "collapse":
        return [
            Trial("pgd-7", PGD7, large),
            Trial("fast-at alpha 2, no remedy", FastAt(alpha=2), large, train=never),
            Trial("fast-at, no remedy", FastAt(), large, train=never),
            Trial("fast-at alpha 2, then n-fgsm", FastAt(alpha=2), large, train=(("on_collapse", "n-fgsm"),)),
            Trial("fast-at alpha 2, then pgd-2", FastAt(alpha=2), large, train=(("on_collapse", "pgd-2"),)),
            Trial("fast-at alpha 2, then smaller-alpha", FastAt(alpha=2), large, train=(("on_collapse", "smaller-alpha"),)),
            Trial("n-fgsm", FastAt(noise="n-fgsm"), large),
            Trial("fast-at grad_align 2", FastAt(grad_align=2), large),
        ]
    if part == "gaat":
        return [
            Trial("pgd-7", PGD7, linf),
            Trial("pgd-2", PGD2, linf),
            Trial("fgsm-rs (fast-at)", FastAt(), linf),
            Trial("gaat h 0.25", Gaat(h=0.25), linf),
            Trial("gaat h 0.5", Gaat(), linf),
            Trial("gaat h 1", Gaat(h=1), linf),
            Trial("gaat order 2 h 0.5", Gaat(order=2), linf),
            Trial("gaat exact", Gaat(gradient="exact"), linf),
            Trial("gaat h 0.5, PGD every 4th", Gaat(pgd_every=4), linf),
        ]
    if part == "schedule":
        kinds = ("constant", "accelat", "plateau", "one-cycle", "cyclic", "cosine")
        every = [Trial(kind, FastAt(), linf, 3.0, (("schedule", kind),)) for kind in kinds]
        low = (("schedule", "constant"), ("lr", network.train["lr"] / 5))
        return [*every, Trial("constant, a fifth of the rate", FastAt(), linf, 3.0, low)]
    assert part == "multi-norm"
    union = network.union
    return [
        Trial("before", MultiNorm(threats=union), union[0], 0.0),
        Trial("multi-norm, extremes", MultiNorm(threats=union), union[0], 0.3),
        Trial("multi-norm, all", MultiNorm(threats=union, train_on="all"), union[0], 0.3),
        Trial("pgd-10 in Linf only", PgdAt(), union[0], 0.3),
    ]


PARTS = ("fast-at", "controls", "collapse", "gaat", "schedule", "multi-norm")


def load_data(name: str, cifar: Path | None, images: int) -> Data:
    """The network's data: at most so many training images, a tenth of them held out; the exact test images."""
    if name == "digits":
        return datasets.load("digits")
    folder = assets()
    x_test, y_test = folder.images(name, "test")
    if name == "mnist":
        x, y = folder.images(name, "train")
    else:
        if cifar is None:
            raise SystemExit("the networks on CIFAR-10 need --cifar FILE.npz with x_train and y_train")
        found = np.load(cifar)
        x, y = torch.from_numpy(found["x_train"]), torch.from_numpy(found["y_train"]).long()
        x = x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:images]
    if name == "mnist":
        chosen_test = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(0))[:1000]
        x_test, y_test = x_test[chosen_test], y_test[chosen_test]
    augmentation = "none" if name == "mnist" else "crop-flip"
    return from_tensors((x[chosen], y[chosen]), None, (x_test, y_test), name=name, augmentation=augmentation)


def fit(
    model: PixelModel, data: Data, method: Any, threat: str, folder: Path, tell: Callable[[Event], None],
    pool: Pool | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """Train the model in place by robustify's loop, from the weights it has, with unlabelled images beside the data where there
    is a pool. Returns the Outcome."""
    s = TrainSettings(**settings)
    layers.select(model.net, "full", [])
    accelerator = make_accelerator(s.precision)
    setup = prepare(model, method, ThreatModel.parse(threat), s, accelerator, data.augmentation, len(data.train))
    outcome = follow(train(setup, data, folder, pool=pool), tell)
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    return outcome


def start_of(name: str, network: Network, data: Data, kept: Path, robust: bool) -> PixelModel:
    """The network every run starts from, robust already or not: as it is, or trained here and kept."""
    found = network.start()
    model = found if isinstance(found, PixelModel) else PixelModel(found)
    missing: list[tuple[str, Any]] = [] if network.trained else [("standard", Standard())]
    if robust and not network.robust:
        missing.append(("robust", PGD7))
    for kind, method in missing:
        file = kept / f"start-{name}-{kind}.safetensors"
        if not file.exists():
            with tempfile.TemporaryDirectory() as folder:
                fit(model, data, method, network.radii[0], Path(folder), lambda event: None, **network.train, init="reinit")
            save_file({key: value.contiguous() for key, value in model.net.state_dict().items()}, str(file))
        model.net.load_state_dict(load_file(str(file)))
    return model


def run(
    part: str, name: str, trial: Trial, seed: int, start: PixelModel, data: Data, given: argparse.Namespace
) -> dict[str, Any]:
    """Train one trial with one seed and measure it. Returns the row."""
    network = NETWORKS[name]
    model, curve, collapses, outcome = copy.deepcopy(start), [], [], None

    def tell(event: Event) -> None:
        if isinstance(event, EpochEnd):
            curve.append([event.epoch, event.clean, event.robust, event.extra.get("gradient_alignment")])
        if isinstance(event, Collapsed):
            collapses.append([event.epoch, event.remedy])

    if trial.epochs:
        # "reinit": the start is no candidate for the best epoch; its weights stay as they are
        settings = {**network.train, "probe_images": given.probe_images, "init": "reinit", "seed": seed, **dict(trial.train)}
        settings["epochs"] = max(1, round(settings["epochs"] * trial.epochs))
        with tempfile.TemporaryDirectory() as folder:
            outcome = fit(model, data, trial.method, trial.threat, Path(folder), tell, **settings)
    threats = [ThreatModel.parse(threat) for threat in (network.union if part == "multi-norm" else [trial.threat])]
    attacks = [f"apgd-ce:steps={given.steps}", f"apgd-t:steps={given.steps},targets={given.targets}"]
    n = min(given.n, len(data.test))
    report = evaluate(model, data.test, ["clean", *attacks], threats, n=n)
    worst = report.union() or report.headline(threats[0].spec)
    clean = report.clean
    assert clean is not None
    return {
        "part": part, "network": name, "label": trial.label, "threat": trial.threat, "seed": seed, "n": n,
        "clean": clean.accuracy, "robust": worst.accuracy,
        "by_threat": {threat.spec: report.headline(threat.spec).accuracy for threat in threats},
        "epochs": outcome.epochs if outcome else 0, "steps": outcome.steps if outcome else 0,
        "step_passes": trial.method.passes(1.2, 2.6), "train_seconds": outcome.seconds if outcome else 0.0,
        "measure_seconds": sum(row.seconds for row in report.rows), "best_epoch": outcome.best_epoch if outcome else 0,
        "collapses": collapses, "curve": curve, "attacks": attacks, "settings": settings_of(name, given),
    }  # fmt: skip


def settings_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What the command may change from one call to the next: rows of one file have it in common."""
    asked = {field: getattr(given, field) for field in ("images", "probe_images", "n", "steps", "targets")}
    return {**NETWORKS[name].train, **asked, "share": given.epochs}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("part", "network", "label", "threat", "seed"))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]], part: str, network: str) -> str:
    """One line a trial: means over the seeds, the interval of the mean at n images, and the spread of the seeds."""
    mine = [row for row in rows if row["part"] == part and row["network"] == network]
    heads = ["method", "threat", "seeds", "clean %", "robust %", "95 %", "of the seeds", "passes", "s", "collapsed in"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for label, threat in dict.fromkeys((row["label"], row["threat"]) for row in mine):
        group = [row for row in mine if (row["label"], row["threat"]) == (label, threat)]
        first = next((row for row in mine if row["threat"] == threat and row["steps"]), group[0])  # its passes are the unit
        robust, n = [row["robust"] for row in group], group[0]["n"]
        low, high = wilson(statistics.mean(robust) * n, n)
        cost = first["steps"] * first["step_passes"]
        share = statistics.mean(row["steps"] * row["step_passes"] for row in group) / cost if cost else 0.0
        collapsed = [f"{c[0]} ({c[1]})" for row in group for c in row["collapses"]]
        shown = threat if len(group[0]["by_threat"]) == 1 else ", ".join(
            f"{t} {100 * statistics.mean(row['by_threat'][t] for row in group):.1f}" for t in group[0]["by_threat"]
        )
        cells = [
            label, shown, str(len(group)), f"{100 * statistics.mean(row['clean'] for row in group):.1f}",
            f"{100 * statistics.mean(robust):.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]",
            f"{100 * min(robust):.1f} to {100 * max(robust):.1f}", f"{share:.2f}",
            f"{statistics.mean(row['train_seconds'] for row in group):.0f}", ", ".join(collapsed) or "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def races(rows: list[dict[str, Any]], network: str) -> str:
    """Epochs until each schedule's held-out robust accuracy, as the mean of three epochs, is what all of them reach."""
    mine = [row for row in rows if row["part"] == "schedule" and row["network"] == network]
    epochs: dict[str, list[int]] = {row["label"]: [] for row in mine}
    best: dict[str, list[float]] = {row["label"]: [] for row in mine}
    for seed in sorted({row["seed"] for row in mine}):
        curves = {row["label"]: [p[2] for p in row["curve"][1:]] for row in mine if row["seed"] == seed}
        means = {label: [statistics.mean(c[i - 3 : i]) for i in range(3, len(c) + 1)] for label, c in curves.items()}
        goal = min(map(max, means.values()))
        for label, curve in means.items():
            epochs[label].append(3 + next(i for i, mean in enumerate(curve) if mean >= goal))
            best[label].append(max(curve))
    lines = ["| schedule | best held-out robust % | epochs to what all reach, by seed | mean |", "|---|---|---|---|"]
    for label, found in epochs.items():
        reached, times = 100 * statistics.mean(best[label]), ", ".join(map(str, found))
        lines.append(f"| {label} | {reached:.1f} | {times} | {statistics.mean(found):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--networks", choices=NETWORKS, nargs="*", default=["digits"])
    parser.add_argument("--only", nargs="*", metavar="LABEL", help="only the trials of these names")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--images", type=int, default=4000, help="training images at most, the held-out tenth among them")
    parser.add_argument("--epochs", type=float, default=1.0, help="times the network's number of epochs")
    parser.add_argument("--lr", type=float, help="instead of the network's")
    parser.add_argument("--batch-size", type=int, help="instead of the network's: few images want many small steps")
    parser.add_argument("--probe-images", type=int, default=300, help="held-out images, a tenth of --images at most")
    parser.add_argument("--n", type=int, default=446, help="test images")
    parser.add_argument("--steps", type=int, default=50, help="of APGD")
    parser.add_argument("--targets", type=int, default=3, help="of APGD-T")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("-o", "--out", type=Path, default=Path("field"))
    given = parser.parse_args()
    path = given.out.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    for field, value in (("lr", given.lr), ("batch_size", given.batch_size)):
        for name in given.networks if value is not None else ():
            NETWORKS[name].train[field] = value
    for name in given.networks if not given.tables else ():
        data = load_data(NETWORKS[name].data, given.cifar, given.images)
        for part in given.part:
            start = start_of(name, NETWORKS[name], data, path.parent, robust=part == "multi-norm")
            for seed in range(given.seeds):  # seed by seed: a table is whole, if thin, after a third of the time
                for trial in trials(part, NETWORKS[name]):
                    if given.only and trial.label not in given.only:
                        continue
                    row = {"part": part, "network": name, "label": trial.label, "threat": trial.threat, "seed": seed}
                    done = {key(one): one for one in read(path)}.get(key(row))
                    if done and done.get("settings", settings_of(name, given)) != settings_of(name, given):
                        raise SystemExit(f"{path} holds rows of {done['settings']}: take another -o")
                    if done or (trial.epochs == 0 and seed):
                        continue
                    found = run(part, name, replace(trial, epochs=trial.epochs * given.epochs), seed, start, data, given)
                    append(path, found)
                    figures = f"clean {found['clean']:.3f}, robust {found['robust']:.3f}, {found['train_seconds']:.0f} s"
                    print(f"{' '.join(map(str, key(row)))}: {figures}", file=sys.stderr, flush=True)
    rows = read(path)
    for part, name in dict.fromkeys((row["part"], row["network"]) for row in rows):
        print(f"\n{part}, {name}, n = {rows[0]['n']}\n\n{table(rows, part, name)}")
        if part == "schedule":
            print("\n" + races(rows, name))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
