"""What several machines cannot start with: each says so in one line, and none waits for ever."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import timm
import yaml
from launched import ROBUSTIFY, finish, start

from robustify import shelf

RUN = [*ROBUSTIFY, "finetune", "quickstart", "--no-verify", "-o", "run"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alone(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells the only process on one of two machines."""
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.mark.parametrize("rank", [0, 1])
def test_machines_that_do_not_meet_give_up(tmp_path, rank):
    values = yaml.safe_load(shelf.config_text("several-machines"))
    values |= {"distributed_type": "MULTI_CPU", "num_processes": 2, "num_machines": 2, "machine_rank": rank}
    values |= {"main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    (tmp_path / "machines.yaml").write_text(yaml.safe_dump(values))
    code, out, err = finish(start([*RUN, "--accelerate-config", "machines.yaml"], tmp_path, ROBUSTIFY_TIMEOUT="1"))
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    address = f"127.0.0.1:{values['main_process_port']}"
    assert first.startswith(f"error: the 2 machines did not meet at {address} within 1 seconds: ")
    assert second == "hint: start the command on all of them; ROBUSTIFY_TIMEOUT is the number of seconds to wait"


def test_a_process_whose_launcher_promised_another_gives_up(tmp_path):
    code, out, err = finish(start(RUN, tmp_path, ROBUSTIFY_TIMEOUT="1", **alone(1, free_port())))
    assert (code, out) == (2, "")
    first, _ = err.splitlines()
    assert first.startswith("error [process 1]: the processes did not find each other within 1 seconds: ")


def test_an_address_that_is_none_is_named(tmp_path):
    code, _, err = finish(start(RUN, tmp_path, **{**alone(1, 1), "MASTER_ADDR": "nowhere.invalid"}))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "this machine knows no way to nowhere.invalid, the first machine" in err


def test_machines_that_differ_say_in_what(tmp_path):
    port, processes = free_port(), []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        x = np.random.default_rng(0).random((60, 1, 8, 8), np.float32)
        x[0, 0, 0, 0] = 0.25 * rank
        np.savez(folder / "data.npz", x_train=x, y_train=np.arange(60) % 10, x_test=x, y_test=np.arange(60) % 10)
        if rank:
            (folder / "timm-0.0.1.dist-info").mkdir()
            (folder / "timm-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
        command = [*RUN, "--data", "npz:data.npz", "--set", "train.batch_size=10", "--set", f"train.lr=0.{rank + 1}"]
        processes.append(start(command, folder, **alone(rank, port)))
    for rank, (code, out, err) in enumerate(map(finish, processes)):
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        (said,) = [line for line in err.splitlines() if line.startswith("error")]
        differs = f"process 1 on {socket.gethostname()} differs from the main one: timm 0.0.1 instead of {timm.__version__}; "
        assert said.startswith(f"error{' [process 1]' if rank else ''}: {differs}train.lr 0.2 instead of 0.1; data "), said
        assert "hint: give every machine the same command, the same files and the same environment" in err
    assert not (tmp_path / "0" / "run").exists()
