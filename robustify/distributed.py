"""The process group: the accelerator, exact sums and gathers over processes, and the relaunch on several of them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from robustify.errors import UserError


def make_accelerator(precision: str = "no", tracker: str | None = None, log_dir: str | None = None) -> Accelerator:
    """Return the Accelerator of this process. Raises UserError when the precision or tracker cannot be had here."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("fp16 needs a CUDA device", "take --precision bf16")
    # The two forwards of one step would each broadcast BatchNorm's statistics between them, and break the backward pass.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # verdicts, budgets and the exact passes are fp32; TF32 would round them to ten bits
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # accelerate keeps the first precision of a process for good; a second run in the same one may want another
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[ddp],
            log_with=tracker,
            project_dir=log_dir,
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot start with precision {precision}, tracker {tracker}: {error}") from None
    if tracker and not accelerator.log_with:
        raise UserError(f"the tracker {tracker} is not installed", f"pip install {tracker}, or leave --tracker out")
    return accelerator


class World:
    """This process's place among all of them. With one process every operation is the identity."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.size = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.is_main = self.rank == 0

    def rows(self, n: int) -> slice:
        """This process's contiguous share of n rows; shares differ by at most one row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate tensors of any lengths over the processes, in order of rank; the same on every process."""
        if self.size == 1:
            return values
        return torch.cat([part.to(values.device) for part in gather_object([values.cpu()])])

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor over the processes."""
        if self.size == 1:
            return values
        assert self.accelerator is not None
        total = self.accelerator.reduce(values.clone(), reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def on_main(self, do: Callable[[], Any]) -> Any:
        """Let the main process do something and return its result on every process; a UserError is raised on all of them."""
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
            error.told = not self.is_main  # the main process says it
            raise error
        return result

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


def relaunch(processes: int, arguments: Sequence[str]) -> int:
    """Run `robustify ARGUMENTS` on several processes of this machine and return the exit code.

    The same path as torchrun or accelerate launch: every process runs the same command. Raises UserError when there are
    fewer devices than processes.
    """
    gpus, cores = (
        torch.cuda.device_count(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    room, kind = (gpus, "GPUs") if gpus else (cores, "cores")
    if processes > room:
        raise UserError(f"--processes {processes}, but this machine has {room} {kind}", f"take --processes {room}")
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process that failed has said why
    config = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="robustify", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "robustify", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def launched() -> bool:
    """Whether torchrun or accelerate launch started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def busy_cores() -> str | None:
    """Return a warning when other programs use the cores that this one's threads want, else None.

    Two threads on one free core can make half-precision training twenty times slower, not twice.
    """
    import psutil

    cores = os.cpu_count() or 1
    others = psutil.cpu_percent(interval=0.1) / 100 * cores
    wanted = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if others + wanted <= cores + 0.5 or torch.cuda.is_available():
        return None
    free = max(1, int(cores - others))
    return (
        f"{others:.1f} of {cores} cores are busy and this run wants {wanted} threads: "
        f"expect it to crawl; OMP_NUM_THREADS={free} fits what is free"
    )
