"""Certified radii of a smoothed linear classifier are known; more draws prove more, and never more than is true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import Linear

from robustify.duality import PointwiseCurve, distributional_accuracy
from robustify.knapsack import worst_accuracy
from robustify.smoothing import ABSTAINED, certified_radius, certify, largest_radius


def test_radii_of_a_linear_classifier_stay_below_the_true_distance_and_come_near_it(interior):
    """Smoothing leaves a linear classifier of two classes as it is, so its distance bounds every certificate."""
    model = Linear(torch.tensor([[0.0] * 6, [1.0, -2.0, 0.5, 3.0, -0.1, 0.7]], dtype=torch.float64))
    x = interior[0][:12]
    logits = model(x).detach()
    y = logits.argmax(1)
    y[0] = 1 - y[0]
    true = (logits[:, 1] - logits[:, 0]).abs() / model.weight[1].norm().detach()
    sigma, n, alpha = 0.25, 4000, 1e-4
    found = certify(model, x, y, sigma=sigma, n=n, alpha=alpha, batch_size=1000)
    assert found.radii[0] == 0
    right = torch.ones(len(x), dtype=torch.bool)
    right[0] = False
    assert (found.radii[right] <= true[right]).all()
    near = right & (true > 0.1) & (true < 0.4)
    assert near.any()
    assert (found.radii[near] > true[near] - 0.05).all()
    assert (found.radii <= largest_radius(n, sigma, alpha)).all()
    again = certify(model, x[:3], y[:3], sigma=sigma, n=n, alpha=alpha, batch_size=1000)
    assert torch.equal(again.radii, found.radii[:3])  # an image's noise depends on its place only


def test_the_radius_by_hand():
    assert certified_radius(1000, 1000, 1.0, 0.001) == pytest.approx(largest_radius(1000, 1.0, 0.001))
    assert certified_radius(0, 1000, 1.0, 0.001) == 0
    assert certified_radius(510, 1000, 1.0, 0.001) == 0  # too near one half to prove
    assert certified_radius(900, 1000, 1.0, 0.001) < certified_radius(900, 1000, 1.0, 0.05)
    assert certified_radius(9000, 10_000, 1.0, 0.001) > certified_radius(900, 1000, 1.0, 0.001)


def test_a_coin_abstains():
    class Coin(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1)[:, 0], -x.flatten(1)[:, 0]], 1)

    found = certify(Coin(), torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), sigma=1.0, n=500)
    assert found.predicted.tolist() == [ABSTAINED] * 3
    assert found.radii.tolist() == [0.0] * 3


def test_a_certified_curve_gives_a_certified_distributional_accuracy_below_the_true_one():
    true = np.random.default_rng(0).gamma(2, 0.2, 200)
    certified = np.maximum(0, true - 0.05)
    for delta in (0.1, 0.3):
        bound, _ = distributional_accuracy(PointwiseCurve.from_distances(certified), delta, 2)
        assert bound == pytest.approx(worst_accuracy(certified, delta, 2), abs=1e-10)
        assert bound <= worst_accuracy(true, delta, 2)
    assert math.isfinite(bound)
