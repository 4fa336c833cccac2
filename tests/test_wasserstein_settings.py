"""Settings of the wasserstein method that would be silently ignored are refused."""

from __future__ import annotations

import pytest

from robustify.errors import UserError
from robustify.recipe import build
from robustify.resolve import resolve


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"adversary": "batch", "inner_loss": "ce"}, "a loss of its own"),
        ({"adversary": "dual", "step_ratio": 3.0}, "step_ratio says nothing"),
        ({"adversary": "knapsack", "step_ratio": 3.0}, "step_ratio says nothing"),
        ({"adversary": "random-radius", "steps": 1}, "take steps >= 2"),
    ],
)
def test_what_would_be_ignored_is_refused(method, said):
    with pytest.raises(UserError, match=said):
        build({"model": "a", "method": {"name": "wasserstein", **method}})


def test_a_resolved_recipe_is_valid_again():
    for adversary in ("batch", "dual", "knapsack", "random-radius", "budget"):
        recipe = build({"model": "a", "method": {"name": "wasserstein", "adversary": adversary}})
        assert build(recipe.to_dict()) == recipe


def test_dual_has_no_price_in_w_infinity():
    with pytest.raises(UserError, match="price per distance"):
        build({"model": "a", "threat": "Winf-Linf:8/255", "method": {"name": "wasserstein", "adversary": "dual"}})


def test_a_run_lends_its_method_with_its_settings():
    run = build({"model": "a", "method": {"name": "wasserstein", "beta": 2, "adversary": "knapsack"}})
    again = resolve(None, {"model.source": "runs/a"}, run=run).recipe
    assert again.method == run.method
    assert resolve(None, {"model.source": "runs/a", "method.name": "trades"}, run=run).recipe.method.name == "trades"
