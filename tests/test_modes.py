from __future__ import annotations

import pytest
import torch
from helpers import tiny_net
from torch import nn

import robustify
from robustify.attacks import ATTACKS, fgsm
from robustify.bounds import accuracy_estimates
from robustify.flips import flip_distances
from robustify.gradients import gradient_alignment, gradient_norms, input_gradient
from robustify.importance import logit_slopes
from robustify.losses import ce
from robustify.modes import Shadow, borrowed
from robustify.pixels import PixelModel
from robustify.rng import Draws
from robustify.threat import ThreatModel

X, Y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


def fingerprint(net: nn.Module):
    return (
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [p.grad is None for p in net.parameters()],
        [t.clone() for t in net.state_dict().values()],
    )


def same(a, b) -> bool:
    return a[:3] == b[:3] and all(torch.equal(x, y) for x, y in zip(a[3], b[3], strict=True))


def mixed_net() -> nn.Sequential:
    net = tiny_net().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    return net


class Remembers(nn.Linear):
    """Keeps in eval mode what it computed from its weights, as LeViT's attention does."""

    kept: torch.Tensor | None = None

    def train(self, mode: bool = True):
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return super().forward(x)
        self.kept = self.weight.detach().clone() if self.kept is None else self.kept
        return x @ self.kept.T + self.bias


def test_nothing_computed_from_older_weights_is_used():
    net = nn.Sequential(nn.Flatten(), Remembers(192, 4)).train()
    with borrowed(net):
        net(X)
    with torch.no_grad():
        net[1].weight.mul_(2)
    for lent in (net, net.eval()):
        with borrowed(lent):
            assert torch.allclose(lent(X), X.flatten(1) @ net[1].weight.T + net[1].bias)
        with torch.no_grad():
            net[1].weight.mul_(2)
    net = nn.Sequential(nn.Flatten(), Remembers(192, 4)).train()
    with borrowed(net):
        net(X)
    with torch.no_grad():
        net[1].weight.mul_(2)
    assert torch.allclose(net.eval()(X), X.flatten(1) @ net[1].weight.T + net[1].bias)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_gives_the_model_back_as_it_was(name):
    net = mixed_net()
    before = fingerprint(net)
    threat = ThreatModel("Linf", 0.05, 2.0 if ATTACKS[name].distributional else None)
    ATTACKS[name].run(net, X, Y, threat=threat)
    assert same(before, fingerprint(net))


def test_given_back_after_an_error_too():
    net = mixed_net()
    before = fingerprint(net)
    with pytest.raises(IndexError), borrowed(net):
        fgsm(net, X, Y + 100, threat=ThreatModel("Linf", 0.05))
    assert same(before, fingerprint(net))


def test_the_gradient_is_each_images_own_and_no_weight_gets_one():
    net = tiny_net()
    with borrowed(net):
        g, logits, losses = input_gradient(net, X, lambda z: ce(z, Y))
        alone, _, _ = input_gradient(net, X[2:3], lambda z: ce(z, Y[2:3]))
    assert torch.allclose(g[2], alone[0], atol=1e-7)
    assert logits.shape == (6, 4)
    assert losses.shape == (6,)
    assert all(p.grad is None for p in net.parameters())


def test_gradient_norms_of_batches_are_those_of_the_whole():
    net = tiny_net()
    whole = gradient_norms(net, [(X, Y)], "ce", "Linf")
    parts = gradient_norms(net, [(X[:4], Y[:4]), (X[4:], Y[4:])], "ce", "Linf")
    assert torch.allclose(whole, parts, rtol=1e-5)


def test_pixel_model_is_the_only_normalisation():
    net = tiny_net().eval()
    model = PixelModel(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    by_hand = net((X - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))
    assert torch.equal(model(X), by_hand)
    assert torch.equal(PixelModel(net)(X), net(X))
    assert set(PixelModel(net).state_dict()) == {f"net.{key}" for key in net.state_dict()}


def test_the_shadow_follows_its_source_and_keeps_the_normalisation_exact():
    model = PixelModel(tiny_net(), (0.4914,) * 3, (0.2471,) * 3).eval()
    shadow = Shadow(model)
    assert shadow.model.mean.dtype == torch.float32
    assert next(shadow.model.net.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
        model.net[1].running_mean.add_(1.0)
    stale = shadow.model(X)
    shadow.refresh()
    fresh = shadow.model(X)
    exact = model(X)
    assert torch.allclose(fresh, exact, rtol=0.02)
    assert not torch.allclose(stale, exact, rtol=0.02)
    assert fresh.dtype == torch.float32
    assert not any(t.requires_grad for t in (*shadow.model.parameters(), *shadow.model.buffers()))


MEASUREMENTS = {
    "evaluate": lambda net, x, y: robustify.evaluate(net, (x, y), attacks=["clean", "fgsm"], check=False),
    "accuracy_estimates": lambda net, x, y: accuracy_estimates(net, x, y, [0.1], norm="Linf"),
    "logit_slopes": lambda net, x, y: logit_slopes(net, [(x, y)], "ce"),
    "gradient_norms": lambda net, x, y: gradient_norms(net, [(x, y)], "ce", "Linf"),
    "gradient_alignment": lambda net, x, y: gradient_alignment(
        net, [(x, y, Draws(0, x.device))], ThreatModel.parse("Linf:0.1")
    ),
    "flip_distances": lambda net, x, y: flip_distances(net, x, y, norm="Linf", steps=1),
}


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_what_is_measured_is_in_full_precision_and_gives_the_callers_back(measurement):
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, input):
            out = super().forward(input.flatten(1))
            seen.append((out.dtype, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return out

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            MEASUREMENTS[measurement](Net(4, 3), torch.rand(8, 1, 2, 2), torch.arange(8) % 3)
            assert torch.is_autocast_enabled("cpu")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    first = 1 if measurement == "evaluate" else 0  # its first call only asks for the shape
    assert set(seen[first:]) == {(torch.float32, False, False)}
