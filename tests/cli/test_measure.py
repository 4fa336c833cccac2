"""evaluate, sensitivity and export of a finished run."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from robustify import model_folder, pointwise
from robustify.cli import evaluate
from robustify.intervals import percent
from robustify.report import Report, load_pair


def test_evaluate_takes_data_and_threat_from_the_run(robustify, finished, tmp_path):
    folder, _ = finished
    ran = robustify("evaluate", folder, "--attack", "fgsm", "--attack", "pgd:steps=2", "--n", "50", "-o", "report.json")
    assert ran.code == 0, ran.err
    table, settings = ran.out.split("\n\n")
    header, *lines = [line.split("\t") for line in table.splitlines()]
    assert header == ["attack", "threat", "accuracy", "interval", "n", "seconds"]
    assert settings.splitlines() == [
        "attack\tsettings",
        "fgsm\tloss=ce",
        "pgd\tloss=ce, steps=2, restarts=1, step_ratio=2.5",
    ]
    assert [line[:2] for line in lines] == [
        ["clean", ""],
        ["fgsm", "Linf 0.1"],
        ["pgd", "Linf 0.1"],
        ["worst case", "Linf 0.1"],
    ]
    report = Report.load(tmp_path / "report.json")
    assert report.model_id == "run"
    assert report.rows[0].n == 50
    assert report.verdicts
    assert "report: report.json" in ran.err


def test_a_run_is_known_also_with_words_behind_its_name(robustify, finished):
    """As in `runs/mine:arch=nets:make`, for a class of the user's own."""
    folder, _ = finished
    ran = robustify("evaluate", f"local-dir:{folder}:size=8", "--attack", "fgsm", "--n", "10", "--json")
    assert ran.code == 0, ran.err
    assert [row["threat"] for row in json.loads(ran.out)["rows"]] == [None, "Linf:0.1"]


def test_data_that_lies_elsewhere_is_asked_for(robustify):
    """The CIFAR-10 network's data is a folder of its maker's."""
    ran = robustify("evaluate", "cifar10-resnet2b2")
    assert (ran.code, ran.out) == (2, "")
    assert "cifar10-resnet2b2 was made on folder:cifar10_jpeg, and that is not in this folder" in ran.err
    assert "--data folder:PATH/cifar10_jpeg, or name other data of its 10 classes" in ran.err


def test_data_that_nobody_knows_is_asked_for(robustify, finished, tmp_path):
    shutil.copytree(finished[0] / "model", tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    del config["robustness"]["dataset"]
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    ran = robustify("evaluate", "mine")
    assert (ran.code, ran.out) == (2, "")
    assert "which data should mine be measured on?" in ran.err
    assert "--data folder:PATH, a folder of pictures in 10 classes" in ran.err


def test_evaluate_speaks_json(robustify, finished):
    folder, _ = finished
    ran = robustify(
        "evaluate", folder / "model", "--attack", "clean", "--data", "digits", "--split", "val", "--n", "all", "--json"
    )
    value = json.loads(ran.out)
    assert value["split"] == "val"
    assert [row["attack"] for row in value["rows"]] == ["clean"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "ten"], "--n ten is not a number of images"),
        (["--n", "100000"], "asked for 100000 images"),
        (["--split", "tset"], "unknown split 'tset'"),
        (["--attack", "pdg"], "Did you mean pgd?"),
        (["--threat", "Linf:8"], "did you mean Linf:8/255?"),
        (["--data", "digit"], "unknown data set 'digit'"),
        (["--data", "folder:nowhere"], "no folder nowhere"),
        (["--attack", "pgd:step=3"], "Did you mean steps?"),
        (["--attack", "w-pgd", "--threat", "L1:12"], "attack w-pgd does not know the norm L1"),
    ],
)
def test_evaluate_names_mistakes_before_it_loads_a_model(robustify, finished, monkeypatch, arguments, said):
    if "--split" not in arguments:
        monkeypatch.setattr("robustify.api.load", lambda *_, **__: pytest.fail("it loads the model"))
    ran = robustify("evaluate", finished[0], *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "digits", "--eps", "0.1"], "--eps: the threat says norm and radius, --threat Linf:8/255"),
        (["finetune", "quickstart", "--epsilon=0.1"], "--threat Linf:8/255"),
        (["finetune", "quickstart", "--learning-rate", "0.1"], "it is a setting of the recipe, --set train.lr=VALUE"),
        (["finetune", "quickstart", "--beta", "3"], "--set method.beta=VALUE"),
        (["evaluate", "digits", "--steps", "50"], "it is a setting of an attack, --attack pgd:steps=VALUE"),
        (["evaluate", "digits", "--attacks", "pgd"], "(Possible options: --attack, --data)"),
    ],
)
def test_an_option_of_another_name_is_known(robustify, arguments, said):
    ran = robustify(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_a_threat_that_an_attack_does_not_take_is_said(robustify):
    few = ["--n", "10", "--no-checks"]
    ran = robustify("evaluate", "digits", "--attack", "fgsm", "--attack", "w-fgsm", "--threat", "W2-Linf:0.1", *few)
    assert "fgsm: measured under Linf 0.1, not W2-Linf 0.1, for each image moves on its own" in ran.err
    assert "w-fgsm: measured" not in ran.err
    ran = robustify("evaluate", "digits", "--attack", "w-fgsm", "--threat", "Linf:0.1", *few)
    assert "w-fgsm: measured under W2-Linf 0.1, not Linf 0.1, for the budget is shared over all images" in ran.err
    ran = robustify(
        "evaluate", "digits", "--attack", "fgsm", "--attack", "w-fgsm", "--threat", "Linf:0.1", "--threat", "W2-Linf:0.1", *few
    )
    assert "measured under" not in ran.err


def test_labels_that_count_from_one_are_recognised(robustify, tmp_path):
    images = np.random.default_rng(0).random((120, 8, 8), np.float32)
    np.savez(tmp_path / "mine.npz", x=images, y=1 + np.arange(120) % 10)
    ran = robustify("evaluate", "digits", "--data", "npz:mine.npz", "--attack", "clean")
    assert ran.code == 2
    assert "the labels are 1 to 10, those of 10 classes are 0 to 9" in ran.err
    assert "give the labels minus 1" in ran.err
    ran = robustify("finetune", "--model", "digits", "--data", "npz:mine.npz")
    assert "the labels are 1 to 10, those of 10 classes are 0 to 9" in ran.err


def test_sensitivity_by_importance_agrees_with_the_whole_set(robustify, finished):
    folder, _ = finished
    arguments = ("sensitivity", folder, "--threat", "W2-Linf:0.1", "--loss", "ce", "--n", "all", "--json")
    (whole,) = json.loads(robustify(*arguments).out)["losses"]
    (few,) = json.loads(robustify(*arguments, "--importance", "100").out)["losses"]
    assert abs(few["upsilon"] - whole["upsilon"]) < 5 * few["standard_error"]
    assert few["passes_per_image"]["backward"] < 0.5
    refused = robustify("sensitivity", folder, "--importance", "50", "--deltas", "0.1")
    assert refused.code == 2
    assert "leave out --deltas" in refused.err


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


def test_estimates_at_several_radii_and_what_attacks_achieve(robustify, finished, tmp_path):
    folder, _ = finished
    threats = ["--threat", "W2-Linf:0.01", "--threat", "W2-Linf:0.03"]
    attacks = ["--attack", "w-pgd:steps=5", "--attack", "knapsack:steps=5,targets=1,restarts=1"]
    ran = robustify("evaluate", folder, *attacks, *threats, "--n", "60", "-o", "r.json", "--figure", "r.svg")
    assert ran.code == 0, ran.err
    arguments = ["sensitivity", folder, "--threat", "W2-Linf:0.01", "--n", "60", "--deltas", "0.01,0.03"]
    ran = robustify(*arguments, "--report", "r.json", "--figure", "e.png", "--json")
    assert ran.code == 0, ran.err
    (line,) = json.loads(ran.out)["losses"]
    assert (line["loss"], line["passes_per_image"]) == ("redlr", {"forward": 3, "backward": 1})
    one, two = line["estimates"]
    assert two["accuracy_lower"] <= one["accuracy_lower"] <= one["accuracy_upper"]
    assert two["expected_loss"] - one["expected_loss"] == pytest.approx(0.02 * line["upsilon"])
    assert {"r.svg", "e.png"} <= {path.name for path in tmp_path.iterdir()}
    ran = robustify(*arguments, "--n", "all")
    assert "R^l, estimate" in ran.out
    assert "the standard error is 0 because all" in ran.err
    for more, said in (
        (["--report", "r.json"], "--report is for a figure"),
        (["--deltas", "2/225x"], "cannot read the number '2/225x'"),
        (["--figure", "e.pdf"], "a picture is a .png"),
        (["--threat", "W2-L2:0.5", "--figure", "f.png", "--report", "r.json"], "no attack in L2, order 2"),
    ):
        ran = robustify(*arguments, *more)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert said in ran.err
    ran = robustify("sensitivity", "digits", *arguments[2:], "--report", "r.json", "--figure", "f.png")
    assert ran.code == 2
    assert "the report of another model, run" in ran.err


@pytest.mark.parametrize("verb", ["evaluate", "sensitivity"])
def test_too_little_memory_names_a_smaller_batch(robustify, monkeypatch, verb):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("robustify.api.evaluate", full)
    monkeypatch.setattr("robustify.gradients.gradient_norms", full)
    ran = robustify(verb, "digits", "--batch-size", "64")
    assert ran.code == 2
    assert "not enough memory for batches of 64 images" in ran.err
    assert "--batch-size 32" in ran.err


def test_export_copies_the_model_and_its_card(robustify, finished, tmp_path):
    folder, _ = finished
    ran = robustify("export", folder, "copy")
    assert ran.out == "model: copy\nnext: robustify evaluate copy\n"
    old, new = folder / "model", tmp_path / "copy"
    card = (new / "README.md").read_text()
    assert "\n# copy\n" in card
    assert '"local-dir:copy"' in card
    table = (old / "README.md").read_text().partition("## Robustness")[2].partition("## Use")[0]
    assert table in card
    for name in ("recipe.yaml", "report.json", "report.npz"):
        assert (new / name).read_bytes() == (folder / name).read_bytes()
    assert (new / "accuracy.png").read_bytes() == (old / "accuracy.png").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (old, new)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    heads = [safe_open(folder / "model.safetensors", "pt").metadata() for folder in (old, new)]
    assert heads[0] == heads[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (old, new)]
    for config in configs:  # of the file, at whose head safetensors puts its entries in any order
        del config["robustness"]["weights_sha256"]
    assert configs[0] == configs[1]
    refused = robustify("export", folder, "copy")
    assert refused.code == 2
    assert "--force" in refused.err
    assert robustify("export", folder, "copy", "--force", "--json").code == 0


def test_the_command_after_an_export_can_be_typed(robustify, finished, tmp_path):
    """Also where only the run's recipe knows where the images are, and where nobody does."""
    robustify("export", finished[0], "named")
    for k in range(10):
        (tmp_path / "birds" / f"class{k}").mkdir(parents=True)
        for i in range(8):
            Image.new("L", (8, 8), 20 * k + i).save(tmp_path / "birds" / f"class{k}" / f"{i}.png")
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {"name": f"folder:{tmp_path / 'birds'}"}}))
    following = robustify("export", run, "pictured").out.splitlines()[-1]
    assert following == f"next: robustify evaluate pictured --data folder:{tmp_path / 'birds'}"
    for line in ("next: robustify evaluate named", following):
        ran = robustify(*shlex.split(line)[2:], "--n", "8", "--attack", "clean", "--no-checks")
        assert ran.code == 0, ran.err


def test_half_precision_is_measured_and_written_down(robustify, finished, tmp_path):
    ran = robustify("export", finished[0], "half", "--half", "--format", "pt2", "--license", "mit")
    assert ran.code == 0, ran.err
    header, *lines = [line.split("\t") for line in ran.out.splitlines()]
    assert header == ["attack", "threat", "single precision", "rounded", "difference", "interval", "p"]
    assert [line[0] for line in lines[:2]] == ["clean", "pgd"]
    before, after = load_pair(tmp_path / "half" / "half.json")
    assert lines[1][2:4] == [percent(before.rows[1].accuracy), percent(after.rows[1].accuracy)]
    assert [row.attack for row in after.rows] == ["clean", "pgd"]
    card = (tmp_path / "half" / "README.md").read_text()
    section = card.partition("## Half precision")[2].partition("##")[0]
    for report in (before, after):
        assert all(percent(row.accuracy) in section for row in report.rows)
    assert "license: mit" in card
    assert json.loads((tmp_path / "half" / "config.json").read_text())["robustness"]["formats"]["pt2"]["images"] == 64
    size = [(folder / "model.safetensors").stat().st_size for folder in (finished[0] / "model", tmp_path / "half")]
    assert size[1] < 0.6 * size[0]


FEW = ["--attack", "fgsm", "--attack", "pgd:steps=2", "--n", "40", "--threat", "Linf:0.03"]


def test_an_interrupted_evaluation_goes_on(robustify, tmp_path, monkeypatch):
    whole = robustify("evaluate", "digits", *FEW, "--batch-size", "16", "-o", "whole.json")
    assert whole.code == 0, whole.err
    calls = []

    def attack(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    real = pointwise._attack
    monkeypatch.setattr(pointwise, "_attack", attack)
    ran = robustify("evaluate", "digits", *FEW, "--batch-size", "16", "-o", "report.json")
    assert ran.code == 130
    assert ran.err.splitlines()[-1].endswith("--batch-size 16 -o report.json --resume")
    assert not (tmp_path / "report.json").exists()
    refused = robustify("evaluate", "digits", *FEW, "--batch-size", "16", "-o", "report.json")
    assert refused.code == 2
    assert "--resume continues it, or remove it" in refused.err
    other = robustify("evaluate", "digits", *FEW, "--batch-size", "8", "-o", "report.json", "--resume")
    assert other.code == 2
    assert "begun with another batch_size" in other.err
    facts = tmp_path / "report.json.partial" / "evaluation.json"
    whole_facts = facts.read_text()
    for damaged in (whole_facts[:20], "[]"):
        facts.write_text(damaged)
        broken = robustify("evaluate", "digits", *FEW, "--batch-size", "16", "-o", "report.json", "--resume")
        assert (broken.code, broken.out) == (2, "")
        assert "evaluation.json is damaged" in broken.err
        assert "rm -r report.json.partial and evaluate again" in broken.err
    facts.write_text(whole_facts)
    done = len(calls)
    assert robustify("evaluate", "digits", *FEW, "--batch-size", "16", "-o", "report.json", "--resume").code == 0
    first, second = Report.load(tmp_path / "whole.json"), Report.load(tmp_path / "report.json")
    assert first.digest() == second.digest()
    assert 0 < len(calls) - done < 6
    done = len(calls)
    again = robustify("evaluate", "digits", *FEW, "--batch-size", "16", "-o", "report.json", "--resume")
    assert again.code == 0
    assert again.out.splitlines()[0].startswith("attack")
    assert "report.json was finished before" in again.err
    assert len(calls) == done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.npz", "whole.json", "whole.npz"]


def test_a_report_is_never_overwritten_unasked(robustify, tmp_path):
    assert robustify("evaluate", "digits", *FEW, "-o", "report.json").code == 0
    written = (tmp_path / "report.json").read_bytes()
    ran = robustify("evaluate", "digits", *FEW, "--seed", "1", "-o", "report.json")
    assert (ran.code, ran.out) == (2, "")
    assert "--force replaces it" in ran.err
    ran = robustify("evaluate", "digits", *FEW, "--seed", "1", "-o", "report.json", "--resume")
    assert (ran.code, ran.out) == (2, "")
    assert "begun with another" in ran.err
    assert "seed: 0 there, 1 here" in ran.err
    assert (tmp_path / "report.json").read_bytes() == written
    assert robustify("evaluate", "digits", *FEW, "--seed", "1", "-o", "report.json", "--force").code == 0
    assert Report.load(tmp_path / "report.json").seed == 1


def test_kept_images_reproduce_the_verdicts(robustify, tmp_path):
    assert robustify("evaluate", "digits", *FEW, "-o", "report.json", "--keep-adversarials").code == 0
    ran = robustify("evaluate", "digits", "--recheck", "report.json")
    assert ran.code == 0, ran.err
    header, *lines = [line.split("\t") for line in ran.out.splitlines()]
    assert header == ["attack", "threat", "n", "changed verdicts"]
    assert [(line[0], line[-1]) for line in lines] == [("clean", "0"), ("fgsm", "0"), ("pgd", "0")]
    report = Report.load(tmp_path / "report.json")
    verdicts = {**report.verdicts, "fgsm Linf:0.03": np.roll(report.verdicts["fgsm Linf:0.03"], 1)}
    dataclasses.replace(report, verdicts=verdicts).save(tmp_path / "report.json")
    ran = robustify("evaluate", "digits", "--recheck", "report.json", "--json")
    changed = json.loads(ran.out)["changed"]
    assert ran.code == 1
    assert changed["fgsm Linf:0.03"] > 0
    assert changed["pgd Linf:0.03"] == 0
    assert robustify("evaluate", "digits", "--attack", "clean", "-o", "report.json", "--force").code == 0
    assert not (tmp_path / "report.adversarials").exists()  # they were another report's
    assert robustify("evaluate", "digits", *FEW, "--seed", "1", "-o", "other.json", "--keep-adversarials").code == 0
    (tmp_path / "other.adversarials").rename(tmp_path / "report.adversarials")
    ran = robustify("evaluate", "digits", "--recheck", "report.json")
    assert (ran.code, ran.out) == (2, "")
    assert "report.adversarials are not those of the report" in ran.err
    (tmp_path / "report.npz").unlink()
    ran = robustify("evaluate", "digits", "--recheck", "report.json")
    assert ran.code == 2
    assert "verdicts of report.json are missing" in ran.err


def test_what_is_ended_before_anything_is_stored_says_so(robustify, tmp_path, monkeypatch):
    def ended(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(evaluate, "load", ended)
    ran = robustify("evaluate", "digits", *FEW, "-o", "report.json")
    assert ran.code == 143
    assert "nothing is kept yet" in ran.err
    assert "batches are kept" not in ran.err
    (tmp_path / "report.json.partial").mkdir()
    ran = robustify("evaluate", "digits", *FEW, "-o", "report.json", "--resume")
    assert "finished batches are kept" in ran.err


@pytest.mark.parametrize(("arguments", "said"), [
    (["--resume"], "--resume needs the report's file"),
    (["--keep-adversarials"], "--keep-adversarials needs the report's file"),
    (["-o", "."], "is a folder"),
    (["-o", "net.eps8"], "a report is a .json file"),
    (["--recheck", "nowhere.json"], "no report nowhere.json"),
])  # fmt: skip
def test_what_reports_need_is_said_before_anything_is_spent(robustify, finished, arguments, said):
    ran = robustify("evaluate", finished[0], *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_checks_and_notes_are_shown(robustify, finished):
    folder, _ = finished
    arguments = ["evaluate", "digits", "--attack", "screen", "--n", "20", "--json"]
    ran = robustify(*arguments, "--fast-search")
    assert json.loads(ran.out)["checks"]["images"] == 20
    assert "not AutoAttack" in ran.err
    assert "searched in bfloat16" in ran.err
    assert json.loads(robustify(*arguments, "--no-checks").out)["checks"] == {}
    assert load_pair(folder / "report.json")[1].checks["images"] == 64


def test_a_surrogate_is_one_more_attack(robustify, finished):
    folder, _ = finished
    ran = robustify("evaluate", folder, "--attack", "fgsm", "--n", "30", "--surrogate", "digits", "--json")
    assert ran.code == 0, ran.err
    rows = {row["attack"]: row for row in json.loads(ran.out)["rows"]}
    assert rows["transfer"]["settings"]["surrogate"] == "digits"
    assert rows["transfer"]["settings"]["surrogate_accuracy"] > 0.9
    accuracy = rows["clean"]["accuracy"]  # of each such image 20 steps on the surrogate, and the verdict
    assert rows["transfer"]["passes"] == {"forward": round(21 * accuracy, 3), "backward": round(20 * accuracy, 3)}


def test_compare_before_and_after(robustify, finished, tmp_path):
    folder, _ = finished
    ran = robustify("compare", folder)
    assert ran.code == 0, ran.err
    header, *lines = [line.split("\t") for line in ran.out.splitlines()]
    assert header == ["attack", "threat", "before", "after", "difference", "interval", "p"]
    assert [line[0] for line in lines] == ["clean", "fgsm", "pgd", "w-pgd", "worst case"]
    assert "a difference without an interval is of images that share one budget" in ran.err
    assert "n = 64" in ran.err


def test_where_a_recipe_says_the_data_lay_elsewhere_the_own_place_is_taken(finished, tmp_path):
    folder, _ = finished
    copied = tmp_path / "theirs"
    shutil.copytree(folder, copied)
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    recipe["data"]["root"] = str(tmp_path / "not-here")
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read = evaluate.recipe_of(f"{copied}:size=8")
    assert read is not None
    assert read.data.root is None
    assert model_folder.made(f"{copied}:size=8") == copied / "model"
    assert not (tmp_path / "not-here").exists()


def test_a_missing_interval_is_explained_by_what_is_missing(robustify, finished, tmp_path):
    folder, _ = finished
    copied = tmp_path / "bare"
    shutil.copytree(folder, copied)
    for verdicts in copied.rglob("*.npz"):
        verdicts.unlink()
    ran = robustify("compare", copied)
    assert ran.code == 0, ran.err
    assert "a difference without an interval is of a report whose verdicts, the .npz beside it, are missing" in ran.err
    ran = robustify("compare", folder, "--bars", "bars.png", "--figure", "curves.svg", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)[0]["n"] == 64
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.svg").read_bytes().startswith(b"<?xml")


def test_compare_several_reports(robustify, finished, tmp_path):
    folder, _ = finished
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name)
    ran = robustify("compare", "a", "b", "a/report.json", "--json")
    found = json.loads(ran.out)
    assert [one["after"] for one in found] == ["b", "a/report.json"]  # one name for all: told apart by their paths
    assert {line["difference"] for one in found for line in one["differences"]} == {0}
    tables = robustify("compare", "a", "b", "a/report.json").out.split("\n\n")
    assert [table.split("\t")[2:4] for table in tables] == [["a", "b"], ["a", "a/report.json"]]
    for arguments, said in (
        (["a", "nowhere.json"], "no report nowhere.json"),
        (["a", "b", "a", "--bars", "x.png"], "bars show two reports, not 3"),
        (["a", "b", "--figure", "x.pdf"], "a picture is a .png or a .svg"),
        (["a", "a/recipe.yaml"], "cannot read the report"),
    ):
        ran = robustify("compare", *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert said in ran.err


def test_a_runs_data_are_known_again_where_they_lie_now(tmp_path, monkeypatch):
    from robustify.cli.evaluate import _is_that

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert _is_that(None, "cifar10")
    assert _is_that(None, "folder:pets")
    assert not _is_that(None, "folder:/of/another/machine/pets")
    assert _is_that("folder:there/pets", "folder:/of/another/machine/pets")
    assert not _is_that("folder:there/cats", "folder:/of/another/machine/pets")
    assert not _is_that("cifar100", "cifar10")
