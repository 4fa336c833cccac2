"""Publishing, against a stand-in for the hub: what is sent, what is not sent again, what is never shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_stand_in import Hub, running
from test_card import run_folder

from robustify.errors import UserError
from robustify.model_folder import write_card
from robustify.push import check_license, pack, push


@pytest.fixture
def hub():
    with running() as hub:
        yield hub


@pytest.fixture
def run(tmp_path) -> Path:
    run_folder(tmp_path / "robust")
    write_card(tmp_path / "robust" / "model", license="mit")
    return tmp_path / "robust"


def robustify(hub: Hub, *arguments, **environment) -> subprocess.CompletedProcess:
    """The real command in a process of its own, whose hub is the stand-in."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "robustify", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **settings, **environment}
    )


def test_what_is_published_loads_from_the_hub(hub, run, tmp_path):
    done = robustify(hub, "push", run, "me/robust")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"published: {hub.url}/me/robust\n"
    files = hub.repos["me/robust"]
    assert set(files) == {
        *("README.md", "config.json", "model.safetensors", "recipe.yaml", "report.json", "report.npz"),
        ".eval_results/robustify.yaml",
    }
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert 'timm.create_model("hf-hub:me/robust", pretrained=True)' in card
    assert "local-dir" not in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    code = (
        "import robustify, torch, sys\n"
        "there, here = (robustify.load(s).model for s in ('hf-hub:me/robust', sys.argv[1]))\n"
        "x = torch.rand(2, 3, 32, 32)\n"
        "assert torch.equal(there(x), here(x))\n"
        "from robustify import model_folder\n"
        "from robustify.cli.evaluate import recipe_of\n"
        "threats = {recipe_of(s).threat for s in ('hf-hub:me/robust', sys.argv[1])}\n"
        "assert len(threats) == 1, threats\n"
        "kept = model_folder.belongings(model_folder.made('hf-hub:me/robust'))\n"
        "assert {'recipe.yaml', 'report.json', 'report.npz'} <= kept.keys()"
    )
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env={**os.environ, **environment})


def test_an_older_models_files_go_and_what_a_person_wrote_on_the_hub_stays(hub, run):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"folder: {Path.home()}/pictures\n")
    assert robustify(hub, "push", run, "me/robust").returncode == 0
    files = hub.repos["me/robust"]
    assert str(Path.home()) not in files["recipe.yaml"].decode()
    assert "~/pictures" in files["recipe.yaml"].decode()
    files["README.md"] += b"\nWritten on the hub.\n"
    files |= {"half.json": b"{}", "model.onnx": b"old", "mine/half.json": b"mine", "notes.txt": b"mine"}
    done = robustify(hub, "push", run, "me/robust")
    assert done.returncode == 0, done.stderr
    assert files["README.md"].endswith(b"\nWritten on the hub.\n")
    assert not {"half.json", "model.onnx"} & files.keys()
    assert {"mine/half.json", "notes.txt", "model.safetensors"} <= files.keys()


def test_another_base_models_license_and_text_on_the_hub_go(hub, run):
    card = (run / "model" / "README.md").read_bytes().replace(b"`test_efficientnet`", b"`another`")
    hub.repos["me/robust"] = {"README.md": card + b"\nCite another.\n", "LICENSE": b"another's", "notes.txt": b"mine"}
    hub.private["me/robust"] = False
    done = robustify(hub, "push", run, "me/robust")
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/robust"]
    assert b"Cite another" not in files["README.md"]
    assert "LICENSE" not in files
    assert "notes.txt" in files
    files["LICENSE"] = b"the base model's"
    assert robustify(hub, "push", run, "me/robust").returncode == 0
    assert "LICENSE" in files


def test_the_license_text_beside_the_model_goes_with_it(run):
    (run / "model" / "LICENSE").write_text("the base model's terms")
    assert pack(run, "me/robust")["LICENSE"] == run / "model" / "LICENSE"


def test_an_interrupted_upload_goes_on(hub, run):
    hub.refuse = {"/commit/": 400}
    failed = robustify(hub, "push", run, "me/robust")
    assert failed.returncode == 2
    assert "goes on where it stopped" in failed.stderr
    assert hub.token not in failed.stdout + failed.stderr  # the stand-in's refusal repeats it
    assert hub.repos["me/robust"] == {}
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert len(sent) == 2
    hub.refuse, hub.requests = {}, []
    assert robustify(hub, "push", run, "me/robust").returncode == 0
    assert not [request for request in hub.requests if request.startswith("PUT")]
    assert len(hub.repos["me/robust"]) == 7


def test_a_busy_hub_is_told_once(hub, run):
    hub.busy = {"/large/": 2}
    done = robustify(hub, "push", run, "me/robust")
    assert done.returncode == 0
    assert done.stderr.count("the Hugging Face hub answers with error 503; trying again") == 1
    assert "Retrying" not in done.stderr
    assert "thrown while requesting" not in done.stderr


def test_a_dry_run_sends_nothing(hub, run):
    done = robustify(hub, "push", run, "me/robust", "--private", "--dry-run", "--json")
    value = json.loads(done.stdout)
    assert (value["sent"], value["private"], value["url"]) == (False, True, None)
    assert value["files"]["model.safetensors"] == (run / "model" / "model.safetensors").stat().st_size
    assert hub.requests == []


def test_without_a_network_it_says_so_at_once(hub, run):
    told_not_to = robustify(hub, "push", run, "me/robust", HF_HUB_OFFLINE="1")
    assert told_not_to.returncode == 2
    assert "HF_HUB_OFFLINE is set" in told_not_to.stderr
    assert hub.requests == []
    cut_off = robustify(hub, "push", run, "me/robust", HF_ENDPOINT="http://127.0.0.1:9")
    assert cut_off.returncode == 2
    assert "the Hugging Face hub cannot be reached" in cut_off.stderr
    assert "Retrying" not in cut_off.stderr


def test_private_stays_private(hub, run):
    assert robustify(hub, "push", run, "me/secret", "--private").returncode == 0
    assert hub.private["me/secret"]
    again = robustify(hub, "push", run, "me/secret", "--json")
    assert json.loads(again.stdout)["private"] is True  # as it is on the hub, whatever was asked
    hub.repos["me/open"], hub.private["me/open"] = {}, False
    refused = robustify(hub, "push", run, "me/open", "--private")
    assert refused.returncode == 2
    assert "public" in refused.stderr
    assert hub.repos["me/open"] == {}


def test_who_may_not_write_is_told_what_to_do(hub, run):
    stranger = robustify(hub, "push", run, "me/robust", HF_TOKEN="hf_another_token_of_nobody")
    assert stranger.returncode == 2
    assert "hf auth login" in stranger.stderr
    assert "hf_another" not in stranger.stdout + stranger.stderr
    assert "Traceback" not in stranger.stderr


def test_what_is_not_ready_is_refused(hub, run, tmp_path):
    with pytest.raises(UserError, match="no place on the hub"):
        pack(run, "robust")
    with pytest.raises(UserError, match="not the folder of a model"):
        pack(tmp_path, "me/robust")
    config = json.loads((run / "model" / "config.json").read_text())
    del config["pretrained_cfg"]["license"]
    (run / "model" / "config.json").write_text(json.dumps(config))
    (run / "model" / "README.md").unlink()
    with pytest.raises(UserError, match="no card"):
        pack(run, "me/robust")
    write_card(run / "model")
    with pytest.raises(UserError, match="states no license") as caught:
        check_license(pack(run, "me/robust"), run)
    assert f"robustify card {run}" in caught.value.hint
    dry = robustify(hub, "push", run, "me/robust", "--dry-run")
    assert dry.returncode == 2
    assert "model.safetensors" in dry.stdout
    assert "states no license" in dry.stderr
    with pytest.raises(UserError, match="states no license"):
        push(pack(run, "me/robust"), "me/robust")
    assert hub.requests == []
