"""Files of the hub, against its stand-in: asked for once, of one commit, and no waiting where there is no network."""
from __future__ import annotations

import errno
import hashlib
import json
import os
import time

import huggingface_hub
import pytest
import torch
from hub_stand_in import COMMIT, running
from source_folders import write_folder

from robustify import model_folder, registry, sources
from robustify.errors import UserError
from robustify.sources import hub as files

CFG = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, with the digits network as me/net; the cache is empty."""
    folder = write_folder(tmp_path / "net", registry.DIGITS, 10, CFG, robustness={"base_model": "digits"})
    with running() as hub:
        hub.repos["me/net"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.private["me/net"] = False
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield hub


def test_a_file_that_the_folder_has_not_is_asked_for_once(hub):
    folder = model_folder.made("hf-hub:me/net")
    sources.load("hf-hub:me/net")
    assert any("recipe.yaml" in request for request in hub.requests)
    hub.requests.clear()
    assert model_folder.made("hf-hub:me/net") == folder
    again = sources.load("hf-hub:me/net")
    assert again.model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert files.optional_file("me/net", "LICENSE") is None
    with pytest.raises(UserError, match="me/net has no LICENSE"):
        files.file("me/net", "LICENSE")
    assert hub.requests == []


def test_the_weights_are_of_the_descriptions_commit(hub):
    """A folder that has moved on since its config.json was fetched would give weights of another network."""
    sources.load("hf-hub:me/net")
    assert f"GET /me/net/resolve/{COMMIT}/model.safetensors" in hub.requests
    config = json.loads(files.file("me/net", "config.json").read_text())
    assert config["architecture"] == registry.DIGITS


def test_weights_that_are_not_what_the_hub_sent_are_refused(hub):
    path = files.weight_file("me/net")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # as long as before, and a weight like any other
    path.resolve().write_bytes(content)
    os.utime(path, ns=(0, 0))  # a clock that ticks slowly could give it the time that it had
    with pytest.raises(UserError, match=r"model.safetensors of me/net@0123\w+ is damaged: its SHA-256 is \w{12}") as error:
        sources.load("hf-hub:me/net")
    assert f"hf download me/net model.safetensors --revision {COMMIT} --force-download" in error.value.hint


def test_weights_are_compared_with_what_the_hub_sent_once(hub, monkeypatch):
    taken = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: taken.append(file.name) or digest(file, name))
    for _ in range(3):
        path = files.weight_file("me/net")
    assert taken == [str(path.resolve())]


def test_random_weights_are_no_remedy_for_a_missing_description(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, remedy in (("config.json", False), ("model.safetensors", True)):
        with pytest.raises(UserError, match=f"{name} of me/net is not on this machine") as error:
            files.file("me/net", name)
        assert ("pretrained=False" in error.value.hint) == remedy


def test_weights_in_several_files_are_fetched_together(hub):
    whole = hub.repos["me/net"].pop("model.safetensors")
    part = "model-00001-of-00001.safetensors"
    hub.repos["me/net"] |= {part: whole, "model.safetensors.index.json": json.dumps({"weight_map": {"all": part}}).encode()}
    assert sources.load("hf-hub:me/net").model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert f"GET /me/net/resolve/{COMMIT}/{part}" in hub.requests


def test_a_full_disk_under_the_cache_is_called_so(hub, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(UserError, match=r"the disk of \S+ is full: [\d,]+ are free") as error:
        sources.load("hf-hub:me/net")
    assert "HF_HOME=FOLDER" in error.value.hint


def test_without_a_network_the_answer_comes_at_once(hub, monkeypatch):
    sources.load("hf-hub:me/net")
    files.reach.cache_clear()  # what another process would know
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        here = getattr(huggingface_hub.constants, name)
        monkeypatch.setattr(huggingface_hub.constants, name, here.replace(hub.url, "http://127.0.0.1:9"))
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    sources.load("hf-hub:me/net")  # it is here
    with pytest.raises(UserError, match="me/other is not on this machine, and the Hugging Face hub cannot be reached") as error:
        sources.load("hf-hub:me/other")
    assert "HF_HUB_OFFLINE=1" in error.value.hint
    assert "hf download me/other" in error.value.hint
    assert waited == []
