"""Flip distances: exact on linear models, real and repeatable on others, stronger than the other attacks on real networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Linear, tiny_net, toy_data

from robustify.attacks import w_pgd
from robustify.errors import UserError
from robustify.evaluation import counted
from robustify.flips import flip_distances, recheck
from robustify.knapsack import worst_accuracy
from robustify.threat import ThreatModel, dual_norms


def exact(model: Linear, x: torch.Tensor, y: torch.Tensor, norm) -> torch.Tensor:
    """The margin over the dual norm of the difference of weights, least over the classes; 0 where wrong already."""
    with torch.no_grad():
        logits = model(x)
        gap = logits.gather(1, y[:, None]) - logits
        slope = torch.stack([dual_norms(model.weight[y] - w, norm) for w in model.weight], 1)
        found = torch.where(slope > 0, gap / slope, torch.inf).amin(1)
    return torch.where(logits.argmax(1) != y, 0.0, found)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_on_a_linear_model_the_distance_is_the_margin_over_the_dual_norm(norm, interior):
    generator = torch.Generator().manual_seed(3)
    model = Linear(torch.randn(5, 6, generator=generator, dtype=torch.float64))
    x, y = interior[0], model(interior[0]).argmax(1).detach()
    y[:5] = (y[:5] + 1) % 5
    wanted = exact(model, x, y, norm)
    inside = wanted < 0.35  # no pixel is clamped on the way
    flips = flip_distances(model, x, y, norm=norm)
    assert inside.sum() > 10
    assert (flips.distances[inside] >= wanted[inside] * (1 - 1e-12)).all()
    assert torch.allclose(flips.distances[inside], wanted[inside], rtol=1e-3)
    assert (flips.distances[:5] == 0).all()
    assert torch.equal(flips.images[:5], x[:5])
    assert recheck(model, x, y, flips).all()


def test_a_flip_that_does_not_exist_is_not_found():
    model = Linear(torch.zeros(3, 6), torch.tensor([1.0, 0.0, 0.0]))
    flips = flip_distances(model, torch.rand(4, 1, 2, 3), torch.tensor([0, 0, 0, 1]), norm="Linf", steps=5)
    assert flips.distances.tolist() == [np.inf] * 3 + [0]


def test_the_search_ends_at_the_largest_radius(interior):
    model = Linear(torch.tensor([[0.0] * 6, [1.0, -2.0, 0.5, 3.0, -0.1, 0.7]], dtype=torch.float64))
    x, y = interior[0], model(interior[0]).argmax(1).detach()
    wanted = exact(model, x, y, "L2")
    largest = float(wanted.median())
    found = flip_distances(model, x, y, norm="L2", largest=largest).distances
    clear = (wanted / largest - 1).abs() > 2e-3
    assert torch.equal(torch.isfinite(found)[clear], (wanted < largest)[clear])
    assert torch.isinf(found).any()
    assert torch.isfinite(found).any()


def test_flips_are_real_repeatable_and_the_model_comes_back():
    net = tiny_net()
    net[1].train()
    x, y = toy_data(32)
    a = flip_distances(net, x, y, norm="Linf", steps=10, targets=2, restarts=2, batch_size=8)
    b = flip_distances(net, x, y, norm="Linf", steps=10, targets=2, restarts=2, batch_size=8)
    assert torch.equal(a.distances, b.distances)
    assert torch.equal(a.images, b.images)
    assert net[1].training
    assert all(w.requires_grad for w in net.parameters())
    assert recheck(net, x, y, a, batch_size=5).all()
    broken = a.images.clone()
    broken[a.distances > 0] = x[a.distances > 0]
    assert not recheck(net, x, y, type(a)(a.distances, broken, "Linf")).all()


def test_a_nearer_image_of_another_attack_wins_and_passes_are_as_announced():
    net, (x, y) = tiny_net().eval(), toy_data(24)
    y = net(x).argmax(1).detach()
    good = flip_distances(net, x, y, norm="L2", steps=40)
    with counted(net) as passes:
        poor = flip_distances(net, x, y, norm="L2", steps=4, targets=1, restarts=0)
    assert passes.backward == 5 * len(x)  # the clean images, and 4 steps
    both = flip_distances(net, x, y, norm="L2", steps=4, targets=1, restarts=0, candidates=[good.images])
    assert (both.distances <= torch.minimum(good.distances, poor.distances)).all()
    assert recheck(net, x, y, both).all()


def test_no_images_and_the_wrong_norm():
    net = tiny_net()
    none = flip_distances(net, torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), norm="L2")
    assert none.distances.shape == (0,)
    with pytest.raises(UserError, match="L1"):
        flip_distances(net, *toy_data(4), norm="L1")


@pytest.mark.assets
@pytest.mark.parametrize("name", ["resnet2b2_adv8", "cnn_a_adv2"])
@pytest.mark.parametrize(("norm", "deltas"), [("Linf", [2 / 255, 4 / 255, 8 / 255]), ("L2", [0.1, 0.25, 0.5])])
def test_the_knapsack_is_stronger_than_w_pgd_on_real_networks(assets, name, norm, deltas):
    model = assets.model(name)
    x, y = (part[:64] for part in assets.images("cifar10"))
    flips = flip_distances(model, x, y, norm=norm, steps=20, targets=3, restarts=1)
    assert recheck(model, x, y, flips).all()
    for delta in deltas:
        x_adv = w_pgd(model, x, y, threat=ThreatModel(norm, delta, 2.0))
        left = float((model(x_adv).argmax(1) == y).double().mean())
        assert worst_accuracy(flips.distances.numpy(), delta, 2) <= max(0.0, left - 0.01)
