"""What stands behind a model's name."""

from __future__ import annotations

import pytest
import torch

from robustify import sources
from robustify.errors import UserError
from robustify.sources.options import split


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("resnet18", "resnet18", {}),
        (" timm:resnet18 ", "timm:resnet18", {}),
        ("resnet18:size=64", "resnet18", {"size": 64}),
        ("a/b.pt:arch=my.nets:make", "a/b.pt", {"arch": "my.nets:make"}),
        ("a.pt:size=[1,28,28], mean=[0.1, 0.2]", "a.pt", {"size": (1, 28, 28), "mean": (0.1, 0.2)}),
        ("x:y:std=0.5,depth=20,act_layer=silu", "x:y", {"std": (0.5,), "args": {"depth": 20, "act_layer": "silu"}}),
    ],
)  # fmt: skip
def test_words_behind_a_name(text, name, told):
    assert split(text) == (name, told)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resnet18:size=big", "no size of images"),
        ("resnet18:size=[3,0,3]", "no size of images"),
        ("resnet18:mean=grey", "mean='grey' cannot be read"),
        ("resnet18:std=[0.2,0,0.2]", "must be above 0"),
        ("resnet18:mean=[0.1,", "cannot be read as options"),
        ("resnet18:mean=[0.1,0.2]", "the images have 3 channels, mean 2 numbers"),
        ("resnet18:mean=[124,116,104]", r"is not in pixel units .*\n  did you mean mean=.0.486,0.455,0.408."),
        ("resnet10t:num_classes=3", "num_classes cannot stand behind the name"),
        ("resnet10t:in_chans=1", r"say size=.1,28,28."),
        ("test_vit:img_size=64", "say size=64"),
        ("resnet10t:depth=7", "resnet10t cannot be built with {'depth': 7}"),
        ("Sehwag2021Proxy_R18:depth=7", "takes no arguments, such as depth"),
    ],
)
def test_mistakes(text, said):
    with pytest.raises(UserError, match=said):
        sources.load(text, threat="Linf", pretrained=False)


def test_size_normalisation_and_arguments_reach_the_network():
    checkpoint = sources.load("test_vit:size=64,mean=0.4,std=[0.1,0.2,0.3],drop_rate=0.25", pretrained=False)
    model = checkpoint.model
    assert (checkpoint.input_size, checkpoint.arch_args) == ((3, 64, 64), {"drop_rate": 0.25})
    assert model.net.patch_embed.img_size == (64, 64)
    assert model.net.head_drop.p == 0.25
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(x), model.net((x - 0.4) / torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)))
    grey = sources.load("resnet10t:size=[1,32,32]", pretrained=False, num_classes=5)
    assert grey.model.net.conv1[0].in_channels == 1
