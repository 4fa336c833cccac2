"""Training that is stopped and goes on, on this process's share; started by test_resume.py, which also imports it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import tiny_net, toy_data

from robustify import checkpoints, layers
from robustify.data import from_tensors
from robustify.distributed import make_accelerator
from robustify.events import Note, StepEnd
from robustify.faults import Preempted, Termination
from robustify.methods import FreeAt, Wasserstein
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import follow, train

STOP = 5  # in the middle of the second epoch of four steps


class Delayed(Wasserstein):
    """Every process's attack takes a while, the last one's six times as long."""

    def perturb(self, nets, x, y, threat, draws, tracker):
        time.sleep(0.6 if int(os.environ["RANK"]) else 0.1)
        return super().perturb(nets, x, y, threat, draws, tracker)


def run(out: Path, stop: int = 0, resume: bool = False, free: bool = False, slow: bool = False, **settings):
    """Train two epochs in fp64, from the start or the last checkpoint, to the end or to the step `stop`. free: by free-at.

    slow: one process is slower than the others.
    """
    net = tiny_net().double()
    net[3].p = 0.0
    layers.select(net, "full", [])
    s = TrainSettings(**{"epochs": 2, "batch_size": 24, "lr": 0.05, "probe_images": 32, "keep": "last", **settings})
    method = (Delayed if slow else Wasserstein)(steps=2, adversary={"name": "budget", "images": 50})
    if free:
        method = FreeAt(replays=2)
    threat = ThreatModel.parse("Linf:8/255" if free else "W2-Linf:8/255")
    setup = prepare(PixelModel(net), method, threat, s, make_accelerator(), "crop-flip", 96)
    pairs = [(x.double(), y) for x, y in (toy_data(96), toy_data(64, seed=1), toy_data(64, seed=2))]
    termination, notes = Termination(), []

    def listen(event):
        if isinstance(event, Note):
            notes.append(event.text)
        # only one of the processes is told, as on a cluster that takes one machine away
        if stop and isinstance(event, StepEnd) and event.step == stop and setup.world.rank == setup.world.size - 1:
            termination.asked = True

    if setup.world.is_main:
        out.mkdir(exist_ok=True)
    setup.world.wait()
    at = checkpoints.latest(out / "checkpoints") if resume else None
    training = train(setup, from_tensors(*pairs), out, resume=at, termination=termination)
    if stop:
        with pytest.raises(Preempted, match=f"after step {stop}"):
            follow(training, listen)
    else:
        follow(training, listen)
    state = {"weights": {k: v.clone() for k, v in net.state_dict().items()}, "notes": notes}
    return state if free else state | {"upsilon": setup.tracker.value}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results = {
        "live": run(out / "live"),
        "live, checkpoints": run(out / "checkpoints", checkpoint_steps=1),
        "from one": run(out / "from one", resume=True, batchnorm="frozen"),
    }
    run(out / "live, stopped", stop=STOP)
    results["live, stopped"] = run(out / "live, stopped", resume=True)
    run(out / "live, between", stop=4)  # the first epoch's steps are made, its probe is not
    results["live, between"] = run(out / "live, between", resume=True)
    run(out / "free, stopped", stop=STOP, free=True, batchnorm="frozen")
    results["free, stopped"] = run(out / "free, stopped", resume=True, free=True, batchnorm="frozen")
    results["slow"] = run(out / "slow", slow=True, epochs=1)
    results["sync"] = run(out / "sync", batchnorm="sync")
    for kind, at, more in (
        ("qsgd", STOP, {"error_feedback": True}),
        ("power_sgd", 13, {"epochs": 4, "compress_rank": 1}),
    ):
        results[kind] = run(out / kind, compress=kind, **more)
        run(out / f"{kind}, stopped", stop=at, compress=kind, **more)
        results[f"{kind}, stopped"] = run(out / f"{kind}, stopped", resume=True, compress=kind, **more)
    run(out / "from two", stop=STOP, batchnorm="frozen")
    if not int(os.environ["RANK"]):
        torch.save(results, out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
