"""The pictures of docs/evaluation-results.md: from the real networks, and what distributional.py left.

OMP_NUM_THREADS=1 ROBUSTIFY_ASSETS=FOLDER python benchmarks/pictures.py --linf linf.npz --l2 l2.npz -o docs/pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributional import assets

from robustify import plots
from robustify.attacks import w_pgd
from robustify.attacks.ascent import ascend
from robustify.bounds import accuracy_estimates
from robustify.gradients import input_gradient
from robustify.knapsack import worst_curve
from robustify.losses import ce
from robustify.modes import borrowed
from robustify.smoothing import certify
from robustify.threat import ThreatModel

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ROBUST, STANDARD = "resnet2b2_adv8", "resnet32_standard"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--linf", required=True)
    parser.add_argument("--l2", required=True)
    parser.add_argument("--n", type=int, default=446)
    parser.add_argument("--sigma", type=float, default=0.12)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/pictures"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    load = assets()
    linf, l2 = ({k: v[: given.n] for k, v in np.load(file).items()} for file in (given.linf, given.l2))
    cifar = {name: d for name, d in linf.items() if name != "mnist_trades"}
    plots.robust_accuracy(given.out / "robust_accuracy_linf.png", cifar, "Linf", 16 / 255)
    plots.flip_histogram(given.out / "flips_linf.png", {k: cifar[k] for k in (ROBUST, STANDARD)}, "Linf")
    x, y = (part[: given.n] for part in load.images("cifar10"))
    several = [
        plots.Line(name, "knapsack", at := np.linspace(0, 8 / 255, 161), worst_curve(d, at, 2))
        for name, d in cifar.items()
    ]
    for name in (ROBUST, "resnet2b_adv2"):
        several.append(attacked(load.model(name), name, x, y, "Linf", np.arange(0, 9) / 255))
    plots.against_radius(given.out / "worst_accuracy_linf.png", {("Linf", 2.0): several})
    lines = all_kinds(load.model(ROBUST), x, y, l2[ROBUST], given.sigma, given.draws)
    plots.against_radius(given.out / "worst_accuracy_l2.png", {("L2", 2.0): lines})
    pictures(load, x, y, given.out / "gallery.png")


def attacked(model: Any, name: str, x: torch.Tensor, y: torch.Tensor, norm: Any, deltas: np.ndarray) -> plots.Line:
    """Accuracy under W-PGD."""
    found = []
    for delta in deltas:
        x_adv = w_pgd(model, x, y, threat=ThreatModel(norm, float(delta), 2.0)) if delta > 0 else x
        with torch.no_grad():
            found.append(float((model(x_adv).argmax(1) == y).double().mean()))
    return plots.Line(name, "w-pgd", deltas, found)


def all_kinds(
    model: Any, x: torch.Tensor, y: torch.Tensor, distances: np.ndarray, sigma: float, draws: int
) -> list[plots.Line]:
    """Every computation there is, of one network in L2."""
    fine, coarse = np.linspace(0, 0.6, 121), np.linspace(0, 0.6, 9)
    estimates = accuracy_estimates(model, x, y, coarse[1:].tolist(), norm="L2")
    fine_estimates = accuracy_estimates(model, x, y, fine[1:41:2].tolist(), norm="L2")
    radii = certify(model, x, y, sigma=sigma, n=draws).radii.numpy()
    print(f"smoothed with {sigma}: clean {np.mean(radii > 0):.3f}, certified at 0.1: {np.mean(radii > 0.1):.3f}")
    return [
        plots.Line(ROBUST, "knapsack", fine, worst_curve(distances, fine, 2)),
        plots.Line(ROBUST, "certificate", fine, worst_curve(radii, fine, 2)),
        attacked(model, ROBUST, x, y, "L2", coarse),
        plots.Line(ROBUST, "first-order upper", coarse, [estimates.clean, *estimates.upper]),
        plots.Line(ROBUST, "first-order lower", [0, *fine[1:41:2]], [estimates.clean, *fine_estimates.lower]),
    ]


def pictures(load: Any, x: torch.Tensor, y: torch.Tensor, path: Path) -> None:
    """Input gradients and large-eps adversarial images of a robust and of a standard network."""
    rows = [int(torch.nonzero(y == label)[0]) for label in (1, 3, 4, 7, 8)]
    x, y = x[rows], y[rows]
    columns: dict[str, np.ndarray] = {"image": x.numpy()}
    texts = [CLASSES[label] for label in y.tolist()]
    for kind, name in (("robust", ROBUST), ("standard", STANDARD)):
        model = load.model(name)

        def gradient(x_adv: torch.Tensor, _: int = 0, model: Any = model) -> torch.Tensor:
            return input_gradient(model, x_adv, lambda logits: ce(logits, y))[0]

        with borrowed(model), torch.no_grad():
            columns[f"{kind}: gradient"] = gradient(x).numpy()
            x_adv = ascend(gradient, x, x, norm="L2", radius=4.0, steps=60, step=0.3)
            now = [CLASSES[label] for label in model(x_adv).argmax(1).tolist()]
        texts = [f"{text}\n{kind}: {seen}" for text, seen in zip(texts, now, strict=True)]
        columns[f"{kind}: L2, ε = 4"] = x_adv.numpy()
    plots.gallery(path, columns, texts, [name for name in columns if "gradient" in name])


if __name__ == "__main__":
    main()
