"""RobustBench's models in their published file format, with random weights; and one real file."""
from __future__ import annotations

import copy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from source_folders import shake

from robustify import sources
from robustify.errors import UserError
from robustify.sources import published, robustbench


def row(name, dataset="cifar10", threat="Linf"):
    found = published.find(name, dataset, threat, published.rows())
    assert found is not None
    return found


def put(folder: Path, entry, stored, suffix=".pt") -> Path:
    path = (folder / robustbench.place(entry)).with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if suffix == ".safetensors" else torch.save)(stored, path)
    return path


def network(entry) -> torch.nn.Module:
    torch.manual_seed(0)
    net = robustbench.build(entry, published.CLASSES[entry["dataset"]]).eval()
    shake(net)
    return net


def loads_the_same(net, entry, folder, **options):
    checkpoint = sources.load(
        entry["id"], dataset=entry["dataset"], threat=entry["threat"], models_dir=folder, **options)
    x = torch.rand(2, *checkpoint.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(checkpoint.model(x), net(x))
    assert not checkpoint.model.training
    return checkpoint


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_case_study(tmp_path, suffix):
    """WideResNet-34-10 of TRADES, under its short name."""
    entry = row("Zhang2019")
    net = network(entry)
    put(tmp_path, entry, net.state_dict(), suffix)
    checkpoint = loads_the_same(net, entry, tmp_path)
    assert checkpoint.arch == "robustbench_cifar10_linf_zhang2019theoretically"
    assert checkpoint.base_id == "robustbench:cifar10/Linf/Zhang2019Theoretically"
    assert (checkpoint.num_classes, checkpoint.input_size, checkpoint.arch_args) == (10, (3, 32, 32), {})
    assert (checkpoint.dataset, checkpoint.threat, checkpoint.license) == ("cifar10", "Linf", None)
    assert checkpoint.published["clean_acc"] == "84.92"
    assert not checkpoint.model.normalises


PREFIXED = {  # how the published files wrap and name their weights
    ("Sehwag2021Proxy_R18", "cifar10", "Linf"): lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    ("Andriushchenko2020Understanding", "cifar10", "Linf"): lambda s: {"last": s, "best": s},
    ("Kireev2021Effectiveness_RLAT", "cifar10", "corruptions"): lambda s: {
        "last": {k: v for k, v in s.items() if k not in ("mu", "sigma")}, "best": s},
    ("Wong2020Fast", "cifar10", "Linf"): lambda s: {k: v for k, v in s.items() if k not in ("mu", "sigma")},
    ("Rade2021Helper_R18_ddpm", "cifar100", "Linf"): lambda s: {f"module.model.{k}": v for k, v in s.items()},
    ("Salman2020Do_R18", "imagenet", "Linf"): lambda s: {
        k.replace("model.", "module.", 1): v for k, v in s.items() if k.startswith("model.")},
    ("Standard_R50", "imagenet", "Linf"): lambda s: {
        k.removeprefix("model."): v for k, v in s.items() if k.startswith("model.")},
    ("Debenedetti2022Light_XCiT-S12", "cifar10", "Linf"): lambda s: {
        "state_dict": {k.removeprefix("model."): v for k, v in s.items() if k.startswith("model.")}},
}


@pytest.mark.parametrize(("name", "dataset", "threat"), PREFIXED)
def test_published_formats(tmp_path, name, dataset, threat):
    entry = row(name, dataset, threat)
    net = network(entry)
    put(tmp_path, entry, PREFIXED[name, dataset, threat](net.state_dict()))
    loads_the_same(net, entry, tmp_path)


def test_a_real_file(tmp_path):
    """The AutoAttack wheel carries a ResNet-18 of CIFAR-10, saved on a GPU in the old format."""
    real = Path(find_spec("pyautoattack").origin).parent / "examples" / "model_test.pt"
    entry = row("Sehwag2021Proxy_R18")
    target = tmp_path / robustbench.place(entry)
    target.parent.mkdir(parents=True)
    shutil.copy(real, target)
    checkpoint = sources.load("Sehwag2021Proxy_R18", models_dir=tmp_path)
    assert torch.isfinite(checkpoint.model(torch.rand(2, 3, 32, 32))).all()
    shutil.move(target, tmp_path / target.name)  # the flat layout
    assert sources.load("Sehwag2021Proxy_R18", models_dir=tmp_path).model.net.linear.weight.std() > 0.01
    shutil.copy(real, tmp_path / "Zhang2019You.pt")
    with pytest.raises(UserError, match="does not fit Zhang2019You"):
        sources.load("Zhang2019You", models_dir=tmp_path)


def test_stand_ins_are_gone():
    robustbench._table()
    for name in ("autoattack", "autoattack.state", "pkg_resources"):
        assert name not in sys.modules or sys.modules[name].__name__ == name
        assert name not in sys.modules or hasattr(sys.modules[name], "__file__")


def test_constants_move_with_the_network():
    net = network(row("Sehwag2021Proxy_R18"))
    net.mean = torch.tensor(0.5)  # as MeanSparse and RobustArch networks keep it
    keys = set(net.state_dict())
    robustbench._move_with_weights(net)
    assert copy.deepcopy(net).double().mean.dtype == torch.float64
    assert set(net.state_dict()) == keys


def test_every_published_id_is_in_the_table_or_marked():
    assert robustbench.unlisted() == []
    table = {d.value: {t.value: names for t, names in threats.items()} for d, threats in robustbench._table().items()}
    for entry in published.rows():
        dataset, threat, name = published.key(entry)
        assert (name in table[dataset][threat]) == entry.get("weights", True)


def test_another_number_of_classes_puts_a_new_classifier_in(tmp_path):
    """Found by structure, and built again by name, so that what is exported reads back."""
    entry = row("Sehwag2021Proxy_R18")
    net = network(entry)
    put(tmp_path, entry, net.state_dict())
    checkpoint = sources.load(entry["id"], threat="Linf", num_classes=7, models_dir=tmp_path)
    assert checkpoint.model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert (checkpoint.num_classes, checkpoint.replaced, checkpoint.pretrained) == (7, 10, False)
    assert torch.equal(checkpoint.model.net.conv1.weight, net.conv1.weight)
    again = timm.create_model(checkpoint.arch, num_classes=7).eval()
    again.load_state_dict(checkpoint.model.net.state_dict())


def test_ensembles_and_other_channels_are_refused():
    with pytest.raises(UserError, match="averages the probabilities of 3 networks"):
        sources.load("Chen2020Adversarial")
    with pytest.raises(UserError, match="mixes two fixed networks") as error:
        sources.load("robustbench:cifar100/Linf/Bai2024MixedNUTS")
    assert error.value.hint == "load the robust one in it: Wang2023Better_WRN-70-16"
    with pytest.raises(UserError, match="cannot be built for 1 channels"):
        sources.load("Sehwag2021Proxy_R18:size=[1,32,32]", pretrained=False)
    with pytest.raises(UserError, match="never published"):
        sources.load("Madry2018Towards")


def test_random_weights_need_no_file():
    checkpoint = sources.load("Sehwag2021Proxy_R18", threat="L2", pretrained=False)
    assert (checkpoint.threat, checkpoint.pretrained) == ("L2", False)


# ------------------------------------------------------------------------------------------------------ downloads

def test_offline_says_where_the_file_goes(tmp_path):
    with pytest.raises(UserError, match="HF_HUB_OFFLINE") as error:
        sources.load("Sehwag2021Proxy_R18", models_dir=tmp_path)
    hint = error.value.hint
    assert str(tmp_path / "cifar10" / "Linf" / "Sehwag2021Proxy_R18.pt") in hint
    assert "https://drive.google.com/file/d/" in hint
    assert "https://arxiv.org/abs/2104.09425" in hint
    with pytest.raises(UserError) as error:
        sources.load("Debenedetti2022Light_XCiT-S12", models_dir=tmp_path)
    assert "github.com/RobustBench/robustbench/releases" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_download(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    entry = row("Sehwag2021Proxy_R18")
    net = network(entry)
    good = put(tmp_path / "server", entry, net.state_dict()).read_bytes()
    sent = {"html": b"<!DOCTYPE html>Quota exceeded", "cut": good[:-500], "nothing": None, "good": good}

    def serve(id, output, quiet):
        assert len(id) > 20
        if sent[what] is not None:
            Path(output).write_bytes(sent[what])

    monkeypatch.setattr("gdown.download", serve)
    for what in ("html", "cut", "nothing"):
        with pytest.raises(UserError, match="web page" if what == "html" else "no complete file"):
            sources.load("Sehwag2021Proxy_R18", models_dir=tmp_path / "here")
        assert not [p for p in (tmp_path / "here").rglob("*") if p.is_file()]
    what = "good"
    loads_the_same(net, entry, tmp_path / "here")
    monkeypatch.delattr("gdown.download")
    loads_the_same(net, entry, tmp_path / "here")


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def fail(id, output, quiet):
        Path(output + "abc.part").write_bytes(b"PK half")
        raise ConnectionError(f"no route to pool(port=443) (Caused by {'x' * 100} {'y' * 100})\nlong story")

    monkeypatch.setattr("gdown.download", fail)
    with pytest.raises(UserError, match=r"could not be downloaded: no route to pool\(port=443\) \.\.\.\n") as error:
        sources.load("Sehwag2021Proxy_R18", models_dir=tmp_path / "not" / "there")
    assert str(tmp_path / "not" / "there" / "cifar10" / "Linf") in error.value.hint
    assert list(tmp_path.iterdir()) == []
