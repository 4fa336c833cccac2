"""Upsilon's estimators on real networks: standard error at equal cost, uniform sub-samples against importance sampling.

    OMP_NUM_THREADS=1 ROBUSTIFY_ASSETS=FOLDER python benchmarks/upsilon.py

Gradients of all n images once; then 400 draws of m images by each rule from the same norms. Ratio: variance of the uniform
estimate of the moment over that of the importance-sampled one, at m gradients each.
"""

from __future__ import annotations

import numpy as np
import torch
from distributional import assets

from robustify.gradients import gradient_norms
from robustify.importance import draw, logit_slopes
from robustify.sensitivity import upsilon

DRAWS, M = 400, 64


def main() -> None:
    load = assets()
    print(f"| network | loss | n | Upsilon | top 1 % share | variance ratio at m = {M} | bias / se of the mean |")
    print("|---|---|---|---|---|---|---|")
    for name, (*_, kind, _eps) in load.MODELS.items():
        model, (x, y) = load.model(name), load.images(kind)
        batches = list(zip(x[:446].split(128), y[:446].split(128), strict=True))
        for loss in ("redlr", "ce"):
            norms = gradient_norms(model, batches, loss, "Linf")
            slopes = logit_slopes(model, batches, loss)
            whole = upsilon(norms, 2)
            generator = torch.Generator().manual_seed(0)
            uniform, weighted = [], []
            for seed in range(DRAWS):
                some = torch.randint(len(norms), (M,), generator=generator)
                uniform.append(float((norms[some] ** 2).mean()))
                drawn = draw(slopes, 2, M, seed)
                weighted.append(float((drawn.weights * norms[drawn.indices] ** 2).sum()))
            bias = (np.mean(weighted) - whole.value**2) / (np.std(weighted) / DRAWS**0.5)
            print(
                f"| {name} | {loss} | {whole.n} | {whole.value:.4g} | {100 * whole.top_share:.0f} % | "
                f"{np.var(uniform) / np.var(weighted):.1f} | {bias:+.1f} |"
            )


if __name__ == "__main__":
    main()
