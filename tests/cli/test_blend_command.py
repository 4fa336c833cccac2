"""blend, and finetune --max-clean-drop."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from robustify import load
from robustify.cli import main
from robustify.evaluation import model_digest
from robustify.intervals import wilson
from robustify.report import load_pair, save_pair


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    """A run that began from the digits network, with a person's license and text, in a home folder."""
    folder = tmp_path_factory.mktemp("home") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "quickstart", "--epochs", "1", "--set", "data.limit=300", "--set", "eval.n=64",
              "--set", "eval.attacks=[clean, fgsm]", "-o", str(folder)])  # fmt: skip
    assert not stop.value.code
    (folder / "model" / "LICENSE").write_text("the terms")
    card = folder / "model" / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    before, after = load_pair(folder / "report.json")
    after.notes.append("a remark of the run")
    save_pair(folder / "report.json", before, after)
    return folder


def test_blend_measures_the_line_and_exports_the_choice(robustify, hardened, tmp_path, monkeypatch):
    folder = hardened
    monkeypatch.setenv("HOME", str(folder.parent))
    choice = ("--points", "3", "--n", "30", "--max-clean-drop", "100")
    ran = robustify("blend", "digits", folder, *choice, "-o", "blended", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert [point["alpha"] for point in found["points"]] == [0.0, 0.5, 1.0]
    assert found["chosen"] in found["points"]
    assert found["split"] == "val"
    assert (tmp_path / "blended" / "model.safetensors").is_file()
    assert found["next"] == "robustify evaluate blended"
    for point in found["points"]:
        assert point["clean_interval"] == list(wilson(30 * point["clean"], 30))
        assert point["robust_interval"] == list(wilson(30 * point["robust"], 30))
    assert "warning: only 30 held-out images choose the point" in ran.err
    assert "no more were held out when the run was trained (data.val_fraction)" in ran.err
    measured = found["measured"]  # on the test images, after the choice
    assert (measured["n"], [line["attack"] for line in measured["differences"]]) == (64, ["clean", "fgsm"])
    card = (tmp_path / "blended" / "README.md").read_text()
    alpha = found["chosen"]["alpha"]
    way = f"the weights lie {alpha:g} of the way from digits to ~/run: of 3 points the most robust on 30 held-out images"
    assert f"{way} against {found['attack']} at W2-Linf 0.1" in card
    assert "robustify blend digits ~/run --points 3" in card
    assert str(folder.parent) not in card + (tmp_path / "blended" / "report.json").read_text()
    assert "Of the run at the line's end: a remark of the run" in card
    assert card.endswith("\nBy hand.\n")
    assert (tmp_path / "blended" / "LICENSE").read_text() == "the terms"
    before, after = load_pair(tmp_path / "blended" / "report.json")
    assert (before.split, before.rows[0].n) == ("test", 64)
    assert before.rows[0].accuracy > 0.9
    assert after.facts["model"] == model_digest(load(tmp_path / "blended").model)
    recipe = (tmp_path / "blended" / "recipe.yaml").read_text()
    assert recipe.endswith((folder / "recipe.yaml").read_text())
    if alpha == 1.0:
        a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "blended", folder / "model"))
        assert all((a[name] == b[name]).all() for name in b)


def test_an_exported_folder_ends_a_line_as_its_run_does(robustify, hardened, tmp_path):
    assert robustify("export", hardened, "exported").code == 0
    ran = robustify("blend", "digits", "exported", "--points", "2", "--n", "20", "-o", "blended", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["threat"] == "W2-Linf:0.1"  # of the recipe, which went along
    before, after = load_pair(tmp_path / "blended" / "report.json")
    assert after.facts["model"] == model_digest(load(tmp_path / "blended").model)
    assert before.rows[0].n == 64
    (tmp_path / "exported" / "report.json").unlink()
    ran = robustify("blend", "digits", "exported", "--points", "2", "--n", "20", "-o", "blended", "--force")
    assert "no card: exported has no report.json" in " ".join(ran.err.split())
    (tmp_path / "exported" / "recipe.yaml").write_text("model: {source: digits}\nlayers: last\n")
    ran = robustify("blend", "digits", "exported", "--points", "2", "--n", "20")
    assert ran.code == 0, ran.err
    assert "warning: the recipe of exported is not followed:" in " ".join(ran.err.split())


def test_a_line_that_ends_at_no_run_gets_no_card(robustify, tmp_path):
    ran = robustify("blend", "digits", "digits", "--points", "2", "--n", "10", "-o", "blended")
    assert ran.code == 0, ran.err
    assert "no card: digits is neither a run's folder nor one that robustify export wrote" in " ".join(ran.err.split())
    assert "warning: the start itself is chosen: nothing of digits is in it" in " ".join(ran.err.split())
    assert not (tmp_path / "blended" / "README.md").exists()


def test_a_line_that_begins_elsewhere_than_the_run_gets_no_card(robustify, finished, tmp_path):
    folder, _ = finished  # of random weights
    ran = robustify("blend", "digits", folder, "--points", "2", "--n", "10", "-o", "blended")
    assert ran.code == 0, ran.err
    assert "the line does not begin at the network that" in " ".join(ran.err.split())
    assert (tmp_path / "blended" / "model.safetensors").is_file()
    assert not (tmp_path / "blended" / "README.md").exists()


def test_what_is_exported_is_shown_as_measured_on_the_test_images(robustify, hardened):
    ran = robustify("blend", "digits", hardened, "--points", "2", "--n", "30", "-o", "blended", "--figure", "curve.png")
    assert ran.code == 0, ran.err
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    curve, measured = ran.out.split("\n\n")
    assert curve.splitlines()[0].split("\t") == ["alpha", "clean", "knapsack at W2-Linf 0.1", ""]
    assert re.fullmatch(r"0\t[\d.]+ % \[[\d.]+, [\d.]+\]\t[\d.]+ % \[[\d.]+, [\d.]+\]\t(chosen)?", curve.splitlines()[1])
    header, clean, fgsm, *last = measured.splitlines()
    assert header.split("\t") == ["attack", "threat", "before", "after", "change in points", "n"]
    assert (clean.split("\t")[0], fgsm.split("\t")[:2]) == ("clean", ["fgsm", "Linf 0.1"])
    assert last == ["model: blended", "next: robustify evaluate blended"]
    assert "on 64 images of the test split; before: digits, after: the point chosen" in ran.err


def test_a_fraction_is_no_number_of_points(robustify, hardened, monkeypatch):
    monkeypatch.setattr("robustify.api.load", lambda *_, **__: pytest.fail("it loads the model"))
    ran = robustify("blend", "digits", hardened, "--max-clean-drop", "0.02")
    assert (ran.code, ran.out) == (2, "")
    assert "0.02 is in points of 100, and less than one image in a thousand" in ran.err
    assert "for 2 points of clean accuracy give 2" in ran.err
    ran = robustify("finetune", "quickstart", "--max-clean-drop", "0.02")
    assert ran.code == 2
    assert "train.max_clean_drop: 0.02 is in points of 100" in ran.err
    assert "give 2" in ran.err


def test_blend_tells_cheap_mistakes_before_it_loads_a_model(robustify, hardened, monkeypatch):
    monkeypatch.setattr("robustify.api.load", lambda *_, **__: pytest.fail("it loads the model"))
    for arguments, said in (
        (["--attack", "apgdce"], "Did you mean apgd-ce?"),
        (["--attack", "w-pgd", "--threat", "L1:12"], "does not know the norm L1"),
        (["--n", "few"], "--n few is not a number of images"),
        (["--data", "digit"], "unknown data set 'digit'"),
        (["--figure", "curve.pdf"], "a picture is a .png"),
    ):
        ran = robustify("blend", "digits", hardened, *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert said in ran.err


def test_blend_refuses_another_network(robustify, finished):
    folder, _ = finished
    ran = robustify("blend", "cifar10-resnet2b2", folder)
    assert ran.code == 2
    assert re.search(r"the two networks differ in \d+ of \d+ tensors", " ".join(ran.err.split()))


@pytest.mark.parametrize("drop", ["0", "100"])
def test_a_run_goes_back_until_the_clean_accuracy_is_kept(robustify, tmp_path, drop):
    ran = robustify(
        "finetune", "quickstart", "--epochs", "1", "--max-clean-drop", drop, "--set", "data.limit=200",
        "--set", "eval.n=40", "--set", "eval.attacks=[clean, fgsm]", "-o", "run",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    if (tmp_path / "run" / "blend.json").exists():  # unless the start was kept
        chosen = json.loads((tmp_path / "run" / "blend.json").read_text())
        assert chosen["clean"] >= chosen["points"][0]["clean"] - float(drop) / 100 - 1e-9
        assert any("of the way from the loaded" in note for note in report["after"]["notes"])
    else:
        assert any("start's weights" in note for note in report["after"]["notes"])
