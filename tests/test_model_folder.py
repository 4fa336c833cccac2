"""What a person put beside a model goes with it, and stays with no other."""

from __future__ import annotations

import json
from pathlib import Path

from test_card import run_folder

from robustify import api
from robustify.model_folder import made_there, write_card


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
