"""timm's models, their files served from a cache of the hub that the test fills."""
from __future__ import annotations

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from source_folders import write_folder

from robustify import sources
from robustify.errors import UserError

NAME = "test_vit.r160_in1k"


def hub_folder(tmp_path, repo):
    """A folder of the hub's cache: what huggingface_hub finds without a network."""
    root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    commit = "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


@pytest.fixture
def cached(tmp_path):
    net = timm.create_model(NAME, pretrained=False).eval()
    folder = hub_folder(tmp_path, f"timm/{NAME}")
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    return net


@pytest.mark.parametrize("source", [NAME, f"timm:{NAME}", "test_vit", f"timm/{NAME}"])
def test_pretrained(cached, source):
    checkpoint = sources.load(source)
    x = torch.rand(2, *checkpoint.input_size)
    mean, std = (torch.tensor(cached.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(checkpoint.model(x), cached((x - mean) / std), atol=1e-5)
    assert (checkpoint.arch, checkpoint.base_id, checkpoint.dataset) == ("test_vit", f"timm/{NAME}", "imagenet")
    assert checkpoint.license == cached.default_cfg.get("license")
    assert "state_dict" not in checkpoint.model.net.pretrained_cfg
    assert not checkpoint.model.training
    timm.create_model(checkpoint.arch, num_classes=1000).load_state_dict(checkpoint.model.net.state_dict())


def test_older_names_mean_the_models_of_today():
    """timm builds them too, but has no weights under these names, and would guess their classes and normalisation."""
    from robustify.sources import timm as source

    assert source.current("tv_resnet50") == "resnet50.tv_in1k"
    checkpoint = sources.load("vit_base_patch16_224_in21k", pretrained=False)
    assert (checkpoint.arch, checkpoint.num_classes) == ("vit_base_patch16_224", 21843)
    assert checkpoint.model.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match=r"timm/resnet50\.tv_in1k"):  # it is looked for, and the tests have no network
        sources.load("tv_resnet50")


def test_new_classifier(cached):
    checkpoint = sources.load(NAME, num_classes=7)
    assert checkpoint.model(torch.rand(1, *checkpoint.input_size)).shape == (1, 7)
    assert (checkpoint.num_classes, checkpoint.pretrained) == (7, False)
    assert torch.equal(checkpoint.model.net.pos_embed, cached.pos_embed)
    timm.create_model("test_vit", num_classes=7).load_state_dict(checkpoint.model.net.state_dict())


def test_random_weights_need_no_network():
    checkpoint = sources.load("resnet10t", pretrained=False, num_classes=10)
    assert (checkpoint.base_id, checkpoint.license, checkpoint.dataset) == ("resnet10t", None, None)
    assert not checkpoint.pretrained


def test_offline(tmp_path):
    with pytest.raises(UserError, match=f"of timm/{NAME} is not on this machine") as error:
        sources.load(NAME)
    assert "--set model.pretrained=false" in error.value.hint
    with pytest.raises(UserError, match="of someone/net is not on this machine"):
        sources.load("hf-hub:someone/net")


def test_hub_folder(tmp_path):
    folder = hub_folder(tmp_path, "someone/net")
    write_folder(folder, "test_vit", 5, {"input_size": [3, 160, 160], "license": "apache-2.0"})
    checkpoint = sources.load("hf-hub:someone/net")
    assert (checkpoint.base_id, checkpoint.num_classes, checkpoint.license) == ("someone/net", 5, "apache-2.0")


@pytest.mark.parametrize(("raised", "said", "hint"), [
    ("RepositoryNotFoundError", "there is no folder someone/net on the Hugging Face hub, or it is private", "hf auth login"),
    ("GatedRepoError", "asks its readers to accept its terms", "https://huggingface.co/someone/net"),
    ("RevisionNotFoundError", "someone/net has no revision v9", "commits"),
    ("EntryNotFoundError", "has no config.json", "tree/main"),
    ("LocalEntryNotFoundError", "is not on this machine and could not be fetched", "hf download someone/net"),
])
def test_what_the_hub_answers(monkeypatch, raised, said, hint):
    def refuse(**_):
        kind = getattr(huggingface_hub.errors, raised)
        error = kind.__new__(kind)
        error.args = ("404 for https://huggingface.co/someone/net",)
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("robustify.sources.hub.reach", lambda endpoint: None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=said) as error:
        sources.load("hf-hub:someone/net@v9")
    assert hint in error.value.hint


def test_a_name_that_is_none_on_the_hub():
    with pytest.raises(UserError, match="no name of a folder on the Hugging Face hub"):
        sources.load("hf-hub:some one/net/extra")


def test_tensors_in_any_order(tmp_path):
    """timm 1.0.9 reads LeViT's by their order, safetensors sorts them by name; none may be lost."""
    name = "levit_128s.fb_dist_in1k"
    net = timm.create_model(name, pretrained=False).eval()
    folder = hub_folder(tmp_path, f"timm/{name}")
    folder.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, folder / "model.safetensors")
    checkpoint = sources.load(name)
    found, published = checkpoint.model.net.state_dict(), net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in published.items())
    other = sources.load(name, num_classes=7)
    assert other.model(torch.rand(1, *other.input_size)).shape == (1, 7)
    assert torch.equal(other.model.net.stem.conv1.linear.weight, net.stem.conv1.linear.weight)


@pytest.mark.parametrize(("source", "said"), [
    ("timm:resnet5O", "has no model 'resnet5O'. Did you mean resnet50"),
    ("resnet18.imaginary", "no weights 'imaginary' for resnet18"),
    ("timm:", "names no model"),
])
def test_wrong_names(source, said):
    with pytest.raises(UserError, match=said):
        sources.load(source)


def test_what_timm_changes_for_the_sake_of_weights_is_exported(tmp_path):
    """fbnetc_100 has another epsilon in BatchNorm where its weights are loaded: built again, it must have it too."""
    net = timm.create_model("fbnetc_100", bn_eps=1e-3).eval()
    folder = hub_folder(tmp_path, "timm/fbnetc_100.rmsp_in1k")
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "pytorch_model.safetensors")
    save_file(net.state_dict(), folder / "model.safetensors")
    checkpoint = sources.load("fbnetc_100")
    again = timm.create_model(checkpoint.arch, num_classes=1000, **checkpoint.arch_args).eval()
    again.load_state_dict(checkpoint.model.net.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x), checkpoint.model.net(x))


def test_an_architecture_without_a_description_has_timms_defaults(monkeypatch):
    monkeypatch.setattr("timm.models.get_pretrained_cfg", lambda name: None)  # timm 1.0.9 has none, a newer one has
    checkpoint = sources.load("efficientnet_x_b5", pretrained=False, num_classes=10)
    assert (checkpoint.input_size, checkpoint.num_classes) == ((3, 224, 224), 10)
    with pytest.raises(UserError, match="no pretrained weights for efficientnet_x_b5"):
        sources.load("efficientnet_x_b5")


def test_an_encoder_that_takes_no_classifier_is_refused(monkeypatch):
    encoder = timm.create_model("resnet10t", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: encoder)
    with pytest.raises(UserError, match="returns features and takes no classifier"):
        sources.load("timm:resnet10t", pretrained=False)
