"""The knapsack attack spends no more than its budget, on the cheapest flips."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_net, toy_data

from robustify.attacks import w_pgd
from robustify.attacks.knapsack import knapsack
from robustify.flips import flip_distances
from robustify.knapsack import shares, worst_accuracy
from robustify.threat import ThreatModel, norms


@pytest.mark.parametrize("threat", ["W2-Linf:2/255", "W1.5-L2:0.1", "W8-L2:0.2", "Winf-L2:0.1"])
def test_whole_flips_are_bought_cheapest_first(threat):
    net, (x, y) = tiny_net().eval(), toy_data(48)
    y = net(x).argmax(1).detach()
    y[:4] = (y[:4] + 1) % 4
    t = ThreatModel.parse(threat)
    settings = {"steps": 10, "targets": 2, "restarts": 1, "batch_size": 16}
    x_adv = knapsack(net, x, y, threat=t, **settings)
    d = flip_distances(net, x, y, norm=t.norm, **settings).distances
    bought = torch.tensor(shares(d.numpy(), t.eps, t.p)) == 1
    assert 0 < bought.sum() < len(x)
    assert torch.equal(net(x_adv).argmax(1) != y, bought)
    assert torch.equal(x_adv[~bought], x[~bought])
    size = norms(x_adv.double() - x.double(), t.norm)
    spent = size.max() if t.p == math.inf else (size**t.p).mean() ** (1 / t.p)
    assert spent <= t.eps * (1 + 1e-9)
    left = 1 - bought.double().mean()
    assert 0 <= left - worst_accuracy(d.numpy(), t.eps, t.p) < 1 / len(x)
    assert left <= (net(w_pgd(net, x, y, threat=t, steps=20)).argmax(1) == y).double().mean()
