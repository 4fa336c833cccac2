"""Adversarial weight perturbation: its size, its direction, and the model it leaves behind."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_net, toy_data
from test_train import setup_for

from robustify.awp import same_statistics, uphill
from robustify.evaluation import counted
from robustify.methods import FastAt, Gaat, PgdAt, Trades
from robustify.step import set_train_mode, take_step


def test_every_matrix_moves_by_gamma_of_its_norm_along_its_gradient_and_comes_back_bit_for_bit():
    net = tiny_net()
    x, y = toy_data(32)
    torch.nn.functional.cross_entropy(net(x), y).backward()
    before = {name: w.detach().clone() for name, w in net.named_parameters()}
    slopes = {name: w.grad.clone() for name, w in net.named_parameters()}
    with uphill(net, 0.01):
        for name, w in net.named_parameters():
            moved = w.detach() - before[name]
            assert w.grad is None
            if w.ndim > 1:
                assert float(moved.norm() / before[name].norm()) == pytest.approx(0.01, rel=1e-3)
                assert torch.nn.functional.cosine_similarity(moved.flatten(), slopes[name].flatten(), dim=0) > 0.9999
            else:
                assert not moved.any()
    for name, w in net.named_parameters():
        assert torch.equal(w, before[name])


def test_the_weights_come_back_when_the_pass_fails_and_a_zero_gradient_moves_nothing():
    net = torch.nn.Linear(3, 2)
    net.weight.grad = torch.zeros_like(net.weight)
    before = net.weight.detach().clone()
    with uphill(net, 0.01):
        assert torch.equal(net.weight, before)
    with pytest.raises(ZeroDivisionError), uphill(net, 0.01):
        1 / 0  # noqa: B018
    assert torch.equal(net.weight, before)


def test_statistics_come_back():
    net = tiny_net()
    with same_statistics(net):
        net(toy_data(32)[0])
        assert int(net[1].num_batches_tracked) == 1
    assert int(net[1].num_batches_tracked) == 0
    assert not net[1].running_mean.any()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_descends_by_the_gradient_at_the_worst_weights(parts):
    """Plain SGD: w <- w - lr * grad J(w + v), v from grad J(w), on the same perturbed images; also split into passes."""
    net = tiny_net().double()
    net[3].p = 0.0
    plain_sgd = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    setup = setup_for(PgdAt(steps=1), net=net, awp=0.01, batchnorm="frozen", accumulate=parts, **plain_sgd)
    set_train_mode(setup)
    x, y = toy_data(32)
    x, seen = x.double(), {}
    plain = PgdAt.perturb

    class Recorder(PgdAt):
        def perturb(self, *arguments):
            x_adv = plain(self, *arguments)
            seen.setdefault("x", []).append(x_adv)
            return x_adv

    setup.method = Recorder(steps=1)
    start = [w.detach().clone() for w in net.parameters()]
    take_step(setup, iter(zip(x.split(32 // parts), y.split(32 // parts), strict=True)), 0)
    after = [w.detach().clone() for w in net.parameters()]
    x_adv = torch.cat(seen["x"])

    def slopes(at):
        with torch.no_grad():
            for w, value in zip(net.parameters(), at, strict=True):
                w.copy_(value)
        return torch.autograd.grad(torch.nn.functional.cross_entropy(setup.model(x_adv), y), list(net.parameters()))

    worst = [w + (0.01 * w.norm() * g / g.norm() if w.ndim > 1 else 0) for w, g in zip(start, slopes(start), strict=True)]
    for w, g, found in zip(start, slopes(worst), after, strict=True):
        assert torch.allclose(found, w - 0.1 * g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [FastAt(), FastAt(grad_align=0.2), Trades(steps=2), Gaat()], ids=repr)
def test_awp_doubles_the_passes_that_train_and_no_others(method):
    setup = setup_for(method, awp=0.005)
    set_train_mode(setup)
    with counted(setup.model) as passes:
        take_step(setup, iter([toy_data(32)]), 0)
    training = method.passes(0, 1) - method.passes(0, 0)
    assert passes.forward / 32 == pytest.approx(method.passes(0, 0) + training)
    assert int(setup.model.net[1].num_batches_tracked) == training
