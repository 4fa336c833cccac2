"""ONNX, torch.export and half precision of real networks, compared with the model on real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import assets_folder
from safetensors import safe_open
from torch import nn

from robustify import api
from robustify.cli import main
from robustify.data import load as load_data
from robustify.export import export
from robustify.formats import _run_onnx, _run_pt2
from robustify.model_folder import FORMATS
from robustify.pixels import PixelModel
from robustify.report import load_pair
from robustify.sources.checkpoint import Checkpoint

RUN = {"onnx": _run_onnx, "pt2": _run_pt2}


@pytest.fixture(params=["onnx", "pt2"])
def format(request):
    if request.param == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library, reason="ONNX needs the extra robustify[onnx]")
    return request.param


def agrees(folder: Path, format: str, model: nn.Module, x: torch.Tensor) -> None:
    """The file in the folder gives the model's logits up to rounding, on images that it was not compared on either."""
    with torch.no_grad():
        wanted = model(x)
    found = RUN[format](folder / FORMATS[format], x)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_an_unknown_format_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api, "load", None)
    monkeypatch.setattr("robustify.cli.evaluate.load", None)
    with pytest.raises(SystemExit, match="2"):
        main(["export", "digits", str(tmp_path / "out"), "--format", "tflite"])
    assert "unknown format 'tflite'" in capsys.readouterr().err


def test_digits_in_every_format(tmp_path, format):
    folder = api.export("digits", tmp_path / "out", formats=[format], data="digits")
    x, y = load_data("digits", input_size=(1, 8, 8)).test.batch(range(449))
    said = json.loads((folder / "config.json").read_text())["robustness"]["formats"][format]
    assert (said["images"], said["other_predictions"]) == (64, 0)
    agrees(folder, format, api.load(folder).model, x)
    accuracy = (RUN[format](folder / FORMATS[format], x).argmax(1) == y).double().mean()
    assert accuracy == pytest.approx(444 / 449)


def test_what_half_precision_costs_is_measured_and_on_the_card(tmp_path):
    folder = api.export("digits", tmp_path / "out", half=True, data="digits")
    whole, half = load_pair(folder / "half.json")
    x, y = load_data("digits", input_size=(1, 8, 8)).test.batch(range(449))
    for report, model in ((whole, api.load("digits").model), (half, api.load(folder).model)):
        with torch.no_grad():
            right = (model(x).argmax(1) == y).sum()
        assert [row.attack for row in report.rows] == ["clean", "pgd"]
        assert report.clean.correct == right
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys() if name.endswith("weight")} >= {torch.float16}  # noqa: SIM118
    card = (folder / "README.md").read_text()
    assert "## Half precision" in card
    assert half.digest() in card


def _exported(net: nn.Module, size: tuple[int, int, int], format: str, x: torch.Tensor, folder: Path) -> Path:
    checkpoint = Checkpoint(PixelModel(net).eval(), "custom", {}, 10, size, "a network of its author's")
    return export(
        checkpoint, checkpoint.model, folder, robustness={}, metadata={}, verify_batch=x[:16], formats=[format]
    )


@pytest.mark.assets
@pytest.mark.parametrize(("name", "data"), [("resnet2b2_adv8", "cifar10"), ("mnist_trades", "mnist")])
def test_real_networks_on_real_pictures(assets, tmp_path, format, name, data):
    x, y = assets.images(data)
    net, x, y = assets.model(name), x[:200], y[:200]
    folder = _exported(net, tuple(x.shape[1:]), format, x, tmp_path / "out")
    agrees(folder, format, net, x)
    accuracy = (RUN[format](folder / FORMATS[format], x).argmax(1) == y).double().mean()
    assert accuracy > 0.7


@pytest.mark.assets
def test_timms_network_on_pictures_of_imagenet(assets, tmp_path, format):
    """No trained ImageNet network is at hand: random weights, real pictures, cut as timm cuts them."""
    from PIL import Image

    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=10)
    config = timm.data.resolve_data_config(net.pretrained_cfg)
    to_pixels = timm.data.create_transform(**{**config, "mean": (0, 0, 0), "std": (1, 1, 1)}, is_training=False)
    folder = assets_folder()
    assert folder is not None
    pictures = sorted((folder / "data" / "imagenet_folder").rglob("*.JPEG")) or sorted(
        (folder / "data" / "imagenet_folder").rglob("*.jpg")
    )
    x = torch.stack([to_pixels(Image.open(path).convert("RGB")) for path in pictures])
    assert len(x) == 20
    assert np.isfinite(x.numpy()).all()
    model = PixelModel(net, config["mean"], config["std"]).eval()
    checkpoint = Checkpoint(model, "resnet10t", {}, 10, tuple(x.shape[1:]), "timm/resnet10t")
    out = export(checkpoint, model, tmp_path / "out", robustness={}, metadata={}, verify_batch=x[:4], formats=[format])
    agrees(out, format, model, x)
