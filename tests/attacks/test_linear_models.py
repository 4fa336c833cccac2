"""On a linear model with one margin the worst perturbation is known, so every attack must find it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Linear, tiny_net

from robustify.attacks import fgsm, pgd, w_fgsm, w_pgd
from robustify.evaluation import counted
from robustify.gradients import gradient_norms
from robustify.losses import ce
from robustify.sensitivity import conjugate, upsilon
from robustify.threat import ThreatModel, dual_norms, norms


def two_classes() -> Linear:
    return Linear(torch.tensor([[0.0] * 6, [1.0, -2.0, 0.5, 3.0, -0.1, 0.7]], dtype=torch.float64))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_the_margin_falls_by_eps_times_the_dual_norm(interior, norm, attack):
    x, y = interior[0], interior[1] % 2
    model, eps = two_classes(), 0.02
    x_adv = (fgsm if attack == "fgsm" else pgd)(model, x, y, threat=ThreatModel(norm, eps))
    w = model.weight[1:].detach().view(1, *x.shape[1:])
    towards = torch.where(y == 1, -1.0, 1.0)
    gain = towards * ((x_adv - x) * w).flatten(1).sum(1)
    assert (norms(x_adv - x, norm) <= eps * (1 + 1e-9)).all()
    already_wrong = model(x).argmax(1) != y  # pgd may stop moving what it has fooled
    wanted = eps * dual_norms(w, norm)
    share = 0.9 if attack == "pgd" and norm != "Linf" else 1 - 1e-9  # projected steps converge, a sign step arrives
    fooled = model(x_adv).argmax(1) != y
    assert ((gain >= share * wanted) | already_wrong | fooled).all()
    if attack == "fgsm":
        assert torch.allclose(gain, wanted.expand_as(gain), rtol=1e-9)


def test_pgd_flips_an_image_exactly_when_its_distance_is_within_eps(interior):
    x, y = interior[0], interior[1] % 2
    model = two_classes()
    w = model.weight[1].detach()
    distance = (x.flatten(1) @ w).abs() / w.abs().sum()
    for eps in (0.005, 0.02, 0.08):
        fooled = model(pgd(model, x, y, threat=ThreatModel("Linf", eps), steps=20)).argmax(1) != y
        wrong = model(x).argmax(1) != y
        clear = (distance - eps).abs() > 1e-6
        assert torch.equal(fooled[clear], ((distance < eps) | wrong)[clear])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("p", [1.5, 2.0, 4.0, math.inf])
def test_w_fgsm_is_the_closed_form_and_spends_its_budget_exactly(linear, interior, norm, p):
    x, y = interior
    threat = ThreatModel(norm, 0.01, p)
    x_adv = w_fgsm(linear, x, y, threat=threat, loss="ce")
    slope = gradient_norms(linear, [(x, y)], "ce", norm)
    q = conjugate(p)
    length = 0.01 * (slope / upsilon(slope, q).value) ** (q - 1)
    assert torch.allclose(norms(x_adv - x, norm), length, rtol=1e-6)
    if p < math.inf:
        assert float((norms(x_adv - x, norm) ** p).mean() ** (1 / p)) == pytest.approx(0.01, rel=1e-9)


def test_w_fgsm_gains_delta_times_upsilon_to_first_order(linear, interior):
    x, y = interior
    delta = 1e-5
    x_adv = w_fgsm(linear, x, y, threat=ThreatModel("Linf", delta, 2.0), loss="ce")
    gain = float((ce(linear(x_adv), y) - ce(linear(x), y)).mean().detach())
    assert gain == pytest.approx(delta * upsilon(gradient_norms(linear, [(x, y)], "ce", "Linf"), 2).value, rel=1e-3)


@pytest.mark.parametrize(
    "threat", ["W2-Linf:8/255", "W2-L2:0.3", "W1.5-L2:0.3", "Winf-L2:0.3", "Winf-Linf:8/255", "W4-Linf:8/255"]
)
@pytest.mark.parametrize("loss", ["ce", "dlr", "redlr"])
def test_w_pgd_stays_within_its_budget_and_the_pixels(linear, threat, loss):
    x = torch.rand(50, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = linear(x).argmax(1).detach()
    t = ThreatModel.parse(threat)
    x_adv = w_pgd(linear, x, y, threat=t, loss=loss, steps=10, batch_size=16)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    size = norms(x_adv - x, t.norm)
    spent = size.max() if t.p == math.inf else (size**t.p).mean() ** (1 / t.p)
    assert float(spent) <= t.eps * (1 + 1e-9)


def test_w_pgd_leaves_the_inside_of_an_l2_ball_alone(linear, interior):
    """The published code pushes interior points out to the sphere when p is infinite; that is a fault."""
    x, y = interior
    x_adv = w_pgd(linear, x, y, threat=ThreatModel("L2", 0.5, math.inf), loss="ce", steps=4, step_ratio=0.4)
    assert (norms(x_adv - x, "L2") < 0.25).all()


def test_passes_are_those_the_algorithms_need(interior):
    x, y = interior[0], interior[1] % 2
    model = two_classes()
    n = len(x)
    for attack, more, forward, backward in [
        (fgsm, {}, 1, 1),
        (pgd, {"steps": 7}, 7, 7),
        (w_pgd, {"steps": 7, "loss": "ce"}, 8, 7),
        (w_fgsm, {"loss": "ce"}, 2, 1),
    ]:
        threat = ThreatModel("Linf", 1e-6, 2.0 if attack in (w_pgd, w_fgsm) else None)
        with counted(model) as passes:
            attack(model, x, y, threat=threat, **more)
        assert (passes.forward, passes.backward) == (forward * n, backward * n), attack


def test_restarts_only_work_on_what_is_left(interior):
    x, _y = interior[0], interior[1] % 2
    model = two_classes()
    with counted(model) as passes:
        pgd(model, x, 1 - model(x).argmax(1), threat=ThreatModel("Linf", 0.01), steps=3, restarts=5)
    assert passes.forward < 6 * len(x)


def test_pgd_is_repeatable_and_its_seed_matters():
    net, x, y = tiny_net().eval(), torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    threat = ThreatModel("Linf", 0.03)
    assert torch.equal(pgd(net, x, y, threat=threat, seed=1), pgd(net, x, y, threat=threat, seed=1))
    assert not torch.equal(pgd(net, x, y, threat=threat, seed=1), pgd(net, x, y, threat=threat, seed=2))
