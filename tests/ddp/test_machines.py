"""Two machines, as network namespaces with addresses of their own: either is killed in mid-run, and both go on where they were.

They share no disk: each has a folder. The shipped accelerate configs are used, with CPUs for GPUs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from launched import ROBUSTIFY, finish, start, steps
from safetensors.torch import load_file

from robustify import checkpoints, shelf

RUN = [
    *("finetune", "quickstart", "--epochs", "2", "--set", "data.limit=300", "--set", "method.steps=2"),
    *("--set", "train.checkpoint_steps=1", "--set", "train.keep=last", "--set", "eval.n=20", "--set", "eval.attacks=[clean]"),
    *("--set", "train.probe_images=16", "--no-verify", "-o", "run"),
]
STEPS = 8  # 270 images, batch 64, 2 epochs
ADDRESSES = ("10.77.0.1", "10.77.0.2")
ETC = Path("/etc/netns")  # where `ip netns exec` finds a namespace's own /etc/hosts


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def config(name: str, **changes) -> str:
    values = yaml.safe_load(shelf.config_text(name))
    return yaml.safe_dump({**values, "distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2, **changes})


class Machine:
    """A namespace, and a folder that stands for its disk."""

    def __init__(self, number: int, disk: Path) -> None:
        self.number, self.disk = number, disk
        self.name = f"robustify-{os.getpid()}-{number}"

    def __enter__(self) -> Machine:
        ip("netns", "add", self.name)
        (ETC / self.name).mkdir(parents=True)
        known = [f"127.0.0.1 localhost {socket.gethostname()}", *(f"{a} machine{i}" for i, a in enumerate(ADDRESSES))]
        (ETC / self.name / "hosts").write_text("\n".join(known) + "\n")
        self.disk.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        ip("netns", "del", self.name)
        shutil.rmtree(ETC / self.name)

    def run(self) -> subprocess.Popen[str]:
        changes = {"num_machines": 2, "machine_rank": self.number, "main_process_ip": ADDRESSES[0]}
        (self.disk / "machines.yaml").write_text(config("several-machines", **changes))
        command = ["ip", "netns", "exec", self.name, *ROBUSTIFY, *RUN, "--accelerate-config", "machines.yaml"]
        return start(command, self.disk)

    def kill(self) -> None:
        for process in ip("netns", "pids", self.name).split():
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and iproute2")
    disks = tmp_path_factory.mktemp("machines")
    first, second = (Machine(number, disks / f"machine{number}") for number in range(2))
    with ExitStack() as up:
        try:
            up.enter_context(first)
            up.enter_context(second)
            ip("link", "add", "wire", "netns", first.name, "type", "veth", "peer", "name", "wire", "netns", second.name)
            for machine, address in zip((first, second), ADDRESSES, strict=True):
                ip("-n", machine.name, "addr", "add", f"{address}/24", "dev", "wire")
                for link in ("lo", "wire"):
                    ip("-n", machine.name, "link", "set", link, "up")
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', error)}")
        yield first, second


def lose(victim: Machine, survivor: Machine, disk: Path) -> None:
    """Start the run on both, kill one of them after two more steps: the other ends at once, and says why."""
    running = {machine: machine.run() for machine in (victim, survivor)}
    until = len(steps(disk)) + 2
    deadline = time.monotonic() + 120
    while len(steps(disk)) < until:
        assert all(process.poll() is None for process in running.values()), [finish(p) for p in running.values()]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    assert finish(running[victim])[0] == -signal.SIGKILL
    code, _, err = finish(running[survivor])  # ROBUSTIFY_TIMEOUT is not waited for: half an hour
    assert code == 3, err
    assert "Traceback" not in err
    assert "another process has ended without a word" in err
    assert "the last checkpoint is whole; this continues the run, typed on every machine: robustify finetune" in err
    assert err.rstrip().endswith("--accelerate-config machines.yaml")
    saved = checkpoints.latest(disk / "run" / "checkpoints")
    last = steps(disk)[-1]  # it is logged before it is saved
    assert torch.load(saved, weights_only=True)["parts"]["loop"]["step"] in (last - 1, last)


def test_a_machine_is_lost_and_comes_back(machines, tmp_path):
    first, second = machines
    lose(first, second, first.disk)  # where the checkpoints are, and by which the processes found each other
    here, there = first.run(), second.run()
    code, out, err = finish(here)
    assert code == 0, err
    assert f"of {STEPS}" in err.partition("resumed at step")[2]
    assert "model: run/model" in out
    assert finish(there)[:2] == (0, "")
    assert steps(first.disk) == list(range(1, STEPS + 1))
    assert not (second.disk / "run").exists()

    (tmp_path / "machine.yaml").write_text(config("one-machine"))
    code, _, err = finish(start([*ROBUSTIFY, *RUN, "--accelerate-config", "machine.yaml"], tmp_path))
    assert code == 0, err
    undisturbed, found = (load_file(disk / "run" / "model" / "model.safetensors") for disk in (tmp_path, first.disk))
    assert all(torch.equal(found[name], weight) for name, weight in undisturbed.items())
