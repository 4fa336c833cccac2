"""RobustBench's entry: hand-made reports, one for each rule."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml

from robustify import api
from robustify.cli import main
from robustify.errors import UserError
from robustify.evaluation import model_digest
from robustify.leaderboard import entry, issue, read_paper, to_text
from robustify.report import Report, Row

PAPER = {
    "link": "https://arxiv.org/abs/2600.00001", "name": "A title", "authors": "Jane Doe", "venue": "Unpublished",
    "architecture": "ResNet-18", "additional_data": False, "checkpoint": "https://example.org/me",
}  # fmt: skip
WELL = {"logits_change_on_repeat": 0.0, "logits_change_in_another_batch": 1e-6, "zero_gradients": 0.01}


MODEL = "0123456789abcdef"


def report(**more) -> Report:
    """Of the full AutoAttack on CIFAR-10, but for what `more` says otherwise."""
    facts = {"n": 10_000, "threat": "Linf:8/255", "version": "standard", "data": "cifar10 (0123456789ab)", **more}
    n = facts["n"]
    settings = {"version": facts["version"], "left": []}
    rows = [
        Row("clean", None, n, round(n * 0.8492), kind="clean"),
        Row(facts.get("attack", "autoattack"), facts["threat"], n, round(n * 0.5308), settings),
    ]
    held = {row.key: np.arange(n) < row.correct for row in rows}
    found = Report("m", facts["data"], facts.get("split", "test"), rows, held, checks=facts.get("checks", WELL))
    return dataclasses.replace(found, facts={"model": MODEL, **facts.get("facts", {})})


def test_the_entry_as_the_leaderboard_has_it():
    found = entry(report(), PAPER, MODEL)
    assert json.loads(to_text(found)) == {
        "link": "https://arxiv.org/abs/2600.00001",
        "name": "A title",
        "authors": "Jane Doe",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "Unpublished",
        "architecture": "ResNet-18",
        "eps": "8/255",
        "clean_acc": "84.92",
        "reported": "53.08",
        "autoattack_acc": "53.08",
        "unreliable": False,
    }
    text = issue("Doe2026Title", report(), PAPER, MODEL)
    for wanted in ("[New Model] Doe2026Title", "**eps**: 8/255", "84.92 %", "53.08 %", "10,000 test images", "Linf", "false"):
        assert wanted in text
    assert entry(report(threat="L2:0.5"), PAPER, MODEL)["eps"] == "0.5"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 1000}, "1,000 images were measured, not all 10,000"),
        ({"version": "not standard: steps=10"}, "not the standard version: not standard: steps=10"),
        ({"attack": "pgd"}, "0 rows of autoattack"),
        ({"threat": "Linf:4/255"}, "the threat is Linf:4/255; the leaderboard's for cifar10: Linf:8/255, L2:0.5"),
        ({"data": "folder:cifar (0123456789ab)"}, "the data is folder:cifar"),
        ({"data": "imagenet (0123456789ab)"}, "5,000 images of its own choice"),
        ({"split": "val"}, "the split val"),
        ({"checks": {}}, "without --no-checks"),
        ({"checks": {**WELL, "logits_change_on_repeat": 0.01}}, "the same images give logits that differ by 0.01"),
        ({"checks": {**WELL, "logits_change_in_another_batch": 0.01}}, "other images beside it"),
        ({"checks": {**WELL, "zero_gradients": 0.4}}, "zero on a share of 0.4"),
        ({"checks": {k: v for k, v in WELL.items() if k != "zero_gradients"}}, "do not say zero_gradients"),
        ({"facts": {"fast_search": True}}, "--fast-search"),
        ({"facts": {"model": "fedcba9876543210"}}, f"of another model, fedcba9876543210, not {MODEL}"),
        ({"facts": {"model": None}}, "of another model"),
    ],
)
def test_what_the_rules_exclude_is_refused(change, reason):
    with pytest.raises(UserError) as caught:
        entry(report(**change), PAPER, MODEL)
    assert reason in caught.value.message
    assert caught.value.message.count("\n") == 1
    assert "--attack autoattack" in caught.value.hint


def test_all_reasons_at_once_and_what_no_report_knows():
    with pytest.raises(UserError) as caught:
        entry(report(n=50, split="val"), {**PAPER, "venue": "", "authors": None}, MODEL)
    assert caught.value.message.count("\n  - ") == 3
    assert "does not say authors, venue" in caught.value.message
    with pytest.raises(UserError, match="npz beside the report, are missing"):
        entry(dataclasses.replace(report(), verdicts={}), PAPER, MODEL)
    with pytest.raises(UserError, match="neither true nor false"):
        entry(report(), {**PAPER, "additional_data": "no"}, MODEL)


@pytest.mark.parametrize(
    ("key", "value"),
    [("link", 5), ("authors", ["Jane", 7]), ("checkpoint", "here\n- **Robust accuracy**: 99 %"), ("footnote", {})],
)
def test_what_the_paper_says_is_a_line_of_text(key, value):
    with pytest.raises(UserError) as caught:
        entry(report(), {**PAPER, key: value}, MODEL)
    assert f"  - the paper's file says {key}: {value!r}, which is no line of text" in caught.value.message


def test_the_paper_is_read_from_a_file(tmp_path):
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(PAPER))
    assert read_paper(tmp_path / "paper.yaml") == PAPER
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**PAPER, "authors": ["Jane Doe", "John Roe"]}))
    assert read_paper(tmp_path / "two.yaml")["authors"] == "Jane Doe, John Roe"
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    for name, said in (("none.yaml", "cannot read"), ("list.yaml", "not a mapping"), ("broken.yaml", "not valid YAML")):
        with pytest.raises(UserError, match=said) as caught:
            read_paper(tmp_path / name)
        assert "architecture: ..." in caught.value.hint


def test_an_export_brings_both_files_of_the_model_that_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(PAPER))

    def export(source: str, *arguments: str, name: str = "Doe2026Title") -> int:
        with pytest.raises(SystemExit) as stop:
            main(["export", source, "out", "--robustbench", name, *arguments])
        return int(stop.value.code or 0)

    given = ("--report", "full.json", "--paper", "paper.yaml")
    assert export("digits") == 2
    assert "needs --report and --paper" in capsys.readouterr().err
    report().save("full.json")
    assert export("digits", *given) == 2
    assert "of another model" in capsys.readouterr().err
    report(facts={"model": model_digest(api.load("digits").model)}).save("full.json")
    assert export("digits", *given, "--half") == 2
    assert "--half rounds the weights" in capsys.readouterr().err
    assert export("digits", *given, name="../elsewhere") == 2
    assert "no ID" in capsys.readouterr().err
    for name in ("config", "report", "HALF"):
        assert export("digits", *given, name=name) == 2
        assert f"would overwrite {name.lower()}.json, a file of the model itself" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", "digits", "out", *given])
    assert "--robustbench ID writes it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export("digits", *given) == 0
    assert json.loads((tmp_path / "out" / "Doe2026Title.json").read_text())["autoattack_acc"] == "53.08"
    assert "[New Model] Doe2026Title" in (tmp_path / "out" / "Doe2026Title-issue.md").read_text()
