"""Accelerate configs, and what a machine has too little for."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from robustify import launch, shelf
from robustify.distributed import choose_interface, make_accelerator
from robustify.errors import UserError
from robustify.launch import Layout, read_config, relaunch

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "True"}


@pytest.fixture
def written(tmp_path):
    def write(**values):
        (tmp_path / "machines.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "machines.yaml"

    return write


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("one-machine", Layout(8)),
        ("several-machines", Layout(8, machines=4, machine=0, address="10.0.0.1:29500")),
        ("fsdp2", Layout(8, environment=FSDP2)),
    ],
)
def test_the_configs_that_come_along_are_accelerates_own(robustify, tmp_path, name, layout):
    ran = robustify("copy", name, "machines.yaml")
    assert ran.out == "next: robustify finetune RECIPE --accelerate-config machines.yaml\n"
    assert read_config(tmp_path / "machines.yaml") == layout
    theirs = load_config_from_file(str(tmp_path / "machines.yaml"))  # as accelerate launch reads it
    assert (theirs.num_processes, theirs.num_machines) == (layout.processes * layout.machines, layout.machines)


def test_no_config_is_taken_for_a_recipe(robustify):
    assert not set(shelf.configs()) & set(shelf.names())
    assert "machine" not in robustify("ls", "recipes").out
    assert robustify("show", "one-machine").code == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_processes": 3, "num_machines": 2}, "3 processes do not divide over 2 machines"),
        ({"num_processes": 4, "num_machines": 2}, "needs main_process_ip"),
        ({"num_processes": "many"}, "num_processes 'many' is not a whole number"),
        (
            {"num_processes": 4, "num_machines": 2, "main_process_ip": "a", "machine_rank": 2},
            r"machine_rank 2, but the machines are 0\.\.1",
        ),
    ],
)
def test_configs_that_cannot_be(written, values, said):
    with pytest.raises(UserError, match=said):
        read_config(written(**values))


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read the accelerate config") as error:
        read_config(tmp_path / "one-machine")
    assert "robustify copy NAME FILE" in error.value.hint


def test_more_processes_than_cores_or_gpus(monkeypatch):
    with pytest.raises(UserError, match=r"10000 processes, but this machine has .* cores"):
        relaunch(Layout(10_000, cpu=True), [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes, but this machine has 2 GPUs") as error:
        relaunch(Layout(3), [])
    assert error.value.hint == "take --processes 2"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # under torchrun
    with pytest.raises(UserError, match="3 processes, but this machine has 2 GPUs"):
        make_accelerator()


def test_a_batch_that_does_not_divide_over_the_processes(robustify):
    ran = robustify("finetune", "quickstart", "--dry-run", "--processes", "3", "--no-verify")
    assert ran.code == 2
    assert "batch_size 64 is not divisible by 1 passes x 3 processes" in ran.err
    assert "take --set train.batch_size=63" in ran.err


def test_gloo_takes_the_interface_to_the_first_machine_where_there_are_several(monkeypatch):
    assert choose_interface() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_interface() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert choose_interface() == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert choose_interface().startswith("lo")  # as all machines are one when that is their address


def test_a_first_machine_that_takes_its_own_name_for_loopback_is_told(monkeypatch):
    """As Debian's /etc/hosts has it; the others would be given an address at which each finds itself."""
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1"), ("MASTER_ADDR", "head")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: [found])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"MASTER_ADDR head is 127\.0\.1\.1") as error:
        choose_interface()
    assert "GLOO_SOCKET_IFNAME" in error.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_interface() is None
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_plan_of_what_fsdp2_cannot_do_is_refused(robustify, tmp_path, tiny):
    robustify("copy", "fsdp2", "machine.yaml")
    ran = robustify("finetune", *tiny, "--layers", "last", "--accelerate-config", "machine.yaml", "--dry-run")
    assert ran.code == 2
    assert "train.layers last" in ran.err


def test_a_process_ended_by_a_signal_is_the_reason_whoever_ended_first(monkeypatch):
    failures = {rank: ProcessFailure(rank, 1, code, "none") for rank, code in ((0, 3), (1, -9))}

    def failed(*_):
        raise ChildFailedError("robustify", failures)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: failed)
    with pytest.raises(UserError, match="process 1 was ended by SIGKILL"):
        relaunch(Layout(1, cpu=True), ["finetune"])
