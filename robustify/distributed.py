"""The process group: the accelerator, and exact sums and gathers over processes."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import accelerate
import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    compare_versions,
    gather_object,
)
from torch import Tensor, nn

from robustify.errors import UserError

SHARD_HINT = "where a training does not fit, FSDP2 splits it: `robustify copy fsdp2 FILE`, then --accelerate-config FILE"
NOTICEABLE = 0.05  # seconds of work a step; less of it differs between processes by chance


def time_limit() -> int:
    """Seconds that a process waits for the others, when they start and when they exchange: ROBUSTIFY_TIMEOUT, or 1800."""
    text = os.environ.get("ROBUSTIFY_TIMEOUT", "1800")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"ROBUSTIFY_TIMEOUT={text} is not a number of seconds")
    return int(text)


def asks_to_shard(environment: Mapping[str, str]) -> bool:
    """Whether these variables, as `accelerate launch` sets them, ask for FSDP2. Raises UserError for what is not done."""

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() == "true"

    for name, kind in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "parallelism")):
        if on(f"ACCELERATE_USE_{name}"):
            raise UserError(f"robustify does not train with accelerate's {kind}", SHARD_HINT)
    if not on("ACCELERATE_USE_FSDP"):
        return False
    refused = {
        "version 1 (fsdp_version: 2 is the one)": environment.get("FSDP_VERSION", "1") != "2",
        "fsdp_offload_params": on("FSDP_OFFLOAD_PARAMS"),
        "fsdp_activation_checkpointing, which feeds BatchNorm every image twice": on("FSDP_ACTIVATION_CHECKPOINTING"),
        "fsdp_ignored_modules": "FSDP_IGNORED_MODULES" in environment,
    }
    if found := [what for what, asked in refused.items() if asked]:
        raise UserError(f"the accelerate config asks of FSDP what robustify does not do: {'; '.join(found)}", SHARD_HINT)
    return True


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """What accelerate is to know of FSDP2, or None where every process keeps a whole copy of what trains."""
    if not asks_to_shard(os.environ):
        return None
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise UserError("FSDP2 has nothing to split over one process", "take more, or leave the accelerate config out")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")  # by itself: the network's blocks, one by one
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if compare_versions("accelerate", "<", "1.10") or compare_versions("torch", "<", "2.6"):
        have = f"accelerate {accelerate.__version__} and torch {torch.__version__}"
        raise UserError(f"FSDP2 needs accelerate 1.10 and torch 2.6 or newer, here are {have}")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    try:
        return FullyShardedDataParallelPlugin(
            auto_wrap_policy=policy,  # pyright: ignore[reportArgumentType]
            reshard_after_forward=reshard in ("true", "full_shard"),  # the second is what accelerate launch says by itself
            cpu_ram_efficient_loading=False,  # every process reads the weights
            mixed_precision_policy=MixedPrecisionPolicy(),  # autocast rounds the passes; what is exchanged stays fp32
        )
    except ValueError as error:
        raise UserError(f"the accelerate config of FSDP2: {error}") from None


def make_accelerator(precision: str = "no", tracker: str | None = None, log_dir: str | None = None) -> Accelerator:
    """Return the Accelerator of this process. Raises UserError when the precision or tracker cannot be had here."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("fp16 needs a CUDA device", "take --precision bf16 (precision=\"bf16\" in Python)")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if gpus and here > gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise UserError(f"{here} processes, but this machine has {gpus} GPUs", f"start {gpus} processes here")
    group = InitProcessGroupKwargs(backend=None, timeout=timedelta(seconds=time_limit()))  # pyright: ignore[reportArgumentType]
    # The two forwards of one step would each broadcast BatchNorm's statistics between them, and break the backward pass.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    sharding = _sharding()
    # verdicts, budgets and the exact passes are fp32; TF32 would round them to ten bits
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # accelerate keeps the first precision of a process for good; a second run in the same one may want another
    AcceleratorState._reset_state()
    interface = choose_interface()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[ddp, group],
            fsdp_plugin=sharding,
            log_with=tracker,
            project_dir=log_dir,
            step_scheduler_with_optimizer=False,
        )
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "Gloo" not in str(error):
            raise
        raise UserError(
            f"the processes did not find each other within {time_limit()} seconds: {str(error).splitlines()[0]}",
            "all must be started with the same address and number; ROBUSTIFY_TIMEOUT is the number of seconds to wait"
            + (f", GLOO_SOCKET_IFNAME the network interface ({interface} was taken)" if interface else ""),
        ) from None
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot start with precision {precision}, tracker {tracker}: {error}") from None
    if sharding is not None:  # accelerate takes it on GPUs alone, and from the first accelerator of a process alone
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, sharding
    if tracker and not accelerator.log_with:
        raise UserError(f"the tracker {tracker} is not installed", f"pip install {tracker}, or leave the tracker out")
    return accelerator


def choose_interface() -> str | None:
    """Return the network interface by which gloo is to reach the other machines, None where there are none.

    It is the one on the way to the first machine, unless GLOO_SOCKET_IFNAME names another. Left alone, gloo gives the others
    the address that this host's own name stands for, which /etc/hosts often says is 127.0.0.1. Raises UserError where the
    first machine's name leads no further than that; on GPUs, where NCCL finds its own way, None.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) <= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return None
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        first = os.environ.get("MASTER_ADDR", "localhost")
        try:
            family, kind, _, _, address = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:  # to connect a datagram socket sends nothing
                probe.connect(address)
                own = probe.getsockname()[0]
        except OSError as error:
            raise UserError(f"this machine knows no way to {first}, the first machine: {error}") from None
        if ipaddress.ip_address(own.split("%")[0]).is_loopback and not _is_loopback(first):
            if torch.cuda.is_available():
                return None
            raise UserError(
                f"MASTER_ADDR {first} is {address[0]} on this machine, where no other can reach it",
                "give the first machine's address in the network, or set GLOO_SOCKET_IFNAME to the network interface",
            )
        for name, addresses in psutil.net_if_addrs().items():
            if any(known.address.split("%")[0] == own for known in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name
    return os.environ.get("GLOO_SOCKET_IFNAME")


def _is_loopback(name: str) -> bool:
    """Whether the name itself says that all is on this machine."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class World:
    """This process's place among all of them. With one process every operation is the identity."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.size = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.is_main = self.rank == 0
        self.speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # the first process on each machine
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.sharded = accelerator is not None and accelerator.distributed_type == DistributedType.FSDP
        self.worked = self.waited = 0.0

    def rows(self, n: int) -> slice:
        """This process's contiguous share of n rows; shares differ by at most one row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate tensors of any lengths over the processes, in order of rank; the same on every process."""
        if self.size == 1:
            return values
        with self._waiting():
            return torch.cat([part.to(values.device) for part in gather_object([values.cpu()])])

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor over the processes."""
        if self.size == 1:
            return values
        assert self.accelerator is not None
        with self._waiting():
            total = self.accelerator.reduce(values.clone(), reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def on_main(self, do: Callable[[], Any]) -> Any:
        """Let the main process do something and return its result on every process.

        A UserError is raised on all of them, and told once on every machine.
        """
        if self.size == 1:
            return do()
        outcome: tuple[Any, UserError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (do(), None)
            except UserError as error:
                outcome = (None, error)
        result, error = broadcast_object_list([outcome])[0]
        if error is not None:
            error.told = not self.speaks
            raise error
        return result

    def gather_on_main(self, value: Any) -> list[Any] | None:
        """Return every process's value on the main process, in order of rank; None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        torch.distributed.gather_object(value, values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it holds on any process; the same on all of them."""
        return here if self.size == 1 else bool(self.sum(torch.tensor(float(here), device=self.device)) > 0)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the block's seconds, without those spent waiting for others, as this process's own work."""
        begin, waited = time.perf_counter(), self.waited
        yield
        if self.size > 1 and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.worked += time.perf_counter() - begin - (self.waited - waited)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def slow_process(self, steps: int) -> str | None:
        """On the main process, name a process whose own work in so many steps took over half longer than the median's.

        Begins anew. Work of less than NOTICEABLE seconds a step, or none that `working` has timed, tells nothing.
        """
        worked, self.worked = self.worked, 0.0
        found = self.gather_on_main((worked, self.rank, socket.gethostname()))
        if found is None or self.size == 1:
            return None
        slowest, rank, host = max(found)
        usual = sorted(found)[(self.size - 1) // 2][0]
        if usual < NOTICEABLE * steps or slowest <= 1.5 * usual:
            return None
        return f"process {rank} on {host} takes {slowest / usual:.1f} times as long as the others, which wait for it"

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def copy_from_main(self, model: nn.Module) -> None:
        """Give every process the main process's weights and statistics."""
        if self.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(broadcast(tensor.clone()))  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Give every process the mean of all processes' BatchNorm statistics, which drift apart during an epoch."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer) / self.size)


@contextmanager
def main_first(world: World):
    """Let the main process do something (a download) before the others."""
    if not world.is_main:
        world.wait()
    yield
    if world.is_main:
        world.wait()


def busy_cores() -> str | None:
    """Return a warning when other programs use the cores that this one's threads want, else None.

    Two threads on one free core can make half-precision training twenty times slower, not twice.
    """
    cores = os.cpu_count() or 1
    others = psutil.cpu_percent(interval=0.1) / 100 * cores
    wanted = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if others + wanted <= cores + 0.5 or torch.cuda.is_available():
        return None
    free = max(1, int(cores - others))
    advice = f"OMP_NUM_THREADS={free} fits what is free" if free < wanted else "nothing here can help but to wait"
    return f"{others:.1f} of {cores} cores are busy and this run wants {wanted} threads: expect it to crawl; {advice}"
