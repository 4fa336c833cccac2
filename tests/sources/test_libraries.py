"""torchvision's networks and those of transformers, their files in caches that the test fills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from source_folders import Runs, shake

from robustify import api, sources
from robustify.errors import UserError
from robustify.sources import torchvision


@pytest.fixture
def torch_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def published(folder: Path, name: str, **args) -> torch.nn.Module:
    from torchvision import models

    net = models.get_model(name, weights=None, **args).eval()
    shake(net)
    torch.save(net.state_dict(), folder / models.get_model_weights(name)["DEFAULT"].url.rsplit("/", 1)[-1])
    return net


def test_torchvision(torch_cache):
    net = published(torch_cache, "mobilenet_v3_small")
    checkpoint = sources.load("torchvision:mobilenet_v3_small:size=64")
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (torchvision.MEAN, torchvision.STD))
    assert torch.equal(checkpoint.model(x), net((x - mean) / std))
    assert checkpoint.base_id == "torchvision:mobilenet_v3_small.IMAGENET1K_V1"
    assert checkpoint.published == {"clean_acc": "67.668"}
    assert (checkpoint.arch, checkpoint.dataset, checkpoint.license) == ("torchvision_mobilenet_v3_small", "imagenet", None)
    other = sources.load("torchvision:mobilenet_v3_small:size=64", num_classes=5)
    assert (other.num_classes, other.replaced, other.published) == (5, 1000, None)
    again = timm.create_model(other.arch, num_classes=5).eval()
    again.load_state_dict(other.model.net.state_dict())
    assert torch.equal(again((x - mean) / std), other.model(x))


def test_extra_heads_are_left_out(torch_cache):
    net = published(torch_cache, "googlenet", init_weights=False, transform_input=True)
    checkpoint = sources.load("torchvision:googlenet:size=64")
    assert checkpoint.arch_args == {"transform_input": True}
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(checkpoint.model.net(x), net(x))
    assert isinstance(checkpoint.model.train()(x), torch.Tensor)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("torchvision:resnet5", "no classifier 'resnet5'. Did you mean resnet50"),
        ("torchvision:resnet50.V9", "no weights 'V9' for resnet50"),
        ("torchvision:resnet18", "not on this machine, and HF_HUB_OFFLINE is set"),
        ("torchvision:resnet18:size=[1,32,32]", "cannot be built for 1 channels"),
        ("torchvision:resnet18:depth=7", "cannot build resnet18 with {'depth': 7}"),
    ],
)
def test_mistakes(torch_cache, source, said):
    with pytest.raises(UserError, match=said):
        sources.load(source)


def test_torchvision_is_listed():
    assert [info.id for info in sources.names("torchvision:resnet18")] == ["torchvision:resnet18"]


# ---------------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def vit(tmp_path):
    """A small ViT for 5 classes as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    net = transformers.AutoModelForImageClassification.from_config(config).eval()
    net.save_pretrained(tmp_path / "vit")
    told = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_resize": True}
    told |= {"size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(told))
    return tmp_path / "vit", net


def test_transformers_folder(vit, tmp_path):
    folder, net = vit
    checkpoint = sources.load(str(folder))
    x = torch.rand(2, 3, 32, 32)
    normalised = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    assert torch.allclose(checkpoint.model(x), net(normalised).logits, atol=1e-6)
    assert (checkpoint.num_classes, checkpoint.input_size, checkpoint.base_id) == (5, (3, 32, 32), "vit")
    api.export(checkpoint, tmp_path / "out")
    again = sources.load(str(tmp_path / "out"))
    assert torch.equal(again.model(x), checkpoint.model(x))
    other = sources.load(str(folder), num_classes=3)
    assert (other.model(x).shape, other.replaced) == ((2, 3), 5)
    assert torch.equal(other.model.net.net.vit.layernorm.weight, net.vit.layernorm.weight)


def test_transformers_on_the_hub(vit, tmp_path):
    root = tmp_path / "hub" / "models--someone--vit"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    vit[0].rename(root / "snapshots" / ("0" * 40))
    checkpoint = sources.load("hf-hub:someone/vit")
    assert (checkpoint.base_id, checkpoint.arch) == ("someone/vit", "robustify_transformers")


def test_transformers_mistakes(vit):
    folder, _ = vit
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors .* is truncated or damaged"):
        sources.load(str(folder))
    weights.write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(UserError, match=r"model.safetensors is a web page"):
        sources.load(str(folder))
    weights.unlink()
    torch.save({"state_dict": {}, "args": Runs(folder / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds more than tensors \(\w+\.getattr, pathlib\.Path") as error:
        sources.load(str(folder))
    assert "--allow-pickle" in error.value.hint
    assert not (folder / "ran").exists()
    (folder / "pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    with pytest.raises(UserError, match=r"vit does not take images of \(3, 64, 64\)"):
        sources.load(f"{folder}:size=64")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        sources.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="transformers"):
        sources.load(str(folder))
    text = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(UserError) as error:
        sources.load(str(folder))
    assert error.value.message == "BertForSequenceClassification is no image classifier of transformers"


def test_transformers_weights_in_several_files(vit, tmp_path):
    folder, net = vit
    net.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    for part in (tmp_path / "split").glob("model*"):
        part.rename(folder / part.name)
    assert len(list(folder.glob("model-*"))) > 1
    there = sources.load(str(folder)).model.net.net.state_dict()
    assert all(torch.equal(there[name], value) for name, value in net.state_dict().items())


def test_without_transformers_one_is_told(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers") as error:
        sources.load(str(tmp_path))
    assert error.value.hint == "pip install 'robustify[transformers]'"
