"""Methods that differentiate gradients, or take their own passes: against closed forms and written-out formulas."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import tiny_net
from torch import nn

from robustify.evaluation import counted
from robustify.losses import ce
from robustify.methods import FastAt, FreeAt, Gaat, Mart, PgdAt
from robustify.methods.base import Passes
from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import ThreatModel, dual_norms

X = 0.3 + 0.4 * torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 4


def smooth_net(seed: int = 0) -> nn.Module:
    """No kinks and no batch statistics, double precision: every derivative can be taken by differences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 4)).double()


def take(method, net, threat="Linf:8/255", x=X, y=Y, tracker=None, step=0):
    """One step of a method with its own passes: (loss, parts), the gradients left in the weights."""
    net.zero_grad()
    passes = Passes(net, lambda loss: loss.backward(), Nets(net, net), step)
    return method.step(passes, x, y, ThreatModel.parse(threat), Draws(0, total=len(x)), tracker)


def gradients(net):
    return torch.cat([w.grad.flatten() for w in net.parameters()])


@pytest.mark.parametrize("threat", ["Linf:0.02", "L2:0.2"])
def test_exact_gaat_is_the_loss_plus_eps_times_the_dual_norm(linear, interior, threat):
    """On a linear model <g, eps h(g)> = eps ||g||_*, and its parameter gradient is that of the formula by autograd."""
    x, y = interior
    total, _ = take(Gaat(gradient="exact"), linear, threat, x, y)
    ours = linear.weight.grad.clone()
    linear.zero_grad()
    residual = linear(x).softmax(1) - nn.functional.one_hot(y, 3)
    slope = dual_norms((residual @ linear.weight).view_as(x), ThreatModel.parse(threat).norm)
    written_out = (ce(linear(x), y) + ThreatModel.parse(threat).eps * slope).mean()
    written_out.backward()
    assert float(total.detach()) == pytest.approx(float(written_out.detach()), rel=1e-12)
    assert torch.allclose(ours, linear.weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_differences_tend_to_the_exact_polynomial(order):
    """With h -> 0 loss and parameter gradient become those of the double backward pass, at the rate of the formula."""
    net = smooth_net()
    exact, _ = take(Gaat(gradient="exact", order=order), net, "L2:1")
    slope = gradients(net).clone()
    errors, misses = [], []
    for h in (0.2, 0.1, 0.05):
        total, _ = take(Gaat(order=order, h=h), net, "L2:1")
        errors.append(abs(float((total - exact).detach())))
        misses.append(float((gradients(net) - slope).norm() / slope.norm()))
    assert misses[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert fine / coarse == pytest.approx(0.5, rel=0.15)  # first order in h
    for coarse, fine in pairwise(misses):
        assert fine / coarse == pytest.approx(0.5, rel=0.25)


class Quadratic(nn.Module):
    """Two logits (0, a.x + x.B x): with the loss below every loss is a quadratic function of the image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))

    def forward(self, x):
        x = x.flatten(1)
        value = x @ self.a + torch.einsum("ni,ij,nj->n", x, self.b, x)
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.mark.parametrize("gradient", ["exact", "hessian-free"])
@pytest.mark.parametrize("h", [0.25, 0.5, 1.0])
def test_the_second_order_is_exact_on_a_quadratic_loss(gradient, h, interior, monkeypatch):
    """There J(x + d) is its own polynomial, so both ways must give its value and its parameter gradient."""
    value = lambda logits, y: logits[:, 1] - logits[:, 0]  # noqa: E731
    for module in ("gaat", "differentiated"):
        monkeypatch.setattr(f"robustify.methods.{module}.ce", value)
    x, net = interior[0], Quadratic()
    y = torch.zeros(len(x), dtype=torch.long)
    total, _ = take(Gaat(gradient=gradient, order=2, h=h), net, "L2:0.1", x, y)
    ours = gradients(net).clone()
    leaf = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(value(net(leaf), y).sum(), leaf)
    d = 0.1 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    net.zero_grad()
    true = value(net(x + d), y).mean()
    true.backward()
    assert float(total.detach()) == pytest.approx(float(true.detach()), rel=1e-9)
    assert torch.allclose(ours, gradients(net), rtol=1e-8, atol=1e-11)


def test_with_h_one_gaat_is_fgsm_without_a_random_start():
    net = smooth_net()
    total, _ = take(Gaat(h=1), net)
    ours = gradients(net).clone()
    leaf = X.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(ce(net(leaf), Y).sum(), leaf)
    net.zero_grad()
    fgsm = ce(net(X + 8 / 255 * g.sign()), Y).mean()
    fgsm.backward()
    assert float(total.detach()) == pytest.approx(float(fgsm.detach()), rel=1e-12)
    assert torch.allclose(ours, gradients(net), rtol=1e-9)


def test_a_true_pgd_step_comes_every_so_often():
    net = smooth_net()
    method = Gaat(pgd_every=3, pgd_steps=2)
    spent = []
    for step in range(6):
        with counted(net) as passes:
            take(method, net, step=step)
        spent.append(passes.forward // len(X))
    assert spent == [2, 2, 3, 2, 2, 3]
    assert method.passes(0, 0) == pytest.approx(sum(spent) / 6)


@pytest.mark.parametrize(
    ("method", "forward"),
    [
        (Gaat(), 2),
        (Gaat(order=2), 3),
        (Gaat(h=1), 2),
        (Gaat(order=2, h=1), 2),
        (Gaat(gradient="exact"), 1),
        (Gaat(gradient="exact", order=2), 1),
        (FreeAt(), 1),
    ],
    ids=repr,
)
def test_own_steps_spend_the_forward_passes_they_say(method, forward):
    net = smooth_net()
    with counted(net) as passes:
        take(method, net, tracker=method.tracker(ThreatModel.parse("Linf:8/255"), 12))
    assert passes.forward == 12 * forward
    assert method.passes(0, 0) == forward


def test_the_penalty_of_grad_align_is_its_formula():
    """lambda * mean(1 - cos), the gradients at x and at a random point of the ball, and its own parameter gradient."""
    net = smooth_net()
    threat = ThreatModel.parse("Linf:8/255")
    (penalty,) = FastAt(grad_align=0.2).penalty(net, X, Y, threat, Draws(5)).values()
    penalty.backward()
    ours = gradients(net).clone()
    eta = (2 * Draws(5).uniform(X) - 1) * 8 / 255
    weights = list(net.parameters())

    def written_out() -> torch.Tensor:
        grads = []
        for at in (X, X + eta):
            leaf = at.clone().requires_grad_(True)
            grads.append(torch.autograd.grad(ce(net(leaf), Y).sum(), leaf, create_graph=True)[0].flatten(1))
        one, two = grads
        return 0.2 * (1 - (one * two).sum(1) / one.norm(dim=1) / two.norm(dim=1)).mean()

    assert float(penalty.detach()) == pytest.approx(float(written_out().detach()), rel=1e-9)
    direction = [torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1)) for w in weights]
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for w, v in zip(weights, direction, strict=True):
                w += sign * 1e-5 * v
        values.append(float(written_out().detach()))
    by_differences = (values[0] - values[1]) / 2e-5
    assert float(ours @ torch.cat([v.flatten() for v in direction])) == pytest.approx(by_differences, rel=1e-4)
    assert FastAt().penalty(net, X, Y, threat, Draws(5)) == {}


def test_attention_can_be_differentiated_twice():
    """torch's fused attention has no second derivative."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            tokens = x.float().flatten(2)
            return self.head(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1)[:, :8])

    take(Gaat(gradient="exact", order=2), Attention(), x=X.float())


def test_free_at_moves_noise_and_weights_with_one_backward_pass():
    net, threat = smooth_net(), ThreatModel.parse("Linf:8/255")
    method = FreeAt()
    noise = method.tracker(threat, 12)
    take(method, net, tracker=noise)
    leaf = X.clone().requires_grad_(True)
    first = gradients(net).clone()
    net.zero_grad()
    ce(net(leaf), Y).mean().backward()
    assert torch.equal(first, gradients(net))
    assert torch.allclose(noise.delta, 8 / 255 * leaf.grad.sign())
    before = noise.delta.clone()
    take(method, net, tracker=noise)
    leaf = (X + before).requires_grad_(True)
    ce(net(leaf), Y).mean().backward()
    assert torch.allclose(noise.delta, (before + 8 / 255 * leaf.grad.sign()).clamp(-8 / 255, 8 / 255))
    again = method.tracker(threat, 12)
    again.load_state_dict(noise.state_dict())
    assert torch.equal(again.rows(X[4:8], Draws(0, total=12, start=4)), noise.delta[4:8])


def test_mart_is_the_authors_formula():
    """Written out as in their code: probabilities with small numbers added inside the logarithms."""
    generator = torch.Generator().manual_seed(4)
    logits, logits_adv = (2 * torch.randn(40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.arange(40) % 5
    total, _ = Mart(beta=5).loss(logits, logits_adv, y)
    p, q = logits.softmax(1), logits_adv.softmax(1)
    order = q.argsort(1)[:, -2:]
    rival = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    rows = torch.arange(40)
    bce = -torch.log(q[rows, y]) - torch.log(1.0001 - q[rows, rival] + 1e-12)
    kl = (p * (torch.log(p) - torch.log(q + 1e-12))).sum(1) * (1.0000001 - p[rows, y])
    assert float(total) == pytest.approx(float(bce.mean() + 5 * kl.mean()), rel=1e-3)


def test_mart_stays_finite_where_the_rival_is_certain():
    logits = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)
    total, _ = Mart().loss(torch.zeros(1, 3), logits, torch.tensor([1]))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_two_steps_of_half_eps_are_pgd_2():
    method = PgdAt(steps=2, step_ratio=1)
    assert method.step_ratio / method.steps == 0.5
    net = tiny_net().double().eval()
    x_adv = method.perturb(Nets(net, net), X, Y, ThreatModel.parse("Linf:0.1"), Draws(0), None)
    start = (X + (2 * Draws(0).uniform(X) - 1) * 0.1).clamp(0, 1)
    for _ in range(2):
        leaf = start.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(ce(net(leaf), Y).sum(), leaf)
        start = (X + (start + 0.05 * g.sign() - X).clamp(-0.1, 0.1)).clamp(0, 1)
    assert torch.allclose(x_adv, start)
