"""First-order estimates: the formulas on a linear model, and where they must stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Linear

from robustify.attacks import w_fgsm
from robustify.bounds import accuracy_estimates
from robustify.errors import UserError
from robustify.flips import flip_distances
from robustify.knapsack import worst_curve
from robustify.losses import redlr
from robustify.measure import counted
from robustify.threat import ThreatModel


def data(linear: Linear, interior) -> tuple[torch.Tensor, torch.Tensor]:
    x = interior[0]
    y = linear(x).argmax(1).detach()
    y[:8] = (y[:8] + 1) % 3
    return x, y


def test_with_redlr_the_lower_estimate_is_one_minus_delta_upsilon_over_the_loss(linear, interior):
    x, y = data(linear, interior)
    deltas = [1e-4, 1e-3]
    found = accuracy_estimates(linear, x, y, deltas, norm="Linf", batch_size=16)
    value = abs(float(redlr(linear(x), y).mean().detach()))
    wanted = [found.clean * (1 - delta * found.sensitivity.value / value) for delta in deltas]
    assert found.clean == 32 / 40
    assert found.lower == pytest.approx(wanted, rel=1e-3)  # the attack's own term may lie a little lower


def test_the_estimates_fall_and_enclose_the_knapsack_at_small_radii(linear, interior):
    x, y = data(linear, interior)
    deltas = np.linspace(0.001, 0.02, 5)
    distances = flip_distances(linear, x, y, norm="L2", targets=2).distances.numpy()
    found = accuracy_estimates(linear, x, y, deltas.tolist(), norm="L2")
    assert (np.diff(found.lower) <= 0).all()
    assert (found.upper >= worst_curve(distances, deltas, 2) - 1e-12).all()
    assert ((found.lower >= 0) & (found.lower <= found.clean)).all()


@pytest.mark.parametrize("p", [2.0, 4.0, float("inf")])
def test_the_upper_estimate_is_w_fgsm_at_one_forward_pass_a_radius(linear, interior, p):
    x, y = data(linear, interior)
    deltas = [0.01, 0.05, 0.1]
    with counted(linear) as passes:
        found = accuracy_estimates(linear, x, y, deltas, norm="Linf", p=p, population=80)
    assert (passes.forward, passes.backward) == (4 * len(x), len(x))
    right = linear(x).argmax(1) == y
    for delta, upper in zip(deltas, found.upper, strict=True):
        held = linear(w_fgsm(linear, x, y, threat=ThreatModel("Linf", delta, p))).argmax(1) == y
        assert upper == float((held & right).double().mean())
    below, above = found.kept()
    assert above == pytest.approx(found.upper / 0.8)
    assert below == pytest.approx(found.lower / 0.8)
    assert np.diff(found.losses) == pytest.approx(np.diff(deltas) * found.sensitivity.value)
    whole = accuracy_estimates(linear, x, y, deltas, norm="Linf", p=p, population=40)
    assert found.sensitivity.se > whole.sensitivity.se == 0


def test_cross_entropy_needs_a_misclassified_image(linear, interior):
    x, y = data(linear, interior)
    assert (accuracy_estimates(linear, x, y, [0.01], norm="Linf", loss="ce").lower >= 0).all()
    with pytest.raises(UserError, match="redlr"):
        accuracy_estimates(linear, x[8:], y[8:], [0.01], norm="Linf", loss="ce")


def test_nothing_right_leaves_nothing(linear, interior):
    x = interior[0]
    y = (linear(x).argmax(1).detach() + 1) % 3
    found = accuracy_estimates(linear, x, y, [0.01], norm="Linf")
    assert (found.lower[0], found.upper[0], found.clean) == (0, 0, 0)
