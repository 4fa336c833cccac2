"""Whether one-step training in L2 keeps the gradients that people find meaningful: pictures, and a number beside them.

    OMP_NUM_THREADS=1 python benchmarks/gallery.py --network digits -o docs/pictures

From the same start, L2 fast-at and PGD-7 at the radius of benchmarks/field.py (whose networks, data and settings these are).
OUT/gradients_l2_NETWORK.png: test images, the gradient of the cross entropy in them, and what an untargeted L2 attack of
--radius makes of them, of the start and of both. The table: the mean |cosine| between image and gradient of the margin (the
alignment of Etmann et al. 2019, arXiv 1905.04172), of the seeds; its error is over the test images of all seeds.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import NETWORKS, PGD7, fit, load_data, start_of
from torch import Tensor, nn

from robustify import plots
from robustify.attacks.ascent import ascend
from robustify.gradients import input_gradient
from robustify.losses import ce, margin
from robustify.methods import FastAt
from robustify.modes import borrowed


def alignment(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return |cos(image, gradient of the margin)| of every image, [N], in [0, 1]."""
    with borrowed(model):
        g = input_gradient(model, x, lambda logits: margin(logits, y))[0]
    return torch.cosine_similarity(x.flatten(1), g.flatten(1), dim=1).abs()


def columns_of(model: nn.Module, name: str, x: Tensor, y: Tensor, radius: float) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return the gradients and the adversarial images under `name`, and the classes that the model sees in the latter."""

    def gradient(at: Tensor, _: int = 0) -> Tensor:
        return input_gradient(model, at, lambda logits: ce(logits, y))[0]

    with borrowed(model), torch.no_grad():
        x_adv = ascend(gradient, x, x, norm="L2", radius=radius, steps=60, step=radius / 15)
        seen = model(x_adv).argmax(1).tolist()
        return {f"{name}:\ngradient": gradient(x).numpy(), f"{name}:\nL2, ε = {radius:g}": x_adv.numpy()}, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="digits")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--radius", type=float, default=4.0, help="of the pictures' attack, L2")
    parser.add_argument("-o", "--out", type=Path, default=Path("."))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    network, data = NETWORKS[given.network], load_data(NETWORKS[given.network].data, given.cifar, given.images)
    start = start_of(given.network, network, data, given.out, robust=False)
    x, y = data.test.batch(range(min(1000, len(data.test))))
    rows = [int(torch.nonzero(y == label)[0]) for label in range(0, data.num_classes, 2)]
    columns: dict[str, np.ndarray] = {"image": x[rows].numpy()}
    texts = [f"{int(label)}" for label in y[rows]]
    print("| network | seeds | n | alignment | standard error |\n|---|---|---|---|---|")
    methods: dict[str, Any] = {"standard": None, "fast-at": FastAt(), "PGD-7": PGD7}
    for name, method in methods.items():
        found = []
        for seed in range(given.seeds if method else 1):
            model = copy.deepcopy(start).eval()
            if method:
                settings = {**network.train, "init": "reinit", "probe_images": 300, "seed": seed}
                with tempfile.TemporaryDirectory() as folder:
                    fit(model, data, method, network.radii[1], Path(folder), lambda event: None, **settings)
            found.append(alignment(model.eval(), x, y))
            if seed == 0:
                more, seen = columns_of(model, name, x[rows], y[rows], given.radius)
                columns |= more
                texts = [f"{text}\n{name}: {k}" for text, k in zip(texts, seen, strict=True)]
        values = torch.stack(found)
        error = float(values.mean(0).std() / len(x) ** 0.5)
        print(f"| {name} | {len(found)} | {len(x)} | {float(values.mean()):.3f} | {error:.3f} |", flush=True)
    file = given.out / f"gradients_l2_{given.network}.png"
    plots.gallery(file, columns, texts, [column for column in columns if "gradient" in column])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
