"""blend, and finetune --max-clean-drop."""

from __future__ import annotations

import json
import re

import pytest
from safetensors.torch import load_file

from robustify import load
from robustify.cli import main
from robustify.evaluation import model_digest
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
