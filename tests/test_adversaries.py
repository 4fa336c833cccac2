"""The distributional adversaries of the training: on a linear model everything is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Linear, tiny_net

from robustify.adversaries import ADVERSARIES
from robustify.adversaries.budget import Budget
from robustify.adversaries.inner import Inner
from robustify.adversaries.random_radius import gap
from robustify.duality import PointwiseCurve, distributional_accuracy
from robustify.evaluation import counted
from robustify.knapsack import shares
from robustify.modes import Nets, borrowed
from robustify.rng import Draws
from robustify.sensitivity import UpsilonTracker
from robustify.threat import ThreatModel, norms

G = torch.Generator().manual_seed(0)
X, Y = 0.3 + 0.4 * torch.rand(64, 3, 6, 6, generator=G), torch.randint(0, 4, (64,), generator=G)


def attacked(adversary, threat, net, x, y, *, steps=5, loss="kl", rounds=1, memory=None):
    threat = ThreatModel.parse(threat)
    memory = memory or adversary.memory(threat, len(x))
    if isinstance(memory, UpsilonTracker) and memory.measured is None:
        memory.measure(torch.full((len(x),), 0.1), len(x))
    x_adv = x
    for k in range(rounds):
        with borrowed(net):
            x_adv = adversary.attack(Nets(net, net), x, y, threat, Inner(steps, 2.0, loss), Draws(k), memory)
        memory.update()
    return x_adv, memory


def two_classes(n=400):
    """A linear model whose flip distances in Linf are known: |w x + b| / ||w||_1."""
    w = torch.tensor([[0.0] * 4, [1.0, -2.0, 0.5, 0.5]], dtype=torch.float64)
    model = Linear(w)
    x = 0.4 + 0.2 * torch.rand(n, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = model(x)[:, 1] - model(x)[:, 0]
    return model, x, (difference > 0).long(), difference.abs() / 4


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_adversary_stays_in_the_pixels_and_is_repeatable(name, norm):
    eps = {"Linf": "32/255", "L2": "0.5"}[norm]
    net = tiny_net()
    far = {"reach": 8} if name in ("knapsack", "dual") else {}
    twice = [
        attacked(ADVERSARIES[name](**far), f"W2-{norm}:{eps}", net, X, net.eval()(X).argmax(1), rounds=1)[0]
        for _ in range(2)
    ]
    assert torch.equal(*twice)
    assert twice[0].min() >= 0
    assert twice[0].max() <= 1
    assert not torch.equal(twice[0], X)


@pytest.mark.parametrize(("name", "loss"), [("batch", "ce"), ("dual", "ce"), ("dual", "kl")])
def test_over_the_batches_the_mean_cost_comes_to_the_budget(name, loss):
    net = tiny_net().eval()
    y = net(X).argmax(1)
    adversary = ADVERSARIES[name](**({"loss": "ce", "rho": 0.3} if name == "batch" else {"reach": 4, "rate": 0.1}))
    _, memory = attacked(adversary, "W2-L2:0.2", net, X, y, loss=loss, rounds=120, steps=6)
    memory.summary()
    _, memory = attacked(adversary, "W2-L2:0.2", net, X, y, loss=loss, rounds=50, steps=6, memory=memory)
    assert memory.summary()["mean_cost"] == pytest.approx(1, abs=0.25)


def test_the_knapsack_adversary_buys_what_the_knapsack_attack_does():
    model, x, y, distances = two_classes()
    adversary = ADVERSARIES["knapsack"](reach=4, images=400)
    _, memory = attacked(adversary, "W2-Linf:4/255", model, x, y, steps=60, loss="ce", rounds=2)
    exact = shares(distances.numpy(), 4 / 255, 2)
    assert memory.t * 4 / 255 == pytest.approx(float(distances[exact > 0].max()), abs=2 * 16 / 255 / 60)
    x_adv, memory = attacked(adversary, "W2-Linf:4/255", model, x, y, steps=60, loss="ce", memory=memory)
    moved = norms(x_adv - x, "Linf") > 0
    assert abs(int(moved.sum()) - exact.sum()) <= 0.15 * exact.sum()
    with torch.no_grad():
        assert torch.equal(model(x_adv).argmax(1) != y, moved)


def test_the_random_radius_finds_the_t_that_attains_the_dual():
    model, x, y, distances = two_classes()
    _, t = distributional_accuracy(PointwiseCurve.from_distances(distances.numpy()), 2 / 255, 2)
    adversary = ADVERSARIES["random-radius"](images=4000, rate=0.5)
    _, memory = attacked(adversary, "W2-Linf:2/255", model, x, y, steps=6, loss="ce", rounds=150)
    assert memory.t * 2 / 255 == pytest.approx(t, rel=0.15)
    assert memory.values()["t"] == memory.t * 2 / 255


def test_the_gap_is_exact_for_a_straight_line():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert gap(u, 0.9 - 0.4 * u) == pytest.approx(0.2)
    assert gap(u[:400], u[:400]) == 0


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("loss", ["kl", "ce", "redlr"])
def test_an_adversary_spends_the_passes_it_says(name, loss):
    net = tiny_net()
    adversary, inner = ADVERSARIES[name](), Inner(5, 2.0, loss)
    memory = adversary.memory(ThreatModel.parse("W2-Linf:8/255"), len(X))
    if isinstance(memory, UpsilonTracker):
        memory.measure(torch.ones(64), 64)
    with borrowed(net), counted(net) as passes:
        adversary.attack(Nets(net, net), X, Y, ThreatModel.parse("W2-Linf:8/255"), inner, Draws(0), memory)
    assert adversary.passes(inner, 0.0) * len(X) == passes.forward
    assert adversary.passes(inner, 1.0) * len(X) == passes.forward + passes.backward


@pytest.mark.parametrize("name", ADVERSARIES)
def test_a_memory_continues_from_its_state(name):
    net = tiny_net().eval()
    y = net(X).argmax(1)
    adversary, threat = ADVERSARIES[name](), ThreatModel.parse("W2-Linf:8/255")
    _, memory = attacked(adversary, "W2-Linf:8/255", net, X, y, rounds=3)
    other = adversary.memory(threat, len(X))
    other.load_state_dict(memory.state_dict())
    a, _ = attacked(adversary, "W2-Linf:8/255", net, X, y, memory=memory)
    b, _ = attacked(adversary, "W2-Linf:8/255", net, X, y, memory=other)
    assert torch.equal(a, b)
    assert other.summary() == memory.summary()


def test_a_cap_is_held_and_its_rest_is_spent_elsewhere():
    net = tiny_net().eval()
    y = net(X).argmax(1)
    from robustify.gradients import gradient_norms

    for rescale, spent in ((True, 1.0), (False, None)):
        adversary = Budget(cap=1, rescale=rescale, loss="ce")
        memory = adversary.memory(ThreatModel.parse("W2-L2:0.1"), len(X))
        memory.measure(gradient_norms(net, [(X, y)], "ce", "L2"), len(X))
        x_adv, memory = attacked(adversary, "W2-L2:0.1", net, X, y, memory=memory)
        assert float(norms(x_adv - X, "L2").max()) <= 0.1 * (1 + 1e-5)
        cost = memory.summary()["mean_cost"]
        assert cost == pytest.approx(spent, rel=1e-5) if spent else cost < 1


def test_ema_cannot_rescale():
    with pytest.raises(ValueError, match="remembers a moment and no norms"):
        Budget(upsilon="ema", rescale=True)
    assert math.isclose(Budget(upsilon="ema").cap or 0, 3)
