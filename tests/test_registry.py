"""Registration with timm: after `import robustify`, without importing anything heavy."""
from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import save_file

from robustify import registry, sources
from robustify.errors import UserError
from robustify.nets import DigitsCNN

registry.install()
R18 = "robustbench_cifar10_linf_sehwag2021proxy_r18"


@pytest.mark.parametrize("order", ["robustify-first", "timm-first"])
def test_a_fresh_process(order):
    lines = ["import sys", "from robustify import registry; registry.install(); registry.install()", "import timm"]
    if order == "timm-first":
        lines = [lines[0], lines[2], lines[1]]
    lines += [
        "assert timm.is_model('robustify_digits_cnn') and len(timm.list_models('robustbench_*')) == 206",
        "assert 'robustbench' not in sys.modules",
        "timm.create_model('robustify_digits_cnn')",
        "assert 'robustbench' not in sys.modules",
    ]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True)
    assert "Overwriting" not in result.stderr


def test_digits_network():
    net = timm.create_model("robustify_digits_cnn", num_classes=4)
    assert isinstance(net, DigitsCNN)
    assert 30_000 < sum(p.numel() for p in net.parameters()) < 80_000
    x = torch.rand(2, 1, 8, 8)
    assert net(x).shape == (2, 4)
    assert net.get_classifier() is net.fc
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (2, net.num_features)
    net.reset_classifier(6)
    assert (net(x).shape, net.num_classes) == ((2, 6), 6)
    assert net.default_cfg["input_size"] == (1, 8, 8)
    assert timm.create_model("robustify_digits_cnn", in_chans=3)(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_robustbench_architecture():
    net = timm.create_model(R18, num_classes=10)
    assert (net.num_classes, net.default_cfg["mean"], net.default_cfg["std"]) == (10, (0.0,) * 3, (1.0,) * 3)
    assert torch.equal(copy.deepcopy(net).linear.weight, pickle.loads(pickle.dumps(net)).linear.weight)
    assert timm.create_model(R18, num_classes=7)(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(UserError, match="cannot be built for"):
        timm.create_model(R18, in_chans=1)


def test_robustbench_architecture_made_of_one_of_timms():
    """A ViT of timm's (Singh2023's ViT-B-ConvStem) says that it takes images of one size, which timm then passes on."""
    cfg = {"num_classes": 10, "input_size": (3, 32, 32), "fixed_input_size": True}
    assert timm.create_model(R18, pretrained_cfg=cfg)(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_names_are_valid_for_timm():
    names = timm.list_models("robustbench_*")
    assert all(name == name.lower() and name.isidentifier() and timm.is_model(name) for name in names)


@pytest.mark.parametrize(("arch", "size"), [("robustify_digits_cnn", (1, 8, 8)), (R18, (3, 32, 32))])
def test_exported_folders_reload_with_timm(tmp_path, arch, size):
    net = timm.create_model(arch, num_classes=10).eval()
    weights = tmp_path / "model.safetensors"
    save_file(net.state_dict(), weights)
    cfg = {"input_size": list(size), "mean": [0.0] * size[0], "std": [1.0] * size[0], "num_classes": 10}
    config = {"architecture": arch, "num_classes": 10, "pretrained_cfg": cfg, "robustness": {"method": "trades"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.rand(2, *size)
    again = [timm.create_model(arch, num_classes=10, checkpoint_path=str(weights))]
    if Version(timm.__version__) >= Version("1.0.15"):
        again.append(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    for model in again:
        assert torch.equal(model.eval()(x), net(x))


def test_resnet2b2_by_hand():
    net = timm.create_model("robustify_resnet2b2", num_classes=4)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    by_hand = 464 + 14_528 + 57_728 + 102_500 + 1_010  # stem, two blocks, two linear layers
    assert sum(weight.numel() for weight in timm.create_model("robustify_resnet2b2").parameters()) == by_hand
    net.reset_classifier(7)
    assert net.get_classifier().out_features == 7
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.assets
def test_published_weights_load_into_resnet2b2(assets, tmp_path):
    """A file of the authors' gives the logits of the network that they published it for."""
    source = next((assets.HERE / "checkpoints").glob("*resnet2b2_sadv8.pth"))
    model = sources.load(f"{source}:arch=robustify_resnet2b2").model
    x, _ = assets.images()
    with torch.no_grad():
        assert torch.allclose(model(x[:16]), assets.model("resnet2b2_adv8")(x[:16]), atol=1e-5)


def test_models_that_come_with_robustify():
    """Their whole origin comes along, and they are small."""
    assert "digits" in sources.embedded()
    for name, folder in sources.embedded().items():
        checkpoint = sources.load(name)
        assert (checkpoint.base_id, checkpoint.pretrained) == (name, True)
        assert checkpoint.license
        assert {"README.md", "report.json", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 5e6
