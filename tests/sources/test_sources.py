"""The grammar of `source`, the list of names, and what importing costs."""
from __future__ import annotations

import subprocess
import sys

import pytest

from robustify import sources
from robustify.errors import UserError
from robustify.sources import published


def chosen(name, dataset=None, threat=None):
    return sources.load(name, dataset=dataset, threat=threat, pretrained=False).base_id


@pytest.mark.parametrize(("name", "dataset", "threat", "want"), [
    ("Zhang2019", None, None, "cifar10/Linf/Zhang2019Theoretically"),
    ("robustbench:Sehwag2021Proxy_R18", None, "L2", "cifar10/L2/Sehwag2021Proxy_R18"),
    ("robustbench:cifar10/L2/Sehwag2021Proxy_R18", None, None, "cifar10/L2/Sehwag2021Proxy_R18"),
    ("Rebuffi2021Fixing_R18_ddpm", "cifar100", None, "cifar100/Linf/Rebuffi2021Fixing_R18_ddpm"),
    ("Salman2020Do_R18", None, None, "imagenet/Linf/Salman2020Do_R18"),
    ("Kireev2021Effectiveness_RLATAugMixN", None, None, "cifar10/corruptions/Kireev2021Effectiveness_RLATAugMixNoJSD"),
    ("Addepalli2022Efficient_RN", "cifar100", "Linf", "cifar100/Linf/Addepalli2022Efficient_RN18"),
])
def test_robustbench_names(name, dataset, threat, want):
    assert chosen(name, dataset, threat) == f"robustbench:{want}"


@pytest.mark.parametrize(("name", "dataset", "threat", "said"), [
    ("Rebuffi2021", None, None, "can mean 8 RobustBench models"),
    ("Zhang2020", None, None, "Zhang2020Attacks, Zhang2020Geometry"),
    ("Salman2020Do_R18", "cifar10", None, "not published for cifar10"),
    ("Erichson2022NoisyMix", "cifar100", None, "it exists for imagenet corruptions"),
    ("Zhang2019Theoreticaly", None, None, "Did you mean Zhang2019Theoretically"),
    ("resnet5O", None, None, "Did you mean resnet50"),
    ("robustbench:nobody", "cifar10", "L2", "no model is called 'nobody' for cifar10 L2"),
    ("runs/nothing", None, None, "there is no folder runs/nothing"),
    ("hub:someone/net", None, None, "hf-hub:someone/net"),
])
def test_refused_names(name, dataset, threat, said):
    with pytest.raises(UserError, match=said):
        chosen(name, dataset, threat)


def test_digits(monkeypatch, digits_folder):
    monkeypatch.setattr(sources, "embedded", lambda: {"digits": digits_folder})
    assert sources.load("digits").base_id == "digits"


def test_a_folder_goes_before_a_name(monkeypatch, digits_folder):
    digits_folder.rename(digits_folder.parent / "resnet18")
    monkeypatch.chdir(digits_folder.parent)
    assert sources.load("resnet18").arch == "robustify_digits_cnn"


def test_an_entry_that_our_list_lacks(monkeypatch):
    rows = [r for r in published.rows() if r["id"] != "Sehwag2021Proxy_R18"]
    monkeypatch.setattr(published, "rows", lambda: rows)
    assert sources.load("Sehwag2021Proxy_R18", threat="Linf", pretrained=False).published is None


def test_names(tmp_path):
    every = sources.names()
    assert [info.id for info in every[:2]] == ["cifar10-resnet2b2", "digits"]  # those that come with robustify
    assert len(every) == 208
    best = sources.names("R18", dataset="cifar10", threat="Linf")
    assert [info.robust_acc for info in best] == sorted((info.robust_acc for info in best), reverse=True)
    assert all((info.dataset, info.threat) == ("cifar10", "Linf") and "R18" in info.id for info in best)
    trades, = sources.names("zhang2019theo")
    assert (trades.clean_acc, trades.robust_acc, trades.additional_data, trades.file) == (84.92, 53.08, False, None)
    path = tmp_path / "cifar10" / "Linf" / "Zhang2019Theoretically.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    assert sources.names("zhang2019theo", models_dir=tmp_path)[0].file == path
    assert sources.names("timm:test_vit.r160")[0].id == "timm:test_vit.r160_in1k"
    assert sources.names("nothing like this") == []


def test_addresses_are_no_names():
    for source, said in (
        ("https://huggingface.co/timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
        ("https://huggingface.co/gpt2", "hf-hub:gpt2"),
        ("https://huggingface.co/timm/resnet18.a1_in1k/tree/main", "hf-hub:timm/resnet18.a1_in1k"),
        ("https://huggingface.co", "fetch the file"),
        ("https://example.org/weights.pt", "fetch the file"),
        ("", "robustify ls models"),
    ):
        with pytest.raises(UserError) as error:
            sources.load(source)
        assert said in error.value.hint


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from robustify import registry, sources; registry.install(); sources.names('Rade');"
        "bad = {'timm', 'robustbench', 'torchvision', 'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
