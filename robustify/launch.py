"""Starting on several processes and machines: the command runs again in each process, as under torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from robustify import shelf
from robustify.distributed import SHARD_HINT, asks_to_shard, time_limit
from robustify.errors import UserError
from robustify.faults import PREEMPTED, PeerLost

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")  # of accelerate's distributed_type


@dataclass(frozen=True)
class Layout:
    """processes: on this machine. machines: how many; machine: which of them this is; address: of machine 0, HOST:PORT.
    environment: variables that the processes get."""

    processes: int
    machines: int = 1
    machine: int = 0
    address: str = "localhost:0"
    cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def read_config(path: Path) -> Layout:
    """Read a file that `accelerate config` wrote. Raises UserError for what it asks that robustify does not do."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read the accelerate config {path}: {error}",
            f"`robustify copy NAME FILE` writes one that comes with robustify: {', '.join(shelf.configs())}",
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no accelerate config", "accelerate config --config_file FILE writes one")
    kind = str(values.get("distributed_type", "NO"))
    if kind not in KINDS:
        raise UserError(
            f"{path} asks for distributed_type {kind}; robustify knows {', '.join(KINDS)}",
            f"{SHARD_HINT}; where memory is short: --set train.accumulate=4, --precision bf16",
        )
    environment = _fsdp(values) if kind == "FSDP" else {}
    asks_to_shard(environment)
    total, machines = _whole(path, values, "num_processes", 1), _whole(path, values, "num_machines", 1)
    if total % machines:
        raise UserError(f"{path}: {total} processes do not divide over {machines} machines")
    cpu = bool(values.get("use_cpu", False)) or kind == "MULTI_CPU"
    layout = Layout(total // machines, cpu=cpu, environment=environment)
    if machines == 1:
        return layout
    host = values.get("main_process_ip")
    if not host:
        raise UserError(f"{path}: num_machines {machines} needs main_process_ip, the address of machine 0")
    port = _whole(path, values, "main_process_port", 29500)
    rank = _whole(path, values, "machine_rank", 0)
    if not 0 <= rank < machines:
        raise UserError(f"{path}: machine_rank {rank}, but the machines are 0..{machines - 1}")
    return replace(layout, machines=machines, machine=rank, address=f"{host}:{port}")


def _fsdp(values: dict[str, Any]) -> dict[str, str]:
    """The variables that `accelerate launch` makes of a config's fsdp_config."""
    found = {"ACCELERATE_USE_FSDP": "true"}
    for key, value in (values.get("fsdp_config") or {}).items():
        name = key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")
        if value is not None:
            found[name if name.startswith("FSDP_") else f"FSDP_{name}"] = str(value)
    return found


def _whole(path: Path, values: dict[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if value is None:
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{path}: {key} {value!r} is not a whole number") from None


def relaunch(layout: Layout, arguments: Sequence[str]) -> int:
    """Run `robustify ARGUMENTS` on several processes and return the exit code.

    The same path as torchrun or accelerate launch: every process runs the same command. Raises UserError when there are
    fewer devices than processes or not all machines come in time, PeerLost when a process was ended by a signal.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = 0 if layout.cpu else torch.cuda.device_count()
    room, kind = (gpus, "GPUs") if gpus else (cores, "cores")
    if layout.processes > room:
        raise UserError(f"{layout.processes} processes, but this machine has {room} {kind}", f"take --processes {room}")
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.update(layout.environment)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // layout.processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process that failed has said why
    several = layout.machines > 1
    config = LaunchConfig(
        layout.machines,
        layout.machines,
        layout.processes,
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=layout.address,
        rdzv_configs={"timeout": time_limit(), **({"rank": layout.machine} if several else {})},
        run_id="robustify",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "robustify", *arguments)
    except ChildFailedError as error:
        # one that was ended by a signal is why the others ended, even if they were seen first
        killed = next((failed for failed in error.failures.items() if failed[1].exitcode < 0), None)
        return _exit_code(*(killed or error.get_first_failure()))
    except SignalException as stopped:
        return PREEMPTED if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval
    except (DistError, RendezvousError) as error:
        raise UserError(
            f"the {layout.machines} machines did not meet at {layout.address} within {time_limit()} seconds: "
            f"{str(error).splitlines()[0]}",
            "start the command on all of them; ROBUSTIFY_TIMEOUT is the number of seconds to wait",
        ) from None
    return 0


def _exit_code(rank: int, failure: Any) -> int:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        raise PeerLost(
            f"process {rank} was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
        )
    return failure.exitcode


def launched() -> bool:
    """Whether torchrun or accelerate launch started this process as one of several."""
    return "WORLD_SIZE" in os.environ
