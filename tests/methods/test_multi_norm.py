from __future__ import annotations

import pytest
import torch
from helpers import Linear, tiny_net, toy_data
from pydantic import ValidationError

from robustify.errors import UserError
from robustify.methods import MultiNorm, withstood
from robustify.modes import Nets, borrowed
from robustify.resolve import resolve
from robustify.rng import Draws, mix
from robustify.threat import ThreatModel, norms, sparse_steepest, steepest

LINF = ThreatModel.parse("Linf:8/255")


def attack(method, tracker, step, net=None):
    net = net or tiny_net()
    x, y = toy_data(16)
    with borrowed(net):
        x_adv = method.perturb(Nets(net, net), x, y, LINF, Draws(mix(7, step)), tracker)
    tracker.update()
    return x, x_adv


def test_norms_are_drawn_in_proportion_to_their_errors():
    """3000 draws with errors 0.6 and 0.2: three quarters for the first, within four standard errors."""
    weights = torch.tensor([0.6, 0.2], dtype=torch.float64)
    drawn = sum(Draws(i).pick(weights) == 0 for i in range(3000))
    assert drawn / 3000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 3000) ** 0.5)


def test_each_batch_lies_in_one_ball_and_the_error_of_that_ball_moves():
    method = MultiNorm(threats=("Linf:0.03", "L2:0.3", "L1:2"), steps=3)
    tracker = method.tracker(LINF, 16)
    used = set()
    for step in range(12):
        before = tracker.errors.clone()
        x, x_adv = attack(method, tracker, step)
        (number,) = (tracker.errors != before).nonzero().flatten().tolist() or [None]
        assert number is not None
        threat = method.trained[number]
        used.add(threat.norm)
        assert (norms(x_adv - x, threat.norm) <= threat.eps * (1 + 1e-5)).all()
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
    assert used == {"Linf", "L1"}
    again = method.tracker(LINF, 16)
    again.load_state_dict(tracker.state_dict())
    assert torch.equal(attack(method, tracker, 99)[1], attack(method, again, 99)[1])
    assert set(tracker.summary()) == {"error Linf:0.03", "error L1:2"}


def test_all_trains_on_every_norm():
    assert [t.norm for t in MultiNorm(train_on="all").trained] == ["Linf", "L2", "L1"]


def test_the_running_error_is_an_average():
    tracker = MultiNorm().tracker(LINF, 16)
    tracker.observe(1, torch.tensor([True, False, False, False]))
    tracker.update()
    assert tracker.errors.tolist() == pytest.approx([1.0, 0.925])


def test_the_sparse_direction_is_the_steepest_one_when_a_single_coordinate_moves():
    g = torch.randn(5, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparse_steepest(g, 0.05), steepest(g, "L1"))
    assert norms(sparse_steepest(g, 0.3), "L1").tolist() == pytest.approx([1.0] * 5)
    assert ((sparse_steepest(g, 0.3) != 0).flatten(1).sum(1) == 6).all()


def test_the_l1_attack_is_optimal_on_a_linear_model_with_few_large_slopes():
    """One weight outweighs the rest: all of the budget goes there, and the loss is J at x + eps on that pixel."""
    weight = torch.zeros(2, 20, dtype=torch.float64)
    weight[1, 7] = 5.0
    x = torch.full((3, 1, 4, 5), 0.3, dtype=torch.float64)
    method = MultiNorm(threats=("Linf:0.1", "L1:0.5"), steps=20)
    tracker = method.tracker(LINF, 3)
    tracker.errors = torch.tensor([0.0, 1.0], dtype=torch.float64)
    net = Linear(weight)
    with borrowed(net):
        x_adv = method.perturb(Nets(net, net), x, torch.zeros(3, dtype=torch.long), LINF, Draws(0), tracker)
    assert (x_adv - x).flatten(1)[:, 7].tolist() == pytest.approx([0.5] * 3, abs=0.02)


@pytest.mark.parametrize("threats", [["Linf:8/255"], ["Linf:8/255", "Linf:4/255"], ["Linf:8/255", "W2-L2:0.5"]])
def test_threats_are_of_different_norms(threats):
    with pytest.raises(ValidationError, match="different norms"):
        MultiNorm(threats=threats)


def test_what_is_withstood_is_the_union_and_the_threat_is_one_of_it():
    recipe = resolve(None, {"model.source": "a", "method.name": "multi-norm"}, ["eval.attacks=[clean, apgd-ce]"]).recipe
    assert [t.spec for t in withstood(recipe.method, recipe.threat)] == ["Linf:8/255", "L2:0.5", "L1:12"]
    with pytest.raises(UserError, match="take Linf:8/255"):
        resolve(None, {"model.source": "a", "method.name": "multi-norm", "threat": "L2:1"}, ["eval.attacks=[clean]"])
