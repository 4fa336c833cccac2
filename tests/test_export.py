"""Exported folders: timm's layout, the same logits bit for bit, and nothing left behind when they are not."""
from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from robustify import api, files, formats, sources
from robustify.equivalents import in_timm
from robustify.errors import UserError
from robustify.export import export, unwrap
from robustify.pipeline import harden
from robustify.pixels import PixelModel
from robustify.sources.checkpoint import Checkpoint
from robustify.threat import ThreatModel

LOCAL_DIR = tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 15)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["cat", "dog", "häher", "emu", "fox", "gnu", "hen"]


def from_timm(arch: str, mean=MEAN, std=STD, size: int = 64, **arguments) -> Checkpoint:
    net = timm.create_model(arch, num_classes=7, **arguments)
    for module in net.modules():  # statistics that a new network does not have by chance
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = PixelModel(net, mean, std).eval()
    return Checkpoint(model, arch, arguments, 7, (3, size, size), f"timm/{arch}.a1_in1k", "apache-2.0")


class Tied(nn.Module):
    """A network that no library builds, with a weight under two names and a strided one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 5)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.head(self.two(self.one(self.conv(x).mean((2, 3)))) * self.scale)


def custom(net: nn.Module) -> Checkpoint:
    return Checkpoint(PixelModel(net).eval(), "custom", {}, 5, (3, 8, 8), "a network of mine")


def save(checkpoint: Checkpoint, folder, model=None, **more):
    metadata = {"threat": ThreatModel("Linf", 8 / 255), "recipe": "abc"}
    facts = {"robustness": {"threat": "Linf:8/255"}, "metadata": metadata}
    facts["verify_batch"] = torch.rand(3, *checkpoint.input_size)
    return export(checkpoint, checkpoint.model if model is None else model, folder, **{**facts, **more})


def left(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [("resnet10t", {"stem_width": 16}), ("mobilenetv3_small_050", {}), ("test_vit", {"img_size": 64})],
)
def test_timm_loads_the_folder_with_the_same_logits(tmp_path, arch, arguments):
    checkpoint = from_timm(arch, **arguments)
    folder = save(checkpoint, tmp_path / "out")
    x = torch.rand(2, 3, 64, 64)
    config = json.loads((folder / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    nets = [timm.create_model(arch, num_classes=7, checkpoint_path=str(folder / "model.safetensors"), **arguments)]
    if LOCAL_DIR:
        nets.append(timm.create_model(f"local-dir:{folder}", pretrained=True))
        assert nets[-1].num_classes == 7
    data = timm.data.resolve_data_config(cfg)
    assert (data["mean"], data["std"], data["input_size"]) == (MEAN, STD, (3, 64, 64))
    for net in nets:
        normalised = (x - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(3, 1, 1)
        with torch.no_grad():
            assert torch.equal(net.eval()(normalised), checkpoint.model(x))


@pytest.mark.skipif(not timm.is_model("qwen3_vit_88m_merge"), reason="a newer timm knows these")
@pytest.mark.parametrize(
    ("arch", "small"),
    [
        ("deepseek_vit_412m_align", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
        ("qwen3_vit_88m_merge", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    ],
)
def test_a_width_that_timm_looks_up_by_its_tag_is_written_down(tmp_path, arch, small):
    checkpoint = from_timm(arch, size=126 if "deepseek" in arch else 64, **small)
    folder = save(checkpoint, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"] == {**small, "out_features": checkpoint.model.net.num_features}
    again = sources.load(str(folder))
    x = torch.rand(1, *checkpoint.input_size)
    assert torch.equal(again.model(x), checkpoint.model(x))


def test_what_the_config_says(tmp_path):
    checkpoint = from_timm("resnet10t")
    folder = save(checkpoint, tmp_path / "out", class_names=NAMES)
    config = json.loads((folder / "config.json").read_text())
    assert left(folder) == ["config.json", "model.safetensors"]
    assert config["architecture"] == "resnet10t"
    assert config["num_classes"] == 7
    assert config["num_features"] == 512
    assert config["label_names"] == NAMES
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    about = {"base_model": "timm/resnet10t.a1_in1k", "dataset": None, "threat": "Linf:8/255", "weights_sha256": weights}
    assert config["robustness"] == about
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 64, 64]
    assert (cfg["mean"], cfg["std"]) == (list(MEAN), list(STD))
    assert (cfg["classifier"], cfg["first_conv"], cfg["license"]) == ("fc", "conv1.0", "apache-2.0")
    assert {"interpolation", "crop_pct", "crop_mode", "num_classes", "tag"} <= cfg.keys()
    with safe_open(folder / "model.safetensors", "pt") as file:
        head = file.metadata()
    assert head["format"] == "pt"
    assert head["recipe"] == "abc"
    assert head["base_model"] == "timm/resnet10t.a1_in1k"
    assert json.loads(head["threat"])["eps"] == 8 / 255
    assert {"version", "created"} <= head.keys()
    with pytest.raises(UserError, match="2 class names for 7"):
        save(checkpoint, tmp_path / "names", class_names=["a", "b"])


def test_a_network_that_normalises_inside_gets_mean_0_and_std_1(tmp_path):
    checkpoint = dataclasses.replace(from_timm("test_efficientnet", (0.0,), (1.0,)), license=None)
    cfg = json.loads((save(checkpoint, tmp_path / "out") / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.0] * 3, [1.0] * 3)
    assert "license" not in cfg


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: PixelModel(torch.compile(m.net), MEAN, STD),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.double(),
    ],
)
def test_wrappers_and_memory_order_are_gone(tmp_path, wrap):
    checkpoint = from_timm("test_efficientnet")
    hardened = copy.deepcopy(checkpoint.model)
    folder = save(checkpoint, tmp_path / "out", wrap(hardened))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(checkpoint.model.net.state_dict())


def test_any_module_with_shared_weights(tmp_path):
    checkpoint = custom(Tied())
    folder = save(checkpoint, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "custom"
    assert config["num_features"] == 4
    assert config["pretrained_cfg"]["classifier"] == "head"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {"one.weight", "two.weight"} <= set(file.keys())


class Expanded(Tied):
    """One element stands for several, in a buffer and in a weight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.full((1,), 0.5).expand(5))
        self.shift = nn.Parameter(torch.zeros(1).expand(5))

    def forward(self, x):
        return super().forward(x) * self.factor + self.shift


def test_tensors_whose_elements_share_one_place(tmp_path):
    net = Expanded().eval()
    folder = save(custom(net), tmp_path / "out")
    assert net.factor.stride() == (0,)  # the user's own stays as it is
    other = Tied()
    for name in ("factor", "shift"):
        other.register_buffer(name, torch.zeros(5))
    other.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(other.factor, net.factor)
    images = torch.rand(64, 3, 16, 16), torch.arange(64) % 5
    quiet = {"listener": lambda event: None, "attacks": ("clean",), "verify": False}
    result = harden(net, images, method="fast-at", threat="Linf:0.1", epochs=1, batch_size=16, **quiet)
    assert net.factor.stride() == (0,)
    assert isinstance(result.model, Expanded)


def test_buffers_that_the_weights_do_not_hold_are_told(tmp_path):
    heard = []
    api.export(custom(Tied()), tmp_path / "out", listener=heard.append)
    assert [event.text for event in heard if "the buffers scale (persistent=False)" in event.text]
    heard.clear()
    api.export(from_timm("test_efficientnet"), tmp_path / "other", listener=heard.append)
    assert not heard


def test_the_exported_model_is_left_as_it_was(tmp_path):
    checkpoint = from_timm("test_efficientnet")
    model = checkpoint.model.train()
    before = copy.deepcopy(model.state_dict())
    save(checkpoint, tmp_path / "out")
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Random(Tied):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class Wrong(Tied):
    def load_state_dict(self, state, *args, **kwargs):
        return super().load_state_dict({k: v + 1e-6 if v.is_floating_point() else v for k, v in state.items()})


@pytest.mark.parametrize(("net", "hint"), [(Random, "randomness"), (Wrong, "state dict does not hold")])
@pytest.mark.parametrize("older", [True, False])
def test_a_mismatch_leaves_nothing(tmp_path, net, hint, older):
    if older:
        save(custom(Tied()), tmp_path / "out")
        weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="logits differ by up to") as caught:
        save(custom(net()), tmp_path / "out", force=True)
    assert hint in caught.value.hint
    assert left(tmp_path) == (["out"] if older else [])
    assert not older or (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_arguments_that_build_another_network(tmp_path):
    checkpoint = dataclasses.replace(from_timm("resnet10t", stem_width=16), arch_args={})
    with pytest.raises(UserError, match=r"does not read back: .* does not fit resnet10t"):
        save(checkpoint, tmp_path / "out")
    assert left(tmp_path) == []


def test_non_finite_logits(tmp_path):
    net = Tied()
    nn.init.constant_(net.head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        save(custom(net), tmp_path / "out")


def test_an_existing_folder_needs_force_and_keeps_its_other_files(tmp_path):
    save(custom(Tied()), tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("by hand")
    with pytest.raises(UserError, match="not empty"):
        save(custom(Tied()), tmp_path / "out")
    save(custom(Tied()), tmp_path / "out", force=True)
    assert left(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]


def test_half_precision_rounds_weights_and_nothing_else(tmp_path):
    checkpoint = from_timm("resnet10t")
    folder = save(checkpoint, tmp_path / "out", half=True)
    whole = checkpoint.model.net.state_dict()
    weights = {name for name, _ in checkpoint.model.net.named_parameters()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_tensor(name)
            assert torch.equal(stored, whole[name].half() if name in weights else whole[name])
    net = timm.create_model("resnet10t", num_classes=7, checkpoint_path=str(folder / "model.safetensors"))
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    nn.init.constant_(checkpoint.model.net.fc.weight, 1e5)
    with pytest.raises(UserError, match="not finite") as caught:
        save(checkpoint, tmp_path / "large", half=True)
    assert "single precision" in caught.value.hint


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_other_formats_take_plain_images_of_any_number(tmp_path, name):
    if name == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX needs the extra robustify[onnx]")
        pytest.importorskip("onnxscript", reason="ONNX needs the extra robustify[onnx]")
    checkpoint = from_timm("test_efficientnet")
    folder = save(checkpoint, tmp_path / "out", formats=[name], verify_batch=torch.rand(3, 3, 64, 64))
    said = json.loads((folder / "config.json").read_text())["robustness"]["formats"][name]
    assert (said["file"], said["images"], said["other_predictions"]) == (f"model.{name}", 3, 0)
    for n in (1, 5):
        x = torch.rand(n, 3, 64, 64)
        with torch.no_grad():
            wanted = checkpoint.model(x)
            if name == "pt2":
                found = torch.export.load(folder / "model.pt2").module()(x)
            else:
                import onnxruntime

                session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
                sides = session.get_inputs()[0].shape, session.get_outputs()[0].shape
                assert sides == (["batch", 3, 64, 64], ["batch", 7])
                found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_format_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown format 'tflite'") as caught:
        save(from_timm("test_efficientnet"), tmp_path / "out", formats=["tflite"])
    assert "onnx, pt2" in caught.value.hint
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx, onnxscript, onnxruntime") as caught:
        save(from_timm("test_efficientnet"), tmp_path / "out", formats=["onnx"])
    assert "robustify[onnx]" in caught.value.hint
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be written as pt2"):
        save(custom(Branching()), tmp_path / "out", formats=["pt2"])
    monkeypatch.setattr(formats, "_run_pt2", lambda path, x: torch.full((3, 7), float("nan")))
    with pytest.raises(UserError, match=r"the logits of model\.pt2 differ by up to nan"):
        save(from_timm("test_efficientnet"), tmp_path / "out", formats=["pt2"])
    assert left(tmp_path) == []


class Branching(Tied):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_an_older_models_files_do_not_outlive_it(tmp_path):
    save(from_timm("test_efficientnet"), tmp_path / "out", formats=["pt2"])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save(custom(Tied()), tmp_path / "out", force=True)
    assert left(tmp_path / "out") == ["config.json", "model.safetensors", "notes.txt"]


def test_a_persons_files_in_subfolders_stay(tmp_path):
    save(custom(Tied()), tmp_path / "out")
    (tmp_path / "out" / "mine").mkdir()
    (tmp_path / "out" / "mine" / "config.json").write_text("mine")
    save(custom(Tied()), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "mine" / "config.json").read_text() == "mine"


def test_what_fails_at_the_end_leaves_nothing(tmp_path):
    def finish(stage):
        assert left(stage) == ["config.json", "model.safetensors"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(custom(Tied()), tmp_path / "out", finish=finish)
    assert left(tmp_path) == []


WRITE = """
import sys
from pathlib import Path
from robustify import files
from robustify.errors import UserError
folder, name, force = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "force"
for _ in range(40):
    try:
        with files.staged_folder(folder, force=force) as stage:
            for part in "abc":
                (stage / part).write_text(name)
    except UserError as error:
        sys.exit(str(error))
    assert len({(folder / part).read_text() for part in "a"}) == 1
"""


@pytest.mark.parametrize("force", ["force", "no"])
def test_two_processes_and_one_folder(tmp_path, force):
    """Each gets its turn, so the folder is always the work of one; without --force the second is refused."""
    command = [sys.executable, "-c", WRITE, str(tmp_path / "out")]
    running = [subprocess.Popen([*command, name, force], stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
    errors = [process.communicate()[1] for process in running]
    if force == "force":
        assert errors == ["", ""]
        assert [process.returncode for process in running] == [0, 0]
    else:
        assert all("is not empty" in error for error in errors)
    assert len({(tmp_path / "out" / part).read_text() for part in "abc"}) == 1
    assert left(tmp_path) == ["out"]


EXPORT = """
import sys, time
from robustify import api
def slow(*given):
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
sys.modules["robustify.export"]._compare = slow
api.export("digits", sys.argv[1])
"""


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    """A living process keeps what it builds."""

    def begun(seconds: int) -> subprocess.Popen:
        command = [sys.executable, "-c", EXPORT, str(tmp_path / "out"), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        return process

    killed, living = begun(600), begun(600)
    killed.kill()
    killed.communicate()
    stages = {f".out.{files._HOST}.{process.pid}.tmp" for process in (killed, living)}
    assert set(left(tmp_path)) == stages
    others = [".out.2024-backup.tmp", ".out.5.tmp", f".out.1.5.{files._HOST}.7.tmp", ".out.elsewhere.7.tmp"]
    for name in others:
        (tmp_path / name).mkdir()
    try:
        save(custom(Tied()), tmp_path / "out")
        assert left(tmp_path) == sorted([f".out.{files._HOST}.{living.pid}.tmp", *others, "out"])
    finally:
        living.kill()
        living.communicate()
    save(custom(Tied()), tmp_path / "out", force=True)
    assert left(tmp_path) == sorted([*others, "out"])


def test_what_timm_has_needs_no_robustify(tmp_path):
    """A fresh process loads the folder with timm alone and gives the same logits for the same pictures."""
    entry = "imagenet/Linf/Salman2020Do_R18"
    checkpoint = sources.load(f"robustbench:{entry}", pretrained=False)
    x = torch.rand(2, 3, 224, 224)
    folder = save(checkpoint, tmp_path / "out", verify_batch=x)
    with torch.no_grad():
        torch.save((x, checkpoint.model(x)), tmp_path / "logits.pt")
    config = json.loads((folder / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    code = (
        "import sys, timm, torch, json\n"
        f"config = json.load(open({str(folder / 'config.json')!r}))\n"
        "cfg = config['pretrained_cfg']\n"
        "net = timm.create_model(config['architecture'], num_classes=1000, **config.get('model_args', {}),\n"
        f"    checkpoint_path={str(folder / 'model.safetensors')!r}).eval()\n"
        f"x, wanted = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        "mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))\n"
        "with torch.no_grad(): found = net((x - mean) / std)\n"
        "assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max()), (found - wanted).abs().max()\n"
        "assert 'robustify' not in sys.modules and 'robustbench' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.875, "bilinear")
    assert config["robustness"]["base_model"] == f"robustbench:{entry}"


def test_an_architecture_with_arguments_in_timm():
    model = sources.load("robustbench:imagenet/Linf/Debenedetti2022Light_XCiT-M12", pretrained=False).model
    found = in_timm(model, torch.rand(2, 3, 32, 32))
    assert found is not None
    assert (found.arch, found.arch_args) == ("xcit_small_12_p16_224", {"embed_dim": 512})


def test_a_network_that_timm_only_resembles_stays_what_it_is():
    other = sources.load("robustbench:cifar10/Linf/Wong2020Fast", pretrained=False).model
    assert in_timm(other, torch.rand(2, 3, 32, 32)) is None
    twisted = sources.load("robustbench:imagenet/Linf/Salman2020Do_R18", pretrained=False).model
    twisted.net.model.relu = nn.LeakyReLU(0.3)  # the same tensors, other logits
    assert in_timm(twisted, torch.rand(2, 3, 64, 64)) is None


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"full: [\d,]+ bytes are needed, [\d,]+ are free") as caught:
        save(custom(Tied()), tmp_path / "out")
    assert caught.value.message.startswith(f"the disk of {tmp_path} is full")  # not of a folder that is gone by then
    assert left(tmp_path) == []


def test_a_disk_that_fills_while_the_weights_are_written_leaves_nothing(tmp_path, monkeypatch):
    def full(state, path, head):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"full: [\d,]+ bytes are needed, [\d,]+ are free"):
        save(custom(Tied()), tmp_path / "out")
    assert left(tmp_path) == []


def test_everybody_may_read_the_weights_who_may_read_the_config(tmp_path):
    save(custom(Tied()), tmp_path / "out")
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_a_kill_before_the_swap_leaves_the_older_folder(tmp_path, monkeypatch):
    save(custom(Tied()), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_swap", killed)
    with pytest.raises(KeyboardInterrupt):
        save(custom(Tied()), tmp_path / "out", force=True)
    assert left(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_unwrap_takes_only_a_pixel_model(tmp_path):
    assert isinstance(unwrap(nn.DataParallel(Tied())), Tied)
    with pytest.raises(TypeError, match="PixelModel"):
        save(custom(Tied()), tmp_path / "out", Tied())


@pytest.mark.parametrize(("factor", "exported"), [(1 + 1e-7, True), (1 + 1e-3, False)])
def test_another_rounding_is_no_reason_to_refuse(factor, exported, tmp_path, monkeypatch):
    """The same weights at another place in memory may round otherwise; anything more is another network."""
    exporting = sys.modules["robustify.export"]  # the package has a function of that name

    def elsewhere(stage, net, read=exporting._read_back):
        again = read(stage, net)
        again.net.register_forward_hook(lambda module, x, logits: logits * factor)
        return again

    monkeypatch.setattr(exporting, "_read_back", elsewhere)
    checkpoint = sources.load("test_vit", pretrained=False, num_classes=4)
    x = torch.rand(2, *checkpoint.input_size)
    arguments = {"robustness": {}, "metadata": {}, "verify_batch": x}
    if exported:
        export(checkpoint, checkpoint.model, tmp_path / "out", **arguments)
    else:
        with pytest.raises(UserError, match="logits differ by up to"):
            export(checkpoint, checkpoint.model, tmp_path / "out", **arguments)
    assert (tmp_path / "out").exists() == exported
