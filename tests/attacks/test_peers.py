"""The same PGD as other libraries', where they are installed: pip install 'robustify[peers]' and --no-deps adv-lib."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_net, toy_data

from robustify.attacks import pgd
from robustify.threat import ThreatModel

THREAT = ThreatModel.parse("Linf:2/255")
PEERS = "needs another library: pip install 'robustify[peers]'"


@pytest.fixture(autouse=True)
def _from_the_centre(monkeypatch):
    """PGD without its random start, so that others climb the same path."""
    monkeypatch.setattr(sys.modules["robustify.attacks.pgd"], "uniform_in_ball", lambda x, *_: torch.zeros_like(x))


@pytest.fixture
def attacked():
    """(network, images, labels, our PGD-10's images): some images fall, some withstand."""
    net, (x, _) = tiny_net().eval().requires_grad_(False), toy_data(60)
    net[6].bias.sub_(net(x).mean(0))
    net[6].weight.mul_(8)
    y = net(x).argmax(1)
    ours = pgd(net, x, y, threat=THREAT, steps=10)
    assert 10 < (net(ours).argmax(1) == y).sum() < 50
    return net, x, y, ours


def test_torchattacks_has_the_same_images(attacked):
    torchattacks = pytest.importorskip("torchattacks", reason=PEERS)
    net, x, y, ours = attacked
    theirs = torchattacks.PGD(net, eps=THREAT.eps, alpha=THREAT.eps / 4, steps=10, random_start=False)(x, y)
    held = net(ours).argmax(1) == y
    assert torch.allclose(ours[held], theirs[held], atol=1e-6)  # an image once fooled stays as it was then
    assert not (held & (net(theirs).argmax(1) != y)).any()


def test_foolbox_has_the_same_images(attacked):
    foolbox = pytest.importorskip("foolbox", reason=PEERS)
    net, x, y, ours = attacked
    attack = foolbox.attacks.LinfPGD(steps=10, abs_stepsize=THREAT.eps / 4, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=THREAT.eps)
    held = net(ours).argmax(1) == y
    assert torch.allclose(ours[held], theirs[held], atol=1e-6)
    assert not (held & (net(theirs).argmax(1) != y)).any()


def test_adv_lib_has_the_same_verdicts(attacked, monkeypatch):
    # its plots' library, which it imports first of all, does not build everywhere; no attack needs it
    monkeypatch.setitem(sys.modules, "visdom", SimpleNamespace(Visdom=None))
    adv_lib = pytest.importorskip("adv_lib.attacks", reason="needs adv-lib: pip install --no-deps adv-lib")
    net, x, y, ours = attacked
    # it does not look at the image after its last step
    theirs = adv_lib.pgd_linf(net, x, y, THREAT.eps, steps=11, random_init=False, relative_step_size=0.25)
    assert torch.equal(net(ours).argmax(1) == y, net(theirs).argmax(1) == y)
