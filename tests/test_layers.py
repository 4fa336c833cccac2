from __future__ import annotations

import pytest
import torch
from helpers import tiny_net
from torch import nn

from robustify import layers
from robustify.errors import UserError

X = torch.rand(2, 3, 8, 8)


class Scaled(nn.Module):
    """The logits are a multiple of the last layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), nn.Linear(10, 4)

    def forward(self, x):
        return 3 * self.last(self.body(x))


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dist = nn.Linear(192, 4), nn.Linear(192, 4)

    def forward(self, x):
        return (self.head(x.flatten(1)) + self.head_dist(x.flatten(1))) / 2


class Heads(nn.Module):
    """The logits are a weighted sum of several heads, each of other features, as in timm's EfficientViM."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(192, 4)
        self.heads = nn.ModuleList(nn.Linear(size, 4) for size in (192, 4, 192))

    def forward(self, x):
        x = x.flatten(1)
        outs = [head(part) for head, part in zip(self.heads, (x, self.body(x), x.square()), strict=True)]
        return 0.2 * outs[0] + 0.5 * outs[1] + 0.3 * outs[2]


class Auxiliary(nn.Module):
    """The logits are a head's and, by half, the largest of the same class over all tokens, as in timm's VOLO."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.aux = nn.Linear(192, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x.flatten(1)) + 0.5 * self.aux(x.flatten(1, 2)).max(1).values


class Cosine(nn.Module):
    """A classifier without a layer of torch's, behind an embedding that is as wide as there are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.centres = nn.Linear(192, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return nn.functional.normalize(self.embedding(x.flatten(1))) @ nn.functional.normalize(self.centres).T


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 192))

    def forward(self, x):
        return -torch.cdist(x.flatten(1), self.centres)


def shaken(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    with torch.no_grad():
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            value.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        (tiny_net(), ["6"]),
        (Scaled(), ["last"]),
        (Distilled(), ["head", "head_dist"]),
        (Heads(), ["heads.0", "heads.1", "heads.2"]),
        (Auxiliary(), ["head", "aux"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LogSoftmax(1)), ["1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1)), ["1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LayerNorm(4)), ["1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LogSoftmax(1)).bfloat16(), ["1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Hardtanh()), ["1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.ReLU(), nn.Linear(2, 2), shaken(nn.BatchNorm1d(2))), ["3"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), shaken(nn.BatchNorm1d(4))), ["1"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ["0"]),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()), ["1"]),
    ],
    ids=[
        *("linear", "scaled", "distilled", "heads", "auxiliary", "log softmax", "softmax", "layer norm", "bf16", "one", "two"),
        *("normalised", "pooled after", "convolution"),
    ],
)
def test_the_classifier_is_found_by_structure(net, wanted):
    net.train()
    x = X.to(next(net.parameters()).dtype)
    assert layers.find_classifier(net, x) == wanted
    assert net.training


def test_the_wrapped_model_too():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_net()

        def forward(self, x):
            return self.model(2 * x - 1)

    assert layers.find_classifier(Outer(), X) == ["model.6"]


@pytest.mark.parametrize(
    "net",
    [tiny_net(), Distilled(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1, bias=False), nn.Flatten())],
    ids=["linear", "distilled", "convolution"],
)
def test_a_new_classifier_by_structure(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classifier = layers.find_classifier(net, X)
    layers.replace_classifier(net.eval(), (3, 8, 8), 7)
    assert net(X).shape == (2, 7)
    assert layers.find_classifier(net, X) == classifier
    heads = tuple(f"{name}." for name in classifier)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items() if not name.startswith(heads))


def test_a_classifier_that_others_build_on_is_not_replaced():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(UserError, match="cannot be given 7 classes"):
        layers.replace_classifier(net.eval(), (3, 8, 8), 7)


@pytest.mark.parametrize("net", [NoLinear(), Cosine()], ids=["none", "an embedding only"])
def test_no_linear_layer_is_refused_with_what_to_do(net):
    with pytest.raises(UserError, match="--layers"):
        layers.find_classifier(net, X)


def test_selection():
    net = tiny_net()
    last = layers.select(net, "last", ["6"])
    assert last.names == ["6.weight", "6.bias"]
    assert last.trainable == 32 * 4 + 4
    assert [n for n, w in net.named_parameters() if w.requires_grad] == last.names
    assert layers.select(net, "full", []).trainable == last.total
    assert layers.select(net, "0.*, 6.bias", []).names == ["0.weight", "0.bias", "6.bias"]
    with pytest.raises(UserError, match="matches no parameter"):
        layers.select(net, "head*", [])


def test_initialisation_is_a_function_of_the_seed():
    a, b, c = tiny_net(), tiny_net(), tiny_net()
    for net, seed in ((a, 1), (b, 1), (c, 2)):
        layers.reinitialise(net, ["6"], seed)
    assert torch.equal(a[6].weight, b[6].weight)
    assert not torch.equal(a[6].weight, c[6].weight)
    assert torch.equal(a[0].weight, tiny_net()[0].weight)


def test_weight_noise_has_the_size_it_says():
    net, plain = nn.Linear(400, 400), None
    plain = net.weight.detach().clone()
    layers.add_weight_noise(net, 0.1, 0)
    assert float(((net.weight - plain).std() / plain.std()).detach()) == pytest.approx(0.1, rel=0.05)


def test_a_network_gone_wrong_has_its_last_layer_still():
    net = Scaled()
    nn.init.constant_(net.last.weight, float("nan"))
    assert layers.find_classifier(net, X) == ["last"]
