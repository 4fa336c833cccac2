"""What a person put beside a model goes with it, and stays with no other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_card import AFTER, BEFORE, run_folder

from robustify import api, model_folder
from robustify.errors import UserError
from robustify.model_folder import made_there, write_card
from robustify.push import pack
from robustify.report import save_pair


def of(base: str, folder: Path, own: str = "") -> Path:
    """A run's folder of a model made of `base`, with a person's text and license where `own` is given."""
    run_folder(folder)
    written = json.loads((folder / "model" / "config.json").read_text())
    written["robustness"]["base_model"] = base
    (folder / "model" / "config.json").write_text(json.dumps(written))
    path = write_card(folder / "model")
    if own:
        path.write_text(f"{path.read_text()}\n{own}\n")
        (folder / "model" / "LICENSE").write_text(f"terms of {own}")
    return folder


def test_an_export_takes_its_own_text_along_and_leaves_that_of_another_base_model(tmp_path):
    one, other = of("one", tmp_path / "one", "Cite one."), of("other", tmp_path / "other")
    folder = api.export(str(one), tmp_path / "out")
    assert (folder / "README.md").read_text().endswith("\nCite one.\n")
    api.export(str(other), folder, force=True)
    assert "Cite one." not in (folder / "README.md").read_text()
    assert not (folder / "LICENSE").exists()
    api.export(str(one), folder, force=True)
    assert (folder / "README.md").read_text().endswith("\nCite one.\n")
    assert (folder / "LICENSE").read_text() == "terms of Cite one."
    plain = of("one", tmp_path / "plain")  # of the same base: what a person wrote there stays
    api.export(str(plain), folder, force=True)
    assert (folder / "README.md").read_text().endswith("\nCite one.\n")
    assert (folder / "LICENSE").exists()
    (folder / "config.json").unlink()  # as a run that begins anew leaves it: the card says whose it is
    assert made_there(folder, "one")
    assert not made_there(folder, "other")


def whole(folder: Path) -> Path:
    """A run's folder whose config.json names its report, as the pipeline writes it."""
    run_folder(folder, report=AFTER.digest())
    write_card(folder / "model", license="mit")
    return folder


def other_weights(folder: Path) -> None:
    weights = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_report(folder: Path) -> None:
    save_pair(folder / "report.json", AFTER, BEFORE)


def other_half(folder: Path) -> None:
    save_pair(folder / "half.json", AFTER, BEFORE)


@pytest.mark.parametrize("swap", [other_weights, other_report, other_half])
@pytest.mark.parametrize("layout", ["run", "export"])
def test_the_files_of_another_model_make_no_card(tmp_path, swap, layout):
    run = whole(tmp_path / "run")
    folder = run / "model" if layout == "run" else api.export(str(run), tmp_path / "exported")
    source = run if layout == "run" else folder
    swap(run if layout == "run" and swap is other_report else folder)
    with pytest.raises(UserError, match=r"(safetensors|report\.json|half\.json) is not the one that .*config\.json was"):
        write_card(folder)
    with pytest.raises(UserError, match="is not the one"):
        pack(source, "me/robust")
    with pytest.raises(UserError, match="is not the one"):
        api.export(str(source), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_export_takes_each_digest_once(tmp_path, monkeypatch):
    run = whole(tmp_path / "run")
    hashed, read = [], []
    digest, load = hashlib.file_digest, model_folder.load_pair
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    monkeypatch.setattr(model_folder, "load_pair", lambda path: read.append(path) or load(path))
    api.export(str(run), tmp_path / "exported")
    assert len(hashed) == len(set(hashed)) == 2  # the run's and the new one
    assert len(read) == len(set(read)) == 2


def test_rounded_weights_go_with_their_own_report(tmp_path):
    images = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    half = api.export(str(whole(tmp_path / "run")), tmp_path / "half", half=True, data=images)
    again = api.export(str(half), tmp_path / "again")
    assert "## Half precision" in (again / "README.md").read_text()
    (again / "half.json").unlink()
    with pytest.raises(UserError, match=r"half\.json is not the one .*: there is no such file"):
        write_card(again)


def test_an_older_folder_that_names_no_digests_goes_on(tmp_path):
    run = whole(tmp_path / "run")
    images = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    folder = api.export(str(run), tmp_path / "half", half=True, data=images)
    config = json.loads((folder / "config.json").read_text())
    for key in ("weights_sha256", "report", "half"):
        del config["robustness"][key]
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder)
    again = api.export(str(folder), tmp_path / "again")  # names them from now on
    said = json.loads((again / "config.json").read_text())["robustness"]
    assert {"weights_sha256", "half"} <= said.keys()
    write_card(again)
