"""Model cards: every figure is a report's, the hub can read them, and what a person wrote stays."""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from robustify import card
from robustify.card import BEGIN, END, render, update, write_card
from robustify.errors import UserError
from robustify.export import export
from robustify.intervals import paired_difference, percent, percent_interval
from robustify.pixels import PixelModel
from robustify.report import Report, Row
from robustify.sources.checkpoint import Checkpoint

LINF, W2 = "Linf:8/255", "W2-Linf:8/255"
RECIPE = {
    "model": {"source": "resnet10t.c3_in1k"},
    "data": {"name": "cifar10", "root": str(Path.home() / "pictures")},
    "threat": W2,
    "method": {"name": "wasserstein", "beta": 6.0},
}


def report(seed: int, share: float, **more) -> Report:
    held = {key: np.random.default_rng(seed + i).random(173) < share / (i + 1) for i, key in enumerate("cpqw")}
    keys = ["clean", f"pgd {LINF}", f"apgd-ce {LINF}", f"w-pgd {W2}"]
    verdicts = dict(zip(keys, held.values(), strict=True))

    def row(key: str, kind="pointwise", **settings) -> Row:
        attack, _, threat = key.partition(" ")
        right = int(verdicts[key].sum())
        return Row(attack, threat or None, 173, right, settings, {"forward": 21, "backward": 20}, 1.25, kind)

    rows = [
        row(keys[0], "clean"),
        row(keys[1], steps=20, restarts=2),
        row(keys[2], steps=100),
        row(keys[3], "distributional", steps=30),
    ]
    environment = {"device": "a processor", "threads": 2, "torch": "2.4", "robustify": "0.1"}
    facts = {"environment": environment, "seed": 1, **more}
    return Report("m", "cifar10 (0123456789ab)", "test", rows, verdicts, **facts)


BEFORE, AFTER = report(10, 0.9), report(20, 0.7)


def checkpoint(**more) -> Checkpoint:
    facts = {"base_id": "timm/resnet10t.c3_in1k", "license": "apache-2.0", "dataset": "imagenet", **more}
    model = PixelModel(torch.nn.Identity())
    return Checkpoint(model, facts.pop("arch", "resnet10t"), {}, 10, (3, 32, 32), **facts)


def made(**more) -> str:
    facts = {
        "name": "resnet10t-robust", "checkpoint": checkpoint(), "recipe": RECIPE, "digest": "abc123",
        "command": "robustify finetune cifar10-wasserstein -o resnet10t-robust",
        "before": BEFORE, "after": AFTER, "seconds": 61.2,
    }  # fmt: skip
    return render(**{**facts, **more})


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_every_accuracy_on_the_card_is_in_the_reports():
    text = made()
    text = text[text.index(BEGIN) :]
    shares, intervals = {"95 %"}, set()
    for source in (BEFORE, AFTER):
        for found in [*source.rows, *map(source.headline, source.threats)]:
            shares.add(percent(found.accuracy))
            intervals.add(percent_interval(found.interval))
        for key, old in BEFORE.verdicts.items():
            intervals.add(_points(old, AFTER.verdicts[key]))
    intervals.add(_points(BEFORE.held(LINF), AFTER.held(LINF)))
    on_card = set(re.findall(r"\d[\d.]* ?%", text))
    assert on_card <= shares
    assert len(on_card) > 8
    brackets = set(re.findall(r"\[[-+]?\d+\.\d+, [-+]?\d+\.\d+\]", text))
    assert brackets <= intervals
    assert len(brackets) > 11
    for row in AFTER.rows:
        assert percent(row.accuracy) in text
        assert percent_interval(row.interval) in text


def _points(old, new) -> str:
    _, low, high = paired_difference(old, new)
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def test_every_result_of_the_model_index_is_in_the_report():
    text = made()
    parsed = ModelCard(text, ignore_metadata_errors=False)  # offline: validate() would ask the hub
    results = {result.metric_name: result for result in parsed.data.eval_results}
    assert list(results) == [
        "Clean accuracy",
        "PGD accuracy (Linf, eps=8/255)",
        "APGD-CE accuracy (Linf, eps=8/255)",
        "W-PGD accuracy (W2-Linf, delta=8/255)",
        "Worst-case accuracy (Linf, eps=8/255)",
    ]
    found = [*AFTER.rows, AFTER.headline(LINF)]
    assert [result.metric_value for result in results.values()] == [round(row.accuracy, 4) for row in found]
    pgd = results["PGD accuracy (Linf, eps=8/255)"]
    assert pgd.metric_args == {"attack": "pgd", "threat": LINF, "steps": 20, "restarts": 2, "n": 173}
    assert (pgd.dataset_type, pgd.dataset_name, pgd.dataset_split) == ("uoft-cs/cifar10", "cifar10", "test")
    assert parsed.data.model_name == "resnet10t-robust"


def test_front_matter_says_what_is_known():
    known = head(made())
    assert known["library_name"] == "timm"
    assert known["pipeline_tag"] == "image-classification"
    assert known["license"] == "apache-2.0"
    assert known["base_model"] == "timm/resnet10t.c3_in1k"
    assert known["base_model_relation"] == "finetune"
    assert known["datasets"] == ["uoft-cs/cifar10"]
    assert known["metrics"] == ["accuracy"]
    assert {"adversarial-robustness", "wasserstein"} <= set(known["tags"])


@pytest.mark.parametrize("base_id", ["robustbench:cifar10/Linf/Zhang2019Theoretically", "digits", "a/b/c", "./folder"])
def test_front_matter_guesses_nothing(base_id):
    text = made(checkpoint=checkpoint(base_id=base_id, license=None))
    assert not {"license", "base_model", "base_model_relation"} & head(text).keys()
    assert "license is unknown" in text


def test_a_license_that_the_hub_does_not_know():
    known = head(made(checkpoint=checkpoint(license="My Own 1.0")))
    assert (known["license"], known["license_name"]) == ("other", "my own 1.0")


def test_what_a_reader_needs_is_there():
    text = made(class_names=["cat", "dog"], before=report(10, 0.9, notes=["Two classes only."]))
    for wanted in (
        "Linf 8/255", "W2-Linf 8/255", "not a certificate", "E[s^2] <= (8/255)^2", "n = 173", "cat, dog",
        "Two classes only.", "robustify finetune cifar10-wasserstein", "beta: 6.0", "`abc123`", f"`{AFTER.digest()}`",
        "61.2 s", "a processor", "arXiv:2502.09352", "arXiv:2306.09844", "steps=20, restarts=2", "21 / 20",
        "local-dir:resnet10t-robust",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "$" not in text[: text.index("bibtex")]
    assert not re.search(r" \n|\n\n\n", text)


def test_nobody_is_named_by_their_home_folder():
    text = made(command=f"robustify finetune --data folder:{Path.home()}/pictures")
    assert str(Path.home()) not in text
    assert "folder:~/pictures" in text
    data = dataclasses.replace(AFTER, data="folder:/somewhere/private/birds (0123456789ab)", verdicts={})
    text = made(after=data)
    assert "/somewhere" not in text
    assert head(text)["model-index"][0]["results"][0]["dataset"]["name"] == "birds"


@pytest.mark.parametrize(
    ("method", "papers"),
    [("trades", {"1901.08573"}), ("pgd-at", {"1706.06083"}), ("fast-at", {"2001.03994"}), ("standard", set())],
)
def test_each_method_cites_its_papers(method, papers):
    text = made(recipe={**RECIPE, "threat": LINF, "method": {"name": method}})
    assert set(re.findall(r"arXiv:([\d.]+\d)", text)) == papers
    assert len(re.findall(r"^@article", text, re.MULTILINE)) == len(papers)


def test_all_papers_are_there():
    for numbers in card.METHOD_PAPERS.values():
        assert all(number in card._filled("papers.bib") for number in numbers)


def test_figures_of_other_images_are_not_subtracted():
    other = dataclasses.replace(BEFORE, seed=7)
    assert re.search(r"\[[+-]\d", made())
    assert not re.search(r"\[[+-]\d", made(before=other))
    alone = Report("m", "cifar10", "test", BEFORE.rows[:1], {})
    assert "not measured" in made(before=alone)


def test_update_keeps_what_a_person_wrote():
    mine = made().replace("license: apache-2.0", "license: apache-2.0\nlanguage: en")
    mine = mine.replace("- robustify\n", "- birds\n")
    mine = mine.replace(BEGIN, f"Before.\n\n{BEGIN}").replace("# resnet10t-robust", "# changed by hand")
    mine += "\nAfter it, $5 100 %.\n"
    text = update(mine, made(seconds=99.9))
    assert "Before.\n\n<!--" in text
    assert text.endswith("\nAfter it, $5 100 %.\n")
    assert "99.9 s" in text
    assert "61.2 s" not in text
    assert "changed by hand" not in text
    assert head(text)["language"] == "en"
    assert {"birds", "robustify"} <= set(head(text)["tags"])
    assert update(text, made(seconds=99.9)) == text
    ModelCard(text, ignore_metadata_errors=False)


def test_update_of_cards_without_our_section():
    new = made()
    for old in ("# Mine\n", "---\nlicense: mit\nlanguage: de\n---\n# Mine\n", ""):
        text = update(old, new)
        assert text.count(BEGIN) == text.count(END) == 1
        assert ("# Mine" in text) == ("# Mine" in old)
        assert head(text).get("language") == ("de" if "de" in old else None)
        assert text.index(BEGIN) > text.find("# Mine")
    swapped = new.replace(BEGIN, "(later)").replace(END, BEGIN).replace("(later)", END)
    for broken in (new.replace(END, ""), new + BEGIN, swapped):
        with pytest.raises(UserError, match="once each"):
            update(broken, new)
    with pytest.raises(UserError, match="not valid YAML"):
        update("---\na: [\n---\n", new)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("folder", ["robust", "robust/model"])
def test_the_code_on_the_card_runs(tmp_path, monkeypatch, folder):
    net = timm.create_model("test_efficientnet", num_classes=10)
    model = PixelModel(net, (0.5,) * 3, (0.25,) * 3).eval()
    base = Checkpoint(model, "test_efficientnet", {}, 10, (3, 32, 32), "test_efficientnet")
    monkeypatch.chdir(tmp_path)
    export(base, base.model, folder, robustness={}, metadata={}, verify_batch=torch.rand(2, 3, 32, 32))
    facts = {"recipe": RECIPE, "digest": "abc", "command": "", "before": BEFORE, "after": AFTER, "name": "robust"}
    path = write_card(folder, checkpoint=base, **facts)
    path.write_text(path.read_text() + "\nBy hand.\n")
    assert write_card(folder, checkpoint=base, **facts).read_text().endswith("By hand.\n")
    new, old, ours = python_blocks(path.read_text())
    blocks = [old]
    if tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 15):
        blocks.append(new)
    blocks.append(ours)
    x = torch.rand(2, 3, 32, 32)
    for block in blocks:
        names = {}
        exec(block, names)
        pixels = names["model"] if block is ours else PixelModel(names["model"], (0.5,) * 3, (0.25,) * 3)
        with torch.no_grad():
            assert torch.equal(pixels(x), base.model(x))


def test_code_for_other_architectures():
    ours = made(checkpoint=checkpoint(arch="robustbench_cifar10_linf_zhang2019"))
    assert "import robustify  # registers" in python_blocks(ours)[0]
    theirs = made(checkpoint=checkpoint(arch="custom", base_id="MyNet"))
    assert "timm" not in python_blocks(theirs)[0]
    assert head(theirs)["library_name"] == "pytorch"
    for block in python_blocks(ours) + python_blocks(theirs):
        compile(block, "card", "exec")


def test_threats_in_words():
    specs = ("L2:0.5", "L1:12", "Winf-L2:0.5", "W3-L2:0.5")
    words = {spec: card._in_words(card.ThreatModel.parse(spec)) for spec in specs}
    assert "Euclidean length is at most 0.5" in words["L2:0.5"]
    assert "sum of absolute changes is at most 12," in words["L1:12"]
    assert "same as L2 0.5" in words["Winf-L2:0.5"]
    assert "E[s^3] <= (0.5)^3" in words["W3-L2:0.5"]
