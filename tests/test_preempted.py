"""SIGTERM at every place of a training: nothing is lost, and what goes on ends bit for bit where it would have ended."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import typer
from helpers import tiny_net, toy_data

from robustify import checkpoints, layers, pipeline
from robustify import train as loop
from robustify.cli.ends import explained
from robustify.data import from_tensors
from robustify.distributed import make_accelerator
from robustify.errors import UserError
from robustify.events import StepEnd
from robustify.faults import Preempted, sigterm_noted
from robustify.methods import Wasserstein
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.resolve import resolve
from robustify.sources import weights
from robustify.step import prepare
from robustify.threat import ThreatModel


def run(folder, resume=None):
    """Two epochs of three steps, Upsilon measured on 96 images before every second. Returns the weights and the steps made."""
    model = PixelModel(tiny_net())
    layers.select(model.net, "full", [])
    method = Wasserstein(steps=1, adversary={"name": "budget", "upsilon": "every", "every": 2, "images": None})
    settings = TrainSettings(epochs=2, batch_size=32, lr=0.05, probe_images=32, keep="last")
    setup = prepare(model, method, ThreatModel.parse("W2-Linf:8/255"), settings, make_accelerator(), "none", 96)
    data = from_tensors(toy_data(96), toy_data(64, seed=1), toy_data(64, seed=2))
    made = []
    with sigterm_noted() as termination:
        events = loop.train(setup, data, folder, resume=resume, eval_batch=16, termination=termination)
        loop.follow(events, lambda event: made.append(event.step) if isinstance(event, StepEnd) else None)
    return {name: value.clone() for name, value in model.state_dict().items()}, made


def terminated_in(monkeypatch, name, call):
    """Have SIGTERM come when the loop calls its function `name` for that time, before it does its work."""
    real, calls = getattr(loop, name), iter(range(1, 1000))

    def function(*arguments, **more):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **more)

    monkeypatch.setattr(loop, name, function)


@pytest.mark.parametrize(
    ("name", "call", "saved"),
    [
        ("accuracies", 2, 3),  # after the first epoch, whose steps are not made again
        ("accuracies", 3, 6),
        ("gradient_norms", 1, 0),  # Upsilon, before the first step
        ("gradient_norms", 2, 2),  # in mid-epoch
        ("take_step", 2, 2),
        ("take_step", 3, 3),  # the last one of an epoch
        ("_save_best", 2, 3),
    ],
)
def test_nothing_is_lost(tmp_path, monkeypatch, name, call, saved):
    whole, _ = run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    folder = tmp_path / "ended"
    folder.mkdir()
    with monkeypatch.context() as patch:
        terminated_in(patch, name, call)
        with pytest.raises(Preempted, match=f"^ended by SIGTERM; the state after step {saved} is saved$"):
            run(folder)
    at = checkpoints.latest(folder / "checkpoints")
    assert at.name == f"step-{saved:08d}.pt"
    ended, made = run(folder, at)
    assert made == list(range(saved + 1, 7))
    assert all(torch.equal(ended[key], value) for key, value in whole.items())
    assert [json.loads(line) for line in (folder / "metrics.jsonl").open()] == lines


def test_before_the_first_step_nothing_is_saved(tmp_path, monkeypatch):
    terminated_in(monkeypatch, "accuracies", 1)
    with pytest.raises(Preempted, match="nothing is saved yet"):
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_no_handler_takes_it_for_a_damaged_file(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.pt")
    monkeypatch.setattr(torch, "load", lambda *given, **more: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(typer.Exit) as ended, explained("", lambda: ""), sigterm_noted():
        weights.read(tmp_path / "net.pt")
    assert ended.value.exit_code == 143


def test_a_checkpoint_without_the_epochs_that_are_over_is_refused(tmp_path):
    run(tmp_path)
    at = checkpoints.latest(tmp_path / "checkpoints")
    state = torch.load(at, weights_only=True)
    del state["parts"]["loop"]["epoch"]
    torch.save(state, at)
    with pytest.raises(UserError, match=r"cannot resume from .* older robustify") as error:
        run(tmp_path, at)
    assert "--resume never" in error.value.hint


def test_what_an_earlier_run_saved_is_said_while_a_resumed_one_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "open_run", lambda *given: tmp_path / "checkpoints/step-00000004.pt")
    monkeypatch.setattr(pipeline, "load_inputs", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="the state after step 4 is saved"):
        pipeline.finetune(resolve("quickstart", {}, []).recipe, tmp_path)


def hardened(**more):
    data = from_tensors(toy_data(96), toy_data(64, seed=1), toy_data(64, seed=2))
    settings = {"method": "fast-at", "threat": "Linf:8/255", "epochs": 1, "batch_size": 32, "probe_images": 16}
    return pipeline.harden(tiny_net(), data, verify=False, attacks=["clean"], **settings, **more)


def test_without_a_run_folder_nothing_is_called_saved():
    def listener(event):
        if isinstance(event, StepEnd):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match=r"^ended by SIGTERM; nothing is kept without a run folder"):
        hardened(listener=listener)


def test_a_run_whose_model_is_written_ends_well(tmp_path, monkeypatch):
    real = pipeline.clear_state

    def clear_state(folder):
        if (folder / "model").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        real(folder)

    monkeypatch.setattr(pipeline, "clear_state", clear_state)
    hardened(out=tmp_path / "run", listener=lambda event: None)
    assert (tmp_path / "run/model/config.json").exists()
    assert not (tmp_path / "run/checkpoints").exists()
