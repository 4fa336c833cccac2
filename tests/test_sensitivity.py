from __future__ import annotations

import math

import pytest
import torch
from helpers import Linear
from hypothesis import given, settings
from hypothesis import strategies as st

from robustify.gradients import gradient_norms
from robustify.importance import draw, logit_slopes
from robustify.losses import LOSSES
from robustify.sensitivity import Sensitivity, UpsilonTracker, budget_scale, budgets, conjugate, upsilon
from robustify.threat import ThreatModel

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
    split = budgets(slope, upsilon(slope, q).value ** -(q - 1), q - 1, delta, p)
    even = torch.full_like(slope, 1 / len(slope))
    assert budget_scale(slope, even, q - 1, p, None) == pytest.approx(upsilon(slope, q).value ** -(q - 1), rel=1e-9)
    if math.isinf(p):
        assert torch.equal(split, torch.full_like(slope, delta))
    else:
        assert float((split**p).mean()) == pytest.approx(delta**p, rel=1e-9)
        assert torch.equal(split == 0, slope == 0)


@settings(max_examples=60, deadline=None)
@given(slopes, orders.filter(math.isfinite), st.floats(1, 6), st.floats(0.05, 1), st.integers(0, 99))
def test_a_cap_saves_nothing_where_the_others_can_spend_it(slope, p, cap, temperature, seed):
    weights = torch.rand(len(slope), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights /= weights.sum()
    power = (conjugate(p) - 1) * temperature
    scale = budget_scale(slope, weights, power, p, cap)
    split = budgets(slope, scale, power, 0.1, p, cap)
    cost = float((weights * (split / 0.1) ** p).sum())
    most = float(weights[slope > 0].sum()) * cap**p
    assert cost == pytest.approx(min(1.0, most), rel=1e-6)
    assert float(split.max()) <= 0.1 * cap * (1 + 1e-9)


def test_a_capped_split_by_hand():
    """Slopes 1, 1, 10 with p = 2 and cap 1.5: the third is held at 1.5, the others share 3 - 2.25."""
    split = budgets(
        slope := torch.tensor([1.0, 1.0, 10.0]), budget_scale(slope, torch.full((3,), 1 / 3), 1, 2, 1.5), 1, 1, 2, 1.5
    )
    assert split.tolist() == pytest.approx([math.sqrt(0.375), math.sqrt(0.375), 1.5])


def test_importance_sampling_is_unbiased_and_its_error_covers():
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(4, 12, generator=generator))
    x = torch.rand(500, 3, 2, 2, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
    norms = gradient_norms(model, [(x, y)], "redlr", "Linf")
    truth = upsilon(norms, 2)
    slopes = logit_slopes(model, [(x, y)], "redlr")
    moments, hits = [], 0
    for seed in range(400):
        drawn = draw(slopes, 2, 64, seed)
        found = drawn.estimate(norms[drawn.indices], 500)
        assert float((drawn.weights * slopes[drawn.indices] ** 0).sum()) > 0
        moments.append(found.value**2)
        hits += abs(found.value - truth.value) <= 1.96 * found.se
    mean, spread = torch.tensor(moments).mean(), torch.tensor(moments).std() / math.sqrt(400)
    assert abs(float(mean) - truth.value**2) < 4 * float(spread)
    assert hits / 400 > 0.85


def test_importance_sampling_never_draws_an_image_without_slope():
    slopes = torch.tensor([0.0, 1.0, 0.0, 2.0])
    drawn = draw(slopes, 2, 100, 0)
    assert set(drawn.indices.tolist()) == {1, 3}
    assert float(drawn.counts.sum()) == 100
    assert draw(torch.zeros(5), 2, 10, 0).estimate(torch.zeros(0), 5).value == 0


def test_a_smoothed_denominator_bounds_the_slope():
    logits, y = torch.tensor([[1.0, 1.0 - 1e-4, 1.0 - 2e-4]]), torch.tensor([0])
    for loss in ("redlr", "dlr"):
        assert LOSSES[loss](logits, y) == pytest.approx(-0.5, abs=1e-2)
        assert abs(float(LOSSES[loss](logits, y, 0.1))) < 2e-3


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
    return UpsilonTracker(rule, ThreatModel("Linf", 0.1, 2.0), **{"every": 5, "rho": 0.25, "images": 6, **more})


def learn(tracker, slope):
    """A batch whose attack saw these slopes and spent nothing."""
    tracker.note(torch.zeros(len(slope)), slope)
    tracker.update()


def test_when_each_rule_measures():
    for rule, later in (
        ("epoch", [True, False]),
        ("every", [False, True]),
        ("importance", [False, True]),
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
    learn(t, torch.full((3,), 4.0))
    assert t.value == pytest.approx(math.sqrt(0.75 * 4 + 0.25 * 16))


def test_the_window_keeps_the_last_images():
    t = tracker("window")
    t.measure(torch.full((6,), 1.0), 6)
    learn(t, torch.full((4,), 3.0))
    assert t.value == pytest.approx(math.sqrt((2 * 1 + 4 * 9) / 6))


def test_the_ledger_says_what_was_spent():
    t = tracker("epoch")
    t.measure(torch.ones(4), 4)
    for moved in ([0.0, 0.1, 0.2], [0.1]):
        t.note(torch.tensor(moved), torch.ones(len(moved)))
        t.update()
    summary = t.summary()
    assert summary["mean_cost"] == pytest.approx((0 + 1 + 4 + 1) / 4, rel=1e-6)
    assert summary["zero_share"] == 0.25
    assert summary["largest_delta"] == pytest.approx(0.2)
    assert math.isnan(t.summary()["mean_cost"]) or t.summary()["mean_cost"] == 0  # cleared


def test_a_tracker_continues_from_its_state():
    t = tracker("window")
    t.measure(torch.rand(6), 6)
    t.note(torch.rand(3), torch.rand(3))
    t.update()
    other = tracker("window")
    other.load_state_dict(t.state_dict())
    assert other.value == t.value
    assert other.summary() == t.summary()


def test_a_cap_limits_single_images():
    split = budgets(torch.tensor([0.1, 10.0]), 1.0, 1.0, 0.1, 2.0, cap=3)
    assert split.tolist() == pytest.approx([0.01, 0.3])
