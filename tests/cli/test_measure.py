"""evaluate, sensitivity and export of a finished run."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from robustify.report import Report


def test_evaluate_takes_data_and_threat_from_the_run(robustify, finished, tmp_path):
    folder, _ = finished
    ran = robustify("evaluate", folder, "--attack", "fgsm", "--attack", "pgd:steps=2", "--n", "50", "-o", "report.json")
    assert ran.code == 0, ran.err
    header, *lines = [line.split("\t") for line in ran.out.splitlines()]
    assert header == ["attack", "threat", "accuracy", "interval", "n", "seconds"]
    assert [line[:2] for line in lines] == [
        ["clean", ""], ["fgsm", "Linf 0.1"], ["pgd", "Linf 0.1"], ["worst case", "Linf 0.1"],
    ]
    report = Report.load(tmp_path / "report.json")
    assert report.model_id == "run"
    assert report.rows[0].n == 50
    assert report.verdicts
    assert "report: report.json" in ran.err


def test_evaluate_speaks_json(robustify, finished):
    folder, _ = finished
    ran = robustify(
        "evaluate", folder / "model", "--attack", "clean", "--data", "digits", "--split", "val", "--n", "all", "--json"
    )
    value = json.loads(ran.out)
    assert value["split"] == "val"
    assert [row["attack"] for row in value["rows"]] == ["clean"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--n", "ten"], "--n ten is not a number of images"),
    (["--n", "100000"], "asked for 100000 images"),
    (["--split", "tset"], "unknown split 'tset'"),
    (["--attack", "pdg"], "Did you mean pgd?"),
    (["--threat", "Linf:8"], "did you mean Linf:8/255?"),
    (["--data", "digit"], "unknown data set 'digit'"),
])
def test_evaluate_names_mistakes(robustify, finished, arguments, said):
    ran = robustify("evaluate", finished[0], *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_sensitivity_of_all_losses(robustify, finished):
    folder, _ = finished
    value = json.loads(robustify("sensitivity", folder, "--threat", "L2:0.5", "--n", "100", "--json").out)
    assert value["threat"] == "W2-L2:0.5"
    assert [line["loss"] for line in value["losses"]] == ["ce", "dlr", "redlr"]
    for line in value["losses"]:
        assert line["upsilon"] > 0
        assert line["standard_error"] > 0
        assert line["loss_rise"] == pytest.approx(0.5 * line["upsilon"])
    ran = robustify("sensitivity", folder, "--loss", "ce", "--n", "50")
    assert ran.out.splitlines()[0].split("\t")[:3] == ["loss", "Upsilon", "standard error"]
    assert "never a certificate" in ran.err or "not certified" in ran.err
    assert robustify("sensitivity", folder, "--loss", "hinge").code == 2


def test_export_copies_the_model_and_its_card(robustify, finished, tmp_path):
    folder, _ = finished
    ran = robustify("export", folder, "copy")
    assert ran.out == "model: copy\nnext: robustify evaluate copy\n"
    old, new = folder / "model", tmp_path / "copy"
    assert (new / "README.md").read_bytes() == (old / "README.md").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (old, new)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    heads = [safe_open(folder / "model.safetensors", "pt").metadata() for folder in (old, new)]
    assert heads[0] == heads[1]
    assert json.loads((new / "config.json").read_text()) == json.loads((old / "config.json").read_text())
    refused = robustify("export", folder, "copy")
    assert refused.code == 2
    assert "--force" in refused.err
    assert robustify("export", folder, "copy", "--force", "--json").code == 0
