"""Images without labels: which are taken, what they are labelled, what the loss asks of them."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_net, toy_data

from robustify import data as datasets
from robustify import layers
from robustify.distributed import World, make_accelerator
from robustify.errors import UserError
from robustify.losses import ce, kl
from robustify.methods import Trades, Wasserstein
from robustify.methods.consistency import trades_loss
from robustify.order import Pool, check_batch, interleaved, pool_lists
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.resolve import resolve
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import follow, train
from robustify.unlabelled import NONE, pseudo_labelled, read_pool, with_predictions


def recipe(*settings):
    return resolve("quickstart", {}, ["data.limit=300", "data.unlabelled=rest", *settings]).recipe


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", limit=300)


def test_the_rest_is_disjoint_from_what_is_used_and_has_no_labels(digits):
    pool = read_pool(recipe(), digits)
    images = lambda split: {x.numpy().tobytes() for x in split.raw(range(len(split)))}  # noqa: E731
    used = images(digits.train) | images(digits.val) | images(digits.test)
    assert len(pool) == len(digits.rest) > 700
    assert not images(pool) & used
    assert (pool.labels == NONE).all()
    assert (digits.rest.labels >= 0).all()
    with pytest.raises(UserError, match="leaves none"):
        read_pool(recipe(), datasets.load("digits"))
    with pytest.raises(UserError, match="again"):
        read_pool(recipe("data.unlabelled=digits"), digits)


def test_pseudo_labels_are_the_networks_and_the_unsure_are_left_out(digits):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    with torch.no_grad():
        net[1].weight.normal_(generator=torch.Generator().manual_seed(0))
    pool, said = read_pool(recipe(), digits), []
    x, _ = pool.batch(range(len(pool)))
    confidence, label = net(x).softmax(1).max(1)
    found = pseudo_labelled(recipe(), net, pool, 10, World(), torch.device("cpu"), said.append)
    assert torch.equal(found.labels, label[confidence >= 0.9])
    assert f"{len(found)} of {len(pool)}" in said[-1].text
    few = datasets.subset(pool, (label == int(label[confidence >= 0.9][0])).nonzero()[:, 0])
    pseudo_labelled(recipe(), net, few, 10, World(), torch.device("cpu"), said.append)
    assert "0 to" in said[-1].text  # the classes without any count
    with pytest.raises(UserError, match="not 1 sure"):
        pseudo_labelled(recipe("data.unlabelled_confidence=1"), net, pool, 10, World(), torch.device("cpu"), said.append)


def test_only_the_consistency_term_sees_them():
    logits, logits_adv = torch.randn(6, 4), torch.randn(6, 4)
    y = torch.tensor([0, NONE, 2, NONE, 1, NONE])
    total, parts = trades_loss(logits, logits_adv, y, 3.0)
    assert parts["ce"] == ce(logits[::2], y[::2]).mean()
    assert parts["kl"] == kl(logits, logits_adv).mean()
    assert total == parts["ce"] + 3 * parts["kl"]
    with pytest.raises(UserError, match="no term without labels"):
        recipe("data.unlabelled_as=consistency", "method={name: pgd-at}", "threat=Linf:0.1")


def test_an_attack_on_them_starts_from_the_networks_answer():
    net = tiny_net().eval()
    x, y = toy_data(8)
    blank = torch.where(torch.arange(8) % 2 == 0, y, NONE)
    filled = with_predictions(net, x, blank)
    assert torch.equal(filled[::2], y[::2])
    assert torch.equal(filled[1::2], net(x[1::2]).argmax(1))
    assert with_predictions(net, x, y) is y


def test_the_pool_goes_round_and_processes_share_its_rows():
    s = TrainSettings(batch_size=16, accumulate=2)
    whole = pool_lists(20, 0, 5, s, World(), 8, 1)
    seen = [i for rows in whole for i in rows]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20))
    assert pool_lists(20, 3, 2, s, World(), 8, 1) == whole[6:]
    parts = []
    for rank in range(2):
        world = World()
        world.size, world.rank = 2, rank
        parts.append(pool_lists(20, 0, 5, s, world, 8, 1))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_every_process_has_whole_blocks():
    x, more = torch.arange(8.0)[:, None], -torch.arange(1.0, 5.0)[:, None]
    ((joined, _),) = interleaved(iter([(x, torch.zeros(8))]), iter([(more, torch.ones(4))]))
    assert joined[:, 0].tolist() == [0, 1, -1, 2, 3, -2, 4, 5, -3, 6, 7, -4]
    with pytest.raises(UserError, match="3 passes"):
        check_batch(recipe("train.batch_size=64"), 1000, 3)
    with pytest.raises(UserError, match="larger than the 20 training images"):
        check_batch(recipe("train.batch_size=64"), 20, 1)
    check_batch(recipe("train.batch_size=64", "data.unlabelled_share=0.75"), 1000, 4)


@pytest.mark.parametrize(
    ("size", "share", "images", "processes", "said"),
    [
        (32, 0.01, 1000, 1, "none of them"),
        (32, 0.99, 1000, 1, "all of them"),
        (1, 0.5, 1000, 1, "none of them"),
        (64, 0.7, 1000, 2, "does not divide"),
        (24, 0.75, 1000, 4, "does not divide"),  # 24 = 6 + 18 is itself a multiple of 2 x 4
        (64, 0.5, 20, 3, "larger than"),
    ],
)
def test_the_batch_size_that_is_advised_is_taken(size, share, images, processes, said):
    asked = ["train.batch_size={}", f"data.unlabelled_share={share}"]
    with pytest.raises(UserError, match=said) as error:
        check_batch(recipe(asked[0].format(size), asked[1]), images, processes)
    advised = int(error.value.hint.partition("train.batch_size=")[2].split()[0])
    check_batch(recipe(asked[0].format(advised), asked[1]), images, processes)


def test_where_no_batch_fits_it_is_said():
    with pytest.raises(UserError, match="no batch of these 3 images"):
        check_batch(recipe("train.batch_size=4"), 3, 4)


@pytest.mark.parametrize(("method", "threat"), [(Trades(steps=1), "Linf:8/255"), (Wasserstein(steps=1), "W2-Linf:8/255")])
def test_methods_with_the_term_train_on_them(method, threat, tmp_path):
    model = PixelModel(tiny_net())
    layers.select(model.net, "full", [])
    data = datasets.from_tensors(toy_data(48), toy_data(32, seed=1), toy_data(32, seed=2))
    x, _ = toy_data(64, seed=3)
    pool = datasets.from_tensors((x, torch.arange(64) % 4)).train
    pool = type(pool)(pool.images, torch.full_like(pool.labels, NONE), pool.size)
    s = TrainSettings(epochs=2, batch_size=32, probe_images=16, init="reinit")
    setup = prepare(model, method, ThreatModel.parse(threat), s, make_accelerator(), "none", 48)
    outcome = follow(train(setup, data, tmp_path, pool=Pool(pool, 0.5)), lambda event: None)
    assert outcome.steps == 2 * (48 // 16)
