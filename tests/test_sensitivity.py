from __future__ import annotations

import math

import pytest
import torch
from helpers import Linear
from hypothesis import given, settings
from hypothesis import strategies as st

from robustify.gradients import gradient_norms
from robustify.sensitivity import Sensitivity, UpsilonTracker, budgets, conjugate, upsilon

slopes = st.integers(0, 10_000).map(
    lambda seed: (
        torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        * (torch.rand(50, generator=torch.Generator().manual_seed(seed + 1)) > 0.3)
    )
)
orders = st.sampled_from([1.2, 1.5, 2.0, 3.0, 8.0, math.inf])


@settings(max_examples=60, deadline=None)
@given(slopes, orders, st.floats(0.001, 0.5))
def test_the_budget_identity(slope, p, delta):
    """With Upsilon of the same images the mean cost is delta^p exactly, as (q-1)p = q."""
    q = conjugate(p)
    split = budgets(slope, upsilon(slope, q).value, delta, p)
    if math.isinf(p):
        assert torch.equal(split, torch.full_like(slope, delta))
    else:
        assert float((split**p).mean()) == pytest.approx(delta**p, rel=1e-9)
        assert torch.equal(split == 0, slope == 0)


def test_conjugates():
    assert conjugate(2) == 2
    assert conjugate(math.inf) == 1
    assert conjugate(1.5) == pytest.approx(3)


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
def test_upsilon_of_a_linear_loss_is_the_norm_of_its_slope(norm, dual, p):
    """Two classes, cross entropy: grad_x = (p_1 - [y=1]) (w_1 - w_0), a closed form."""
    w = torch.tensor([[0.0] * 4, [1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    x = torch.rand(30, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 2
    model = Linear(w)
    found = gradient_norms(model, [(x, y)], "ce", norm)
    weight = (model(x).softmax(1)[:, 1] - y).abs().detach()
    assert torch.allclose(found, weight * w[1].norm(p=dual), rtol=1e-6)
    q = conjugate(p)
    assert upsilon(found, q).value == pytest.approx(float((weight**q).mean() ** (1 / q) * w[1].norm(p=dual)), rel=1e-6)


def test_the_standard_error_covers():
    """Of many sub-samples about 95 % hold the true value within two standard errors."""
    generator = torch.Generator().manual_seed(0)
    population = torch.rand(4000, generator=generator, dtype=torch.float64) + 0.2
    truth = upsilon(population, 2).value
    hits = 0
    for _ in range(300):
        chosen = population[torch.randperm(4000, generator=generator)[:1000]]
        found = upsilon(chosen, 2, population=4000)
        hits += abs(found.value - truth) <= 1.96 * found.se
    assert 0.91 <= hits / 300 <= 0.985


def test_the_whole_population_has_no_sampling_error_and_tails_show():
    norms = torch.ones(1000, dtype=torch.float64)
    assert upsilon(norms, 2, population=1000).se == 0
    assert upsilon(norms, 2).top_share == pytest.approx(0.01)
    norms[0] = 1000
    assert upsilon(norms, 2).top_share > 0.99
    assert upsilon(torch.zeros(5), 2) == Sensitivity(0.0, 0.0, 5, 2, 0.0)


def tracker(rule, **more):
    return UpsilonTracker(rule, **{"q": 2.0, "delta": 0.1, "every": 5, "rho": 0.25, "images": 6, **more})


def test_when_each_rule_measures():
    for rule, later in (
        ("epoch", [True, False]),
        ("every", [False, True]),
        ("ema", [False, False]),
        ("window", [False, False]),
    ):
        t = tracker(rule)
        assert t.due(0, True)
        t.measure(torch.ones(4), 4)
        assert [t.due(7, True), t.due(10, False)] == later, rule


def test_ema_averages_the_moment_and_never_upsilon():
    t = tracker("ema")
    t.measure(torch.full((4,), 2.0), 4)
    t.observe(torch.full((3,), 4.0))
    assert t.value == pytest.approx(math.sqrt(0.75 * 4 + 0.25 * 16))


def test_the_window_keeps_the_last_images():
    t = tracker("window")
    t.measure(torch.full((6,), 1.0), 6)
    t.observe(torch.full((4,), 3.0))
    assert t.value == pytest.approx(math.sqrt((2 * 1 + 4 * 9) / 6))


def test_the_ledger_says_what_was_spent():
    t = tracker("epoch")
    t.measure(torch.ones(4), 4)
    t.spend(torch.tensor([0.0, 0.1, 0.2]), 2.0)
    t.spend(torch.tensor([0.1]), 2.0)
    summary = t.summary()
    assert summary["mean_cost"] == pytest.approx((0 + 1 + 4 + 1) / 4, rel=1e-6)
    assert summary["zero_share"] == 0.25
    assert summary["largest_delta"] == pytest.approx(0.2)
    assert math.isnan(t.summary()["mean_cost"]) or t.summary()["mean_cost"] == 0  # cleared


def test_a_tracker_continues_from_its_state():
    t = tracker("window")
    t.measure(torch.rand(6), 6)
    t.observe(torch.rand(3))
    t.spend(torch.rand(3), 2.0)
    other = tracker("window")
    other.load_state_dict(t.state_dict())
    assert other.value == t.value
    assert other.summary() == t.summary()


def test_a_cap_limits_single_images():
    split = budgets(torch.tensor([0.1, 10.0]), 1.0, 0.1, 2.0, cap=3)
    assert split.tolist() == pytest.approx([0.01, 0.3])
