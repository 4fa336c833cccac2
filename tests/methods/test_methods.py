from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_net
from torch import nn

from robustify.attacks import ascent
from robustify.evaluation import counted
from robustify.methods import METHODS, FastAt, Mart, PgdAt, Trades, Wasserstein
from robustify.modes import Nets, borrowed
from robustify.rng import Draws
from robustify.threat import ThreatModel, norms, steepest, uniform_in_ball

X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4


def perturbed(method, threat, net=None, x=X, y=Y, tracker=None):
    net = net or tiny_net()
    with borrowed(net):
        return method.perturb(Nets(net, net), x, y, ThreatModel.parse(threat), Draws(0), tracker)


def test_the_trades_step_has_the_gradient_of_the_formula():
    """d/dtheta of mean CE(f(x),y) + beta mean sum_c p log(p/q), written out, in double precision, x' held fixed."""
    net = tiny_net().double().eval()
    x, x_adv = (
        X.double(),
        (X + 0.03 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1).double(),
    )
    total, parts = Trades(beta=4.0).loss(net(x), net(x_adv), Y)
    total.backward()
    ours = [w.grad.clone() for w in net.parameters()]
    net.zero_grad()
    p, q = net(x).softmax(1), net(x_adv).softmax(1)
    written_out = -p[range(12), Y].log().mean() + 4.0 * (p * (p / q).log()).sum(1).mean()
    written_out.backward()
    assert float(total.detach()) == pytest.approx(float(written_out.detach()), rel=1e-12)
    assert float((parts["ce"] + 4.0 * parts["kl"]).detach()) == pytest.approx(float(total.detach()))
    for a, w in zip(ours, net.parameters(), strict=True):
        assert torch.allclose(a, w.grad, rtol=1e-9, atol=1e-12)


def test_the_kl_ascent_takes_the_gradient_of_kl():
    """The entropy of p is left out of the objective; the direction must be that of KL all the same."""
    net = tiny_net().double().eval()
    seen = {}
    plain = ascent.steepest

    def spy(g, norm):
        seen.setdefault("g", g)
        return plain(g, norm)

    ascent.steepest = spy
    try:
        perturbed(Trades(steps=1), "Linf:8/255", net, X.double())
    finally:
        ascent.steepest = plain
    with borrowed(net):
        start = (X.double() + 0.001 * Draws(0).normal(X.double())).clamp(0, 1).requires_grad_(True)
        p, q = net(X.double()).softmax(1), net(start).softmax(1)
        (g,) = torch.autograd.grad((p * (p / q).log()).sum(), start)
    assert torch.allclose(seen["g"], g, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "method",
    [Trades(steps=3), Mart(steps=3), PgdAt(steps=3), FastAt(), Wasserstein(steps=3, adversary={"cap": 2})],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_perturbations_stay_in_the_ball_and_the_pixels(method, norm):
    eps = {"Linf": 0.03, "L2": 0.5}[norm]
    threat = ThreatModel(norm, eps, 2.0 if method.distributional else None)
    tracker = method.tracker(threat, 12)
    if tracker:
        tracker.measure(torch.full((12,), 0.1), 12)
    x_adv = perturbed(method, threat, tracker=tracker)
    largest = eps * (2 if method.distributional else 1)
    assert (norms(x_adv - X, norm) <= largest * (1 + 1e-5)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, X)


def test_wasserstein_with_p_infinite_is_trades():
    w = Wasserstein(steps=4, step_ratio=2.5)
    tracker = w.tracker(ThreatModel.parse("Winf-Linf:8/255"), 12)
    tracker.measure(torch.ones(12), 12)
    assert torch.equal(perturbed(w, "Winf-Linf:8/255", tracker=tracker), perturbed(Trades(steps=4), "Linf:8/255"))


@pytest.mark.parametrize("inner", ["kl", "redlr", "ce"])
def test_a_batch_of_the_whole_set_spends_the_budget_exactly(inner):
    net = tiny_net().eval()
    y = net(X).argmax(1)
    w = Wasserstein(steps=2, inner_loss=inner, adversary={"loss": "ce"})
    threat = ThreatModel.parse("W2-L2:0.1")
    tracker = w.tracker(threat, 12)
    from robustify.gradients import gradient_norms

    tracker.measure(gradient_norms(net, [(X, y)], "ce", "L2"), 12)
    x_adv = perturbed(w, threat, net, X, y, tracker)
    tracker.update()
    assert tracker.summary()["mean_cost"] == pytest.approx(1, rel=1e-5)
    assert float((norms(x_adv - X, "L2") ** 2).mean()) <= 0.1**2 * (1 + 1e-5)


def test_wrong_images_get_no_budget_and_stay():
    net = tiny_net().eval()
    right = net(X).argmax(1)
    y = torch.where(torch.arange(12) < 6, right, (right + 1) % 4)
    w = Wasserstein(steps=2, adversary={"cap": None})
    tracker = w.tracker(ThreatModel.parse("W2-Linf:8/255"), 12)
    tracker.measure(torch.ones(12), 12)
    x_adv = perturbed(w, "W2-Linf:8/255", net, X, y, tracker)
    assert torch.equal(x_adv[6:], X[6:])
    assert (norms(x_adv - X, "Linf")[:6] > 0).all()
    tracker.update()
    assert tracker.summary()["zero_share"] == 0.5


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        (Trades(steps=5), 6, 5),
        (PgdAt(steps=5), 5, 5),
        (FastAt(), 1, 1),
        (FastAt(noise="n-fgsm"), 1, 1),
        (Mart(steps=5), 5, 5),
        (Wasserstein(steps=5), 6, 6),
        (Wasserstein(steps=5, inner_loss="redlr"), 5, 5),
        (Wasserstein(steps=5, inner_loss="ce"), 6, 6),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_the_attack_spends_the_passes_it_says(method, forward, backward):
    net = tiny_net()
    threat = ThreatModel("Linf", 0.03, 2.0 if method.distributional else None)
    tracker = method.tracker(threat, 12)
    if tracker:
        tracker.measure(torch.ones(12), 12)
    with counted(net) as passes:
        perturbed(method, threat, net, tracker=tracker)
    assert (passes.forward, passes.backward) == (12 * forward, 12 * backward)
    training = 2 if method.needs_clean else 1
    assert method.passes(1.2, 2.6) == pytest.approx(forward + 1.2 * backward + training * 3.6)


def test_the_first_kl_step_is_taken_on_the_exact_network():
    exact, search = tiny_net(seed=0).eval(), tiny_net(seed=1).eval()
    with borrowed(exact), borrowed(search), counted(exact) as e, counted(search) as s:
        Trades(steps=4).perturb(Nets(exact, search), X, Y, ThreatModel.parse("Linf:8/255"), Draws(0), None)
    assert (e.backward, s.backward) == (12, 36)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_n_fgsm_adds_noise_of_twice_eps_and_one_step_and_projects_nothing(norm):
    eps = {"Linf": 0.03, "L2": 0.5}[norm]
    x = 0.3 + 0.4 * X  # nothing is clamped
    noise = 2 * eps * uniform_in_ball(x, norm, 1.0, Draws(0))
    net = tiny_net().eval()
    leaf = (x + noise).requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(net(leaf), Y, reduction="sum"), leaf)
    x_adv = perturbed(FastAt(noise="n-fgsm"), ThreatModel(norm, eps), net, x)
    assert torch.allclose(x_adv, x + noise + eps * steepest(g, norm), atol=1e-6)
    size = norms(x_adv - x, norm)
    assert eps * 1.2 < float(size.max()) <= 3 * eps * (1 + 1e-5)


def test_the_two_readings_of_uniform_in_the_l2_ball():
    """In 192 dimensions nearly all the volume lies near the sphere; a uniform radius does not."""
    x, threat = torch.full((2000, 3, 8, 8), 0.5), ThreatModel.parse("L2:0.5")
    sizes = {
        noise: norms(FastAt(noise=noise)._noise(x, threat, Draws(0)), "L2") / 0.5 for noise in ("uniform", "uniform-radius")
    }
    assert sizes["uniform"].mean() == pytest.approx(192 / 193, abs=0.002)
    assert sizes["uniform-radius"].mean() == pytest.approx(0.5, abs=0.02)
    assert sizes["uniform-radius"].std() == pytest.approx(12**-0.5, abs=0.02)


def test_every_method_describes_itself():
    for name, method in METHODS.items():
        assert method().name == name
        assert method.summary
        assert method.paper
        assert method.norms
    assert math.isclose(FastAt().step_length, 1.25)
    assert math.isclose(FastAt(noise="n-fgsm").step_length, 1)
