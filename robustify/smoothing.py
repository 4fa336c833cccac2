"""Randomised smoothing: certified L2 radii, from nothing but forward passes (Cohen, Rosenfeld, Kolter, ICML 2019).

The smoothed classifier g(x) is the class that the base model f returns most often on x + N(0, sigma^2 I). Where the
likeliest class has probability at least pA > 1/2, g is constant within sigma * Phi^-1(pA) of x (their theorem 1). **The
certificate is of g, not of f**: f itself may be fooled well within the radius. A base model that was not trained under
such noise makes a poor g, unless sigma is small.

`knapsack.worst_accuracy` and `duality` turn the radii into a certified distributional accuracy of g.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from robustify.modes import borrowed
from robustify.rng import mix

Tell = Callable[[int, int], None]
ABSTAINED = -1


@dataclass(frozen=True)
class Certificates:
    """What is proven of the smoothed classifier, image by image, each with probability 1 - alpha over the noise drawn.

    radii:     [N] float64, the L2 radius within which it returns y; 0 where it errs or abstains.
    predicted: [N] int64, its class, or ABSTAINED.
    """

    radii: Tensor
    predicted: Tensor
    sigma: float
    alpha: float


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 500,
    seed: int = 0,
    tell: Tell | None = None,
) -> Certificates:
    """Certify the classifier that smooths `model` with noise of standard deviation sigma (their algorithm CERTIFY).

    x: [N, ...]; y: [N]. n0 draws choose the class, n others bound its probability by Clopper and Pearson. The largest
    radius that n draws can prove is sigma * Phi^-1(alpha^(1/n)). Noisy images are not clamped: the theorem needs them as
    they are. An image's noise depends on seed and its place only. Spends n0 + n forward passes per image.
    """
    predicted = torch.full((len(x),), ABSTAINED)
    radii = torch.zeros(len(x), dtype=torch.float64)
    with borrowed(model), torch.no_grad():
        for i, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            generator = torch.Generator(x.device).manual_seed(mix(seed, i))
            likeliest = int(_counts(model, image, sigma, n0, batch_size, generator).argmax())
            hits = int(_counts(model, image, sigma, n, batch_size, generator)[likeliest])
            radius = certified_radius(hits, n, sigma, alpha)
            if radius > 0:
                predicted[i] = likeliest
                radii[i] = radius if likeliest == label else 0.0
            if tell:
                tell(i + 1, len(x))
    return Certificates(radii, predicted, sigma, alpha)


def certified_radius(hits: int, n: int, sigma: float, alpha: float) -> float:
    """Return the L2 radius proven by `hits` of n noisy images in the class, with confidence 1 - alpha; 0 to abstain."""
    from scipy.stats import beta

    if hits == 0:
        return 0.0
    at_least = float(beta.ppf(alpha, hits, n - hits + 1))  # Clopper and Pearson's lower end, one-sided
    return sigma * NormalDist().inv_cdf(at_least) if at_least > 0.5 else 0.0


def largest_radius(n: int, sigma: float, alpha: float) -> float:
    """Return the radius that n draws can prove at best."""
    return sigma * NormalDist().inv_cdf(math.exp(math.log(alpha) / n))


def _counts(
    model: nn.Module, image: Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """How often each class is returned on n noisy copies of an image, [C]."""
    counts = torch.zeros(0)
    for start in range(0, n, batch_size):
        shape = (min(batch_size, n - start), *image.shape)
        noise = torch.randn(shape, generator=generator, device=image.device, dtype=image.dtype)
        logits = model(image + sigma * noise)
        found = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        counts = found if not len(counts) else counts + found
    return counts
