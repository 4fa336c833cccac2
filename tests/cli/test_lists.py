"""ls, show, copy, env: no model is loaded."""

from __future__ import annotations

import json

import pytest
import yaml

from robustify import shelf
from robustify.attacks import ATTACKS
from robustify.cli.ls import DATA
from robustify.data import READERS
from robustify.methods import METHODS


def test_recipes_can_be_listed_shown_and_copied(robustify, tmp_path):
    for line in json.loads(robustify("ls", "recipes", "--json").out):
        text = shelf.text(line["name"])
        assert line["method"] in METHODS
        assert robustify("show", line["name"]).out.rstrip("\n") == text.rstrip("\n")
    ran = robustify("copy", "quickstart", "mine.yaml")
    assert ran.out == "next: robustify finetune mine.yaml\n"
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text()) == yaml.safe_load(shelf.text("quickstart"))
    assert robustify("show", "mine.yaml").code == 0


def test_copy_overwrites_nothing(robustify, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: mine\n")
    ran = robustify("copy", "quickstart", "mine.yaml")
    assert (ran.code, ran.err) == (2, "error: mine.yaml exists\nhint: --force replaces it\n")
    assert (tmp_path / "mine.yaml").read_text() == "model: mine\n"
    assert robustify("copy", "quickstart", "mine.yaml", "--force").code == 0
    assert robustify("copy", "quickstart", tmp_path).out.strip().endswith("quickstart.yaml")
    assert robustify("copy", "quickstart", "mine.txt").code == 2


def test_methods_attacks_and_data_are_all_there(robustify):
    assert [line["name"] for line in json.loads(robustify("ls", "methods", "--json").out)] == list(METHODS)
    assert [line["name"] for line in json.loads(robustify("ls", "attacks", "--json").out)] == list(ATTACKS)
    assert [name.split(":")[0] for name in DATA] == list(READERS)
    assert "steps=20" in robustify("ls", "attacks", "pgd").out
    assert "\tthreats=Linf:8/255 L2:0.5 L1:12,train_on=extremes," in robustify("ls", "methods", "multi-norm").out
    ran = robustify("ls", "methods", "wasserstein")
    assert ran.out.rstrip().endswith("inner_loss=kl,adversary=budget")
    (line,) = json.loads(robustify("ls", "methods", "multi-norm", "--json").out)
    assert line["settings"]["threats"] == ["Linf:8/255", "L2:0.5", "L1:12"]


def test_models_are_filtered(robustify, tmp_path):
    header, *lines = robustify("ls", "models", "zhang2019", "--dataset", "cifar10", "--threat", "Linf").out.splitlines()
    assert header.split("\t")[:4] == ["name", "data", "threat", "architecture"]
    assert {line.split("\t")[0] for line in lines} == {"Zhang2019Theoretically", "Zhang2019You"}
    assert all(line.endswith("\tno") for line in lines)
    assert robustify("ls", "models", "zhang2019", "--threat", "linf").out.splitlines()[1:] == lines
    header, line = robustify("ls", "models", "Bai2024", "--dataset", "CIFAR100").out.splitlines()
    assert header.endswith("\trefused")
    assert line.endswith("passes no gradient")
    ran = robustify("ls", "models", "--threat", "Lin")
    assert ran.code == 2
    assert "threat 'Lin'. Did you mean Linf?" in ran.err
    assert "there are: cifar10, digits, cifar100, imagenet" in robustify("ls", "models", "--dataset", "mnist").err
    (tmp_path / "Zhang2019You.pt").write_bytes(b"weights")
    found = json.loads(robustify("ls", "models", "Zhang2019You", "--models-dir", tmp_path, "--json").out)
    assert found[0]["file_here"]
    assert found[0]["published_robust"] == 44.83
    assert found[0]["parameters"] == 48_262_586


def test_nothing_found_says_how_to_see_all(robustify):
    ran = robustify("ls", "models", "zzz")
    assert (ran.code, ran.out) == (2, "")
    assert "robustify ls models lists all" in ran.err


def test_env_says_what_a_figure_depends_on(robustify, monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTIFY_MODELS_DIR", str(tmp_path))
    monkeypatch.setattr("robustify.sources.robustbench.unlisted", list)
    found = json.loads(robustify("env", "--json").out)
    assert found["models folder"] == str(tmp_path)
    assert found["robustbench imports"] == "yes"
    assert found["torch"][0].isdigit()
    assert "threads\t" in robustify("env").out


@pytest.mark.parametrize("verb", ["show", "finetune"])
def test_a_missing_recipe_file_is_named(robustify, verb):
    ran = robustify(verb, "nowhere/mine.yaml")
    assert ran.code == 2
    assert "no recipe file nowhere/mine.yaml" in ran.err


def test_a_name_that_is_none_is_told_of_those_that_are(robustify):
    ran = robustify("copy", "several-machine", "x.yaml")
    assert "no recipe 'several-machine'. Did you mean several-machines?" in ran.err
    ran = robustify("show", "several-machine")
    assert ran.code == 2
    assert "--model" not in ran.err
