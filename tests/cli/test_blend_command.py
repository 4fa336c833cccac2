"""blend, and finetune --max-clean-drop."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from robustify import load
from robustify.evaluation import model_digest
from robustify.report import load_pair


def test_blend_measures_the_line_and_exports_the_choice(robustify, finished, tmp_path):
    folder, _ = finished
    choice = ("--points", "3", "--n", "30", "--max-clean-drop", "100")
    ran = robustify("blend", "digits", folder, *choice, "-o", "blended", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert [point["alpha"] for point in found["points"]] == [0.0, 0.5, 1.0]
    assert found["chosen"] in found["points"]
    assert found["split"] == "val"
    assert (tmp_path / "blended" / "model.safetensors").is_file()
    assert found["next"] == "robustify evaluate blended"
    card = (tmp_path / "blended" / "README.md").read_text()
    alpha = found["chosen"]["alpha"]
    assert f"the weights lie {alpha:g} of the way from digits to {folder}: of 3 points the most robust on 30 held-out" in card
    assert f"robustify blend digits {folder} --points 3" in card
    before, after = load_pair(tmp_path / "blended" / "report.json")
    assert (before.split, before.rows[0].n) == ("test", 64)
    assert before.rows[0].accuracy > 0.9  # of the start, not of the random weights that the run began with
    assert after.facts["model"] == model_digest(load(tmp_path / "blended").model)
    recipe = (tmp_path / "blended" / "recipe.yaml").read_text()
    assert recipe.endswith((folder / "recipe.yaml").read_text())
    if found["chosen"]["alpha"] == 1.0:
        a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "blended", folder / "model"))
        assert all((a[name] == b[name]).all() for name in b)


def test_a_line_that_ends_at_no_run_gets_no_card(robustify, tmp_path):
    ran = robustify("blend", "digits", "digits", "--points", "2", "--n", "10", "-o", "blended")
    assert ran.code == 0, ran.err
    assert "no card: digits is not a run's folder" in ran.err
    assert not (tmp_path / "blended" / "README.md").exists()


def test_blend_refuses_another_network(robustify, finished):
    folder, _ = finished
    ran = robustify("blend", "timm:resnet18.untrained", folder)
    assert ran.code == 2
    assert "Traceback" not in ran.err


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
