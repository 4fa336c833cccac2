"""Do images without labels help? A few labels, the rest of the training images without, against the labels alone.

    OMP_NUM_THREADS=1 python benchmarks/unlabelled.py -o results/unlabelled

    OMP_NUM_THREADS=1 ROBUSTIFY_ASSETS=FOLDER python benchmarks/unlabelled.py --network resnet2b2_adv8 --data npz:cifar.npz \\
        --labels 600 --steps 300 --n 1000 --methods trades -o results/unlabelled-cifar

digits: a seed draws the weights of the digits network and trains it on the labels by `standard`. resnet2b2_adv8: a deployed
network, robust already, is fine-tuned; a seed is another order and noise. From there by each method: on the labels alone, with
half of every batch unlabelled (as pseudo-labels of the network so far, or in the consistency term alone), and, as what all
labels would give, with the labels of all images. Every line takes as many steps of as many images; the epoch is chosen on
held-out labels, the same for all lines. A finished run is a line of OUT.jsonl and is not run again; --tables prints what is
there.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distributional import assets
from field import append, fit, read
from large_batch import difference, held

from robustify import data as datasets
from robustify import sources
from robustify.data import Data
from robustify.distributed import World
from robustify.evaluation import evaluate
from robustify.methods import METHODS, Standard
from robustify.order import Pool
from robustify.pixels import PixelModel
from robustify.recipe import build
from robustify.report import wilson
from robustify.threat import ThreatModel
from robustify.unlabelled import pseudo_labelled, read_pool

SHARE = 0.5
WAYS = ("labels alone", "pseudo", "consistency", "all labels")
ATTACKS = {"trades": ("apgd-ce:steps=20", "apgd-t:steps=20,targets=3"), "wasserstein": ("w-pgd:steps=20",)}


@dataclass(frozen=True)
class Case:
    """A network. radius: of the balls it is to withstand; settings: of the training; trained: whether its weights stay."""

    radius: str
    settings: dict[str, Any]
    trained: bool

    def threat(self, method: str) -> str:
        return f"{'W2-' if method == 'wasserstein' else ''}Linf:{self.radius}"

    def training(self, labelled: int, images: int, steps: int, seed: int) -> dict[str, Any]:
        """As many epochs over so many images, `labelled` of them a step, as come nearest to the steps asked for."""
        epochs = max(1, round(steps / (images // labelled)))
        return {"init": "reinit", "schedule": "cosine", **self.settings, "epochs": epochs, "seed": seed}


CASES = {
    "digits": Case("0.1", {"lr": 0.03, "batch_size": 64, "probe_images": 100}, trained=False),
    "resnet2b2_adv8": Case("8/255", {"lr": 0.01, "batch_size": 128, "probe_images": 300}, trained=True),
}


def start(name: str, data: Data, seed: int, steps: int) -> PixelModel:
    """The network as it is deployed, or the digits network from random weights, trained on the labels by `standard`."""
    case = CASES[name]
    if case.trained:
        return PixelModel(assets().model(name))
    model = sources.load("digits").model
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        settled = case.training(case.settings["batch_size"], len(data.train), steps, seed)
        fit(model, data, Standard(), "Linf:0.1", Path(folder), lambda event: None, **settled)
    return model


def run(name: str, way: str, model: PixelModel, data: Data, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure once. Returns the row; `held` has a bit for every test image."""
    method, pool, case = METHODS[name](steps=5), None, CASES[given.network]
    assert data.rest is not None
    if way == "all labels":
        images, labels = (
            torch.cat([data.train.images, data.rest.images]),
            torch.cat([data.train.labels, data.rest.labels]),
        )
        data = replace(data, train=replace(data.train, images=images, labels=labels))
    elif way != "labels alone":
        recipe = build(
            {"model": "-", "data": {"name": data.name, "unlabelled": "rest", "unlabelled_as": way}, "method": name}
        )
        found = read_pool(recipe, data)
        if way == "pseudo":
            found = pseudo_labelled(recipe, model, found, 10, World(), torch.device("cpu"), lambda event: None)
        pool = Pool(found, SHARE)
    batch = case.settings["batch_size"]
    labelled = batch if pool is None else round(batch * (1 - SHARE))
    model = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        outcome = fit(model, data, method, case.threat(name), Path(folder), lambda event: None, pool,
                      **case.training(labelled, len(data.train), given.steps, seed))  # fmt: skip
    threat = ThreatModel.parse(case.threat(name))
    report = evaluate(model, data.test, ["clean", *ATTACKS[name]], threat, n=min(given.n, len(data.test)))
    assert report.clean is not None
    return {
        "label": name, "way": way, "seed": seed, "labels": given.labels, "threat": threat.spec, "steps": outcome.steps,
        "pool": 0 if pool is None else len(pool.images), "n": report.clean.n, "clean": report.clean.accuracy,
        "robust": report.headline(threat.spec).accuracy, "held": held(report), "seconds": outcome.seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["method", "threat", "half of a batch", "steps", "seeds", "clean %", "robust %", "95 %", "of the seeds",
             "less labels alone, points"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["label"] for row in rows):
        groups = {way: sorted((row for row in rows if (row["label"], row["way"]) == (name, way)), key=lambda row: row["seed"])
                  for way in WAYS}  # fmt: skip
        for way, mine in groups.items():
            if not mine:
                continue
            robust, n = [row["robust"] for row in mine], mine[0]["n"]
            low, high = (100 * share for share in wilson(statistics.mean(robust) * n, n))
            base = groups["labels alone"]
            points = [100 * share for share in difference(base, mine)] if base else []
            gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points) if points and mine is not base else ""
            lines.append(
                f"| {name} | {mine[0]['threat']} | {way} | {mine[0]['steps']} | {len(mine)} | "
                f"{100 * statistics.mean(row['clean'] for row in mine):.1f} | {100 * statistics.mean(robust):.1f} | "
                f"[{low:.1f}, {high:.1f}] | {100 * min(robust):.1f} to {100 * max(robust):.1f} | {gain} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=CASES, default="digits")
    parser.add_argument("--data", default="digits", help="as in robustify finetune --data: the network's pictures")
    parser.add_argument("--methods", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--labels", type=int, default=400, help="half of them held out, to choose the epoch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=450, help="test images")
    parser.add_argument("--tables", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument("-o", "--out", type=Path, default=Path("unlabelled"))
    given = parser.parse_args()
    path = given.out.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = None if given.tables else datasets.load(given.data, limit=given.labels, val_fraction=0.5)
    for seed in range(given.seeds) if data is not None else ():
        done = {(row["label"], row["way"]) for row in read(path) if row["seed"] == seed}
        todo = [(name, way) for name in given.methods for way in given.ways if (name, way) not in done]
        model = start(given.network, data, seed, given.steps) if todo else None
        for name, way in todo:
            assert model is not None
            row = run(name, way, model, data, seed, given)
            append(path, row)
            print(f"{name} {way} seed {seed}: clean {row['clean']:.3f}, robust {row['robust']:.3f}, {row['seconds']:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    print(table(read(path)))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
