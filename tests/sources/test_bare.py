"""Weight files whose network the user names, and networks that a function of the user's own returns."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from source_folders import shake
from torch import nn

from robustify import api, sources
from robustify.errors import UserError

MODULE = """
import torch
from torch import nn

def make(width=4, num_classes=3, eps=0.1, born=None):
    assert not isinstance(eps, str)
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, num_classes))

def plain():
    return make()

def pair():
    class Two(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x
    return Two()

def features():
    return nn.Conv2d(3, 4, 3)

def number():
    return 7

def fails():
    raise RuntimeError("no such depth")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    (tmp_path / "mynets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mynets", raising=False)
    return tmp_path


def resnet(classes=6):
    net = timm.create_model("resnet10t", num_classes=classes).eval()
    shake(net)
    return net


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_with_its_architecture(tmp_path, suffix):
    net, path = resnet(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    checkpoint = sources.load(f"{path}:arch=resnet10t,size=32,mean=0.5,std=0.25")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(checkpoint.model(x), net((x - 0.5) / 0.25))
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.input_size) == ("resnet10t", 6, (3, 32, 32))
    assert (checkpoint.base_id, checkpoint.license, checkpoint.pretrained) == (path.name, None, True)
    other = sources.load(f"{path}:arch=resnet10t", num_classes=4)
    assert (other.num_classes, other.replaced, other.pretrained) == (4, 6, False)
    usual = timm.create_model("resnet10t").default_cfg  # without a word the architecture's own normalisation
    assert other.model.mean.flatten().tolist() == pytest.approx(usual["mean"])


def test_what_stands_before_all_names_and_a_missing_classifier(tmp_path):
    net, path = resnet(), tmp_path / "weights.pt"
    state = net.state_dict()
    torch.save({"weights": {f"backbone.{name}": value for name, value in state.items()}}, path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(sources.load(f"{path}:arch=resnet10t,size=32,mean=0,std=1").model(x), net(x))
    del state["fc.weight"]
    torch.save(state, path)
    with pytest.raises(UserError) as error:
        sources.load(f"{path}:arch=resnet10t")
    assert error.value.message == f"{path} does not fit resnet10t: 1 tensor is missing (fc.weight)"
    assert "tensors fit: it was saved from a changed resnet10t" in error.value.hint


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:torchvision_resnet18"])
def test_the_architecture_by_the_names_of_models(tmp_path, arch):
    net = timm.create_model("torchvision_resnet18", num_classes=10)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert sources.load(f"{tmp_path / 'a.pt'}:arch={arch},size=32").arch == "torchvision_resnet18"


def test_the_architecture_of_a_robustbench_model(tmp_path):
    net = sources.load("Sehwag2021Proxy_R18", threat="Linf", pretrained=False).model.net
    torch.save(net.state_dict(), tmp_path / "a.pt")
    for arch in ("robustbench:cifar10/Linf/Sehwag2021Proxy_R18", "cifar10/Linf/Sehwag2021Proxy_R18"):
        checkpoint = sources.load(f"{tmp_path / 'a.pt'}:arch={arch}")
        assert checkpoint.arch == "robustbench_cifar10_linf_sehwag2021proxy_r18"


def test_what_training_scripts_wrap_around_it(tmp_path):
    net = resnet()
    wrapped = {"model": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "a.pth.tar")
    checkpoint = sources.load(f"{tmp_path / 'a.pth.tar'}:arch=resnet10t,size=32")
    assert torch.equal(checkpoint.model.net(torch.ones(1, 3, 32, 32)), net(torch.ones(1, 3, 32, 32)))


def test_what_is_missing_is_asked_for(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(resnet().state_dict(), path)
    with pytest.raises(UserError, match="not the network that they belong to") as error:
        sources.load(str(path))
    assert f"{path}:arch=resnet18" in error.value.hint
    with pytest.raises(UserError, match="there is no file"):
        sources.load(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"no architecture 'resnet10x'\. Did you mean resnet10t"):
        sources.load(f"{path}:arch=resnet10x")
    with pytest.raises(UserError, match="does not fit resnet18"):
        sources.load(f"{path}:arch=resnet18")
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="is a web page"):
        sources.load(f"{path}:arch=resnet10t")


def test_compiled_networks_are_recognised(tmp_path):
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.rand(1, 3, 2, 2)
    torch.jit.trace(net, x).save(str(tmp_path / "a.pt"))
    torch.export.save(torch.export.export(net, (x,)), str(tmp_path / "a.pt2"))
    (tmp_path / "a.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    for name, said in (("a.pt", "TorchScript"), ("a.pt2", "torch.export"), ("a.onnx", "ONNX")):
        with pytest.raises(UserError, match=f"{name} is .*{said}, a compiled network"):
            sources.load(str(tmp_path / name))


def test_a_function_of_ones_own(mine):
    checkpoint = sources.load("mynets:make:size=8,width=5")
    assert checkpoint.model.net[0].out_channels == 5
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.input_size) == ("custom", 3, (3, 8, 8))
    assert checkpoint.base_id == "mynets:make"
    assert not checkpoint.model.normalises
    assert sources.load("mynets:make:size=8", num_classes=7).num_classes == 7


def test_a_function_that_knows_no_classes_gets_a_new_classifier(mine):
    checkpoint = sources.load("mynets:plain:size=8", num_classes=7)
    assert (checkpoint.num_classes, checkpoint.replaced, checkpoint.pretrained) == (7, 3, False)
    x = torch.rand(2, 3, 8, 8)
    assert checkpoint.model(x).shape == (2, 7)
    api.export(checkpoint, "out")
    again = sources.load(sources.weights_in("out", "mynets:plain:size=8", 7))
    assert (again.num_classes, again.replaced, again.pretrained) == (7, None, True)
    assert torch.equal(again.model(x), checkpoint.model(x))
    other = sources.load("out:arch=mynets:plain,num_classes=7", num_classes=2)
    assert (other.num_classes, other.replaced, other.pretrained) == (2, 7, False)


def test_the_run_of_a_function_says_how_its_folder_loads(mine):
    api.export(sources.load("mynets:make:size=8,width=5", num_classes=7), "run/model")
    (mine / "run" / "recipe.yaml").write_text("model: {source: 'mynets:make:size=8,width=5', num_classes: 7}")
    with pytest.raises(UserError, match="class of your own") as error:
        sources.load("run")
    assert "run/model:arch=mynets:make,width=5,num_classes=7" in error.value.hint
    assert sources.load("run/model:arch=mynets:make,width=5,num_classes=7").num_classes == 7


@pytest.mark.parametrize("source", ["run", "run:arch=mynets:make"])
def test_a_run_that_has_not_finished_is_called_so(mine, source):
    (mine / "run").mkdir()
    (mine / "run" / "recipe.yaml").write_text("model: {source: 'mynets:make:size=8'}")
    with pytest.raises(UserError, match="has not finished") as error:
        sources.load(source)
    assert "robustify finetune run/recipe.yaml -o run" in error.value.hint


def test_what_is_exported_of_it_loads_again(mine):
    checkpoint = sources.load("mynets:make:size=8,mean=0.5,std=0.25")
    api.export(checkpoint, "out")
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="class of your own") as error:
        sources.load("out")
    assert "out:arch=module:function" in error.value.hint
    again = sources.load("out:arch=mynets:make")
    assert (again.input_size, again.base_id) == ((3, 8, 8), "out")
    assert torch.equal(again.model(x), checkpoint.model(x))


@pytest.mark.parametrize(
    ("source", "classes", "said"),
    [
        ("mynets:make:size=8", None, "out:arch=mynets:make"),
        ("mynets:make:size=8,width=5,mean=0.5", None, "out:arch=mynets:make,width=5"),
        ("mynets:make:size=8,eps=1.0e-5,born=2020-01-01", None, "out:arch=mynets:make,eps=1.0e-05,born=2020-01-01"),
        ("mynets:make:size=8,eps=[1, x],born=null", None, "out:arch=mynets:make,eps=[1, x],born=null"),
        ("mynets:make:size=8", 7, "out:arch=mynets:make,num_classes=7"),
        ("resnet10t:size=32", 4, "out"),
    ],
)
def test_what_came_of_a_network_is_named_so_that_it_loads(mine, source, classes, said):
    checkpoint = sources.load(source, num_classes=classes, pretrained=False)
    api.export(checkpoint, "out")
    assert sources.weights_in("out", source, classes) == said
    again = sources.load(said)
    assert sources.weights_in("newer", said) == said.replace("out", "newer")
    x = torch.rand(2, *checkpoint.input_size)
    assert torch.equal(again.model(x), checkpoint.model(x))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("mynetz:make:size=8", "mynetz cannot be imported"),
        ("mynets:mak:size=8", "has no 'mak'. Did you mean make"),
        ("mynets:number:size=8", "returned a int"),
        ("mynets:fails:size=8", "raised RuntimeError: no such depth"),
        ("mynets:make:size=8,depth=3", "raised TypeError"),
        ("mynets:make", "does not say the size of its images"),
        ("mynets:make:size=2", "does not take images of .3, 2, 2."),
        ("mynets:pair:size=8", "Two returns a tuple, not logits"),
        ("mynets:features:size=8", "returns a tensor of shape .1, 4, 6, 6."),
    ],
)
def test_mistakes_of_functions(mine, source, said):
    with pytest.raises(UserError, match=said):
        sources.load(source)


def test_a_folder_never_names_code(mine):
    """config.json comes from other people: a function in it is not called."""
    (mine / "evil").mkdir()
    (mine / "evil" / "config.json").write_text(json.dumps({"architecture": "mynets:make", "num_classes": 3}))
    with pytest.raises(UserError, match="no architecture 'mynets:make'"):
        sources.load("evil")
