"""The knapsack by hand, against a linear programme, and against its dual."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from robustify.duality import PointwiseCurve, distributional_accuracy
from robustify.knapsack import shares, worst_accuracy, worst_curve

DISTANCES = arrays(
    np.float64,
    st.integers(1, 30),
    elements=st.one_of(st.just(0.0), st.just(math.inf), st.sampled_from([0.1, 0.2, 0.5]), st.floats(1e-4, 2.0)),
)
ORDERS = st.sampled_from([1.1, 1.5, 2.0, 3.0, 10.0])
RADII = st.floats(0.0, 3.0)


def test_by_hand():
    d = np.array([0.0, 3.0, 1.0, 2.0])
    # p = 2, budget 4 * delta^2: one flip costs 1, the next 4, the last 9
    assert worst_accuracy(d, 0.0, 2) == 0.75
    assert worst_accuracy(d, 0.5, 2) == 0.5
    assert shares(d, 1.0, 2).tolist() == [1.0, 0.0, 1.0, 0.75]
    assert worst_accuracy(d, 1.0, 2) == pytest.approx((1 + 0.25) / 4, abs=1e-15)
    assert worst_accuracy(d, math.sqrt(14 / 4), 2) == pytest.approx(0, abs=1e-12)
    assert worst_accuracy(d, 9.0, 2) == 0
    assert worst_accuracy(np.array([math.inf, 1.0]), 9.0, 2) == 0.5  # no budget buys what has no price
    assert worst_accuracy(d, 2.0, math.inf) == 0.25
    with pytest.raises(ValueError):
        worst_accuracy(np.zeros(0), 1.0, 2)


@settings(max_examples=60, deadline=None)
@given(DISTANCES, st.floats(0.05, 3.0), st.sampled_from([1.1, 1.5, 2.0, 3.0]))
def test_it_is_the_optimum_of_the_linear_programme(d, delta, p):
    from scipy.optimize import linprog

    bought = shares(d, delta, p)
    assert ((bought >= 0) & (bought <= 1)).all()
    assert ((bought > 0) & (bought < 1)).sum() <= 1
    priced = np.isfinite(d)
    price = (np.where(priced, d, 0) / delta) ** p
    assert (bought * price).sum() <= len(d) * (1 + 1e-12)
    if priced.any():
        found = linprog(-np.ones(priced.sum()), A_ub=price[priced][None], b_ub=[len(d)], bounds=(0, 1), method="highs")
        assert bought.sum() == pytest.approx(-found.fun, abs=1e-5)  # the solver's own tolerance


@settings(max_examples=200, deadline=None)
@given(DISTANCES, RADII, st.one_of(ORDERS, st.just(math.inf)))
def test_the_dual_gives_the_same_number(d, delta, p):
    dual, _ = distributional_accuracy(PointwiseCurve.from_distances(d), delta, p)
    assert dual == pytest.approx(worst_accuracy(d, delta, p), abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(DISTANCES, ORDERS)
def test_the_curve_falls_and_is_convex_in_the_budget(d, p):
    """More budget buys less and less: convex in delta^p, between the clean accuracy and the share without any flip."""
    budgets = np.linspace(0, 2.0, 21)
    curve = worst_curve(d, budgets ** (1 / p), p)
    assert curve[0] == np.mean(d > 0)
    assert (np.diff(curve) <= 1e-12).all()
    assert (np.diff(curve, 2) >= -1e-9).all()
    assert (curve >= np.mean(np.isinf(d)) - 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(DISTANCES, RADII)
def test_a_larger_order_allows_less(d, delta):
    """The W_p balls shrink as p grows, down to the pointwise threat."""
    found = [worst_accuracy(d, delta, p) for p in (1.1, 2.0, 5.0, 50.0, math.inf)]
    assert (np.diff(found) >= -1e-9).all()


@settings(max_examples=60, deadline=None)
@given(DISTANCES, RADII)
def test_the_limit_of_large_orders_is_the_pointwise_accuracy(d, delta):
    clear = np.abs(d - delta) > 0.05  # at the radius itself the limit jumps
    d = d[clear]
    if len(d):
        assert worst_accuracy(d, delta, 2000.0) == pytest.approx(worst_accuracy(d, delta, math.inf), abs=1e-6)
        assert distributional_accuracy(PointwiseCurve.from_distances(d), delta, 2000.0)[0] == pytest.approx(
            worst_accuracy(d, delta, math.inf), abs=1e-6
        )


def test_the_dual_by_hand_and_by_sampling_the_radius():
    d = np.array([0.0, 1.0, 2.0, 3.0])
    accuracy, t = distributional_accuracy(PointwiseCurve.from_distances(d), 1.0, 2)
    assert (accuracy, t) == (pytest.approx(0.3125), 2.0)  # the flip bought in part is the marginal one
    u = (np.arange(100_000) + 0.5) / 100_000
    average = np.mean(np.mean(d[:, None] > t * u ** (1 / 2), axis=0))
    assert accuracy == pytest.approx(average - (1.0 / t) ** 2, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(DISTANCES, RADII, st.one_of(ORDERS, st.just(math.inf)), st.integers(1, 9))
def test_a_coarse_grid_errs_on_the_safe_side(d, delta, p, points):
    exact = PointwiseCurve.from_distances(d)
    radii = np.linspace(0, 2, points + 1)[1:].tolist()
    known = [exact.at(r) for r in radii]
    true = worst_accuracy(d, delta, p)
    assert distributional_accuracy(PointwiseCurve.certified(radii, known), delta, p)[0] <= true + 1e-10
    assert distributional_accuracy(PointwiseCurve.attacked(radii, known), delta, p)[0] >= true - 1e-10


def test_a_step_counts_at_its_own_edge_as_it_was_measured():
    assert PointwiseCurve.certified([0.0, 1.0], [0.9, 0.5]).at(1.0) == 0.5
    assert PointwiseCurve.certified([0.0, 1.0], [0.9, 0.5]).at(1.1) == 0
    assert PointwiseCurve.certified([0.0, 1.0], [0.9, 0.5]).at(0.1) == 0.5
    assert PointwiseCurve.attacked([0.0, 1.0], [0.9, 0.5]).at(0.99) == 0.9
    assert PointwiseCurve.attacked([0.0, 1.0], [0.9, 0.5]).at(7.0) == 0.5
    assert PointwiseCurve.attacked([1.0, 2.0], [0.5, 0.6]).at(2.0) == 0.5  # it cannot rise
    for wrong in (([1.0, 1.0], [0.5, 0.5]), ([1.0], [1.5]), ([], []), ([-1.0], [0.5])):
        with pytest.raises(ValueError):
            PointwiseCurve.certified(*wrong)
