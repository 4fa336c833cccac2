"""Gradient compression between processes, as communication hooks of torch's DistributedDataParallel.

fp16 and bf16 halve what is sent, power_sgd sends two thin factors of every matrix (Vogels et al., NeurIPS 2019): all three
are torch's own. qsgd is the one-byte quantiser of DAT (arXiv 2206.06257, after Alistarh et al., NeurIPS 2017), ours:

    Q(g) = n * sign(g) * l / 127,   l = floor(127 |g| / n) + Bernoulli(the fraction that floor cuts off),   n = ||g||_2

over buckets of 512 values, so that the variance, (n/127)^2 f (1-f) for the fraction f, does not grow with the dimension.
It is unbiased; DAT's published code divides where it must shift, which biases every positive entry. Values are
quantised twice: each process sends everyone his share of the buckets, averages what it gets, and sends the mean back
quantised anew, so a process sends 2 (N-1)/N bytes per value however many processes there are.
"""
# no `from __future__ import annotations`: torch compares the annotations of a hook with types

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # torch.distributed has it, for type checkers under this name only
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from robustify.rng import mix

LEVELS, BUCKET = 127, 512
WORTH = 2**20  # bytes of gradients a step; below, a link's latency costs more than its width
_QSGD = 15  # first word of the seeds
_POWER_SGD_START = 10  # plain steps first: early gradients do not bear it


@dataclass
class Quantised:
    """What travels: codes int8 [B, 512] in -127..127, norms fp32 [B]."""

    codes: Tensor
    norms: Tensor

    def values(self) -> Tensor:
        """The dequantised values, [B, 512]."""
        return self.codes * (self.norms[:, None] / LEVELS)


def quantise(values: Tensor, uniform: Tensor) -> Quantised:
    """Quantise buckets, [B, 512], without bias; uniform: U[0,1) of their shape. A bucket that is not finite stays so."""
    norms = values.norm(dim=1)
    # in place, for on a CPU fresh memory costs more than the arithmetic
    levels = values.abs().mul_(LEVELS).div_(norms[:, None].clamp_min(torch.finfo(norms.dtype).tiny))
    # floor(a + U) is floor(a) + Bernoulli(the fraction of a)
    codes = levels.add_(uniform).floor_().clamp_max_(LEVELS).copysign_(values)
    return Quantised(codes.nan_to_num_().to(torch.int8), norms.float())


@dataclass
class GradientHook:
    """Averages gradients over the processes, compressed, and counts what this process puts into the exchange.

    seed: with the step it fixes every rounding. error_feedback (qsgd): what rounding took from a gradient is added to the
    next one. sent: payload in bytes of `steps` steps; a ring of N processes sends 2 (N-1)/N times as much.
    """

    kind: str
    seed: int
    error_feedback: bool
    power_sgd: powerSGD_hook.PowerSGDState | None
    step: int = 0
    residuals: dict[int, Tensor] = field(default_factory=dict)
    sent: int = 0
    steps: int = 0

    def begin(self, step: int) -> None:
        """Tell which step of the run comes."""
        self.step = step
        self.steps += 1

    def average(self, state: Any, bucket: GradBucket) -> Future[Tensor]:
        """What DDP calls: returns the mean gradient of a bucket of parameters."""
        flat = bucket.buffer()
        if self.kind == "qsgd":
            done: Future[Tensor] = Future(devices=[flat.device] if flat.is_cuda else None)
            done.set_result(self._exchange(flat, bucket.index()))
            return done
        if self.power_sgd is not None:
            before = self.power_sgd.total_numel_after_compression
            future = powerSGD_hook.powerSGD_hook(self.power_sgd, bucket)
            if not flat.is_cuda:  # its callbacks exchange from gloo's threads, where another bucket's would come between
                future.wait()
            packed = self.power_sgd.total_numel_after_compression - before
            self.sent += packed * flat.element_size() if packed else flat.nbytes
            return future
        self.sent += 2 * flat.numel()
        half = default_hooks.fp16_compress_hook if self.kind == "fp16" else default_hooks.bf16_compress_hook
        return half(None, bucket)  # pyright: ignore[reportArgumentType]

    def _exchange(self, flat: Tensor, index: int) -> Tensor:
        world = dist.get_world_size()
        share = -(-flat.numel() // (BUCKET * world))  # buckets that each process averages
        values = flat.new_zeros(world * share * BUCKET)
        values[: flat.numel()] = flat
        if self.error_feedback and index in self.residuals:
            values[: flat.numel()] += self.residuals[index]
        values = values.view(-1, BUCKET)
        mine = quantise(values, self._uniform(values, index, 0))
        if self.error_feedback:
            self.residuals[index] = (values - mine.values()).flatten()[: flat.numel()].to(flat.dtype)
        codes, norms = torch.empty_like(mine.codes), torch.empty_like(mine.norms)
        dist.all_to_all_single(codes, mine.codes)
        dist.all_to_all_single(norms, mine.norms)
        mean = Quantised(codes, norms).values().view(world, share, BUCKET).mean(0)
        answer = quantise(mean, self._uniform(mean, index, 1))
        dist.all_gather_into_tensor(codes, answer.codes)
        dist.all_gather_into_tensor(norms, answer.norms)
        self.sent += codes.nbytes + norms.nbytes
        return Quantised(codes, norms).values().flatten()[: flat.numel()].to(flat.dtype)

    def _uniform(self, like: Tensor, index: int, phase: int) -> Tensor:
        seed = mix(self.seed, _QSGD, self.step, index, phase, dist.get_rank())
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def payload(self) -> float:
        """Bytes per step, the mean since the last call."""
        mean = self.sent / max(self.steps, 1)
        self.sent = self.steps = 0
        return mean

    def own(self) -> dict[str, Tensor]:
        """This process's state, to be saved: what rounding, or the factors, have left out so far."""
        if self.power_sgd is None:
            return {f"hook.residual.{index}": residual for index, residual in self.residuals.items()}
        memories = _memories(self.power_sgd).items()
        found = {f"hook.{name}.{index}": tensor for name, memory in memories for index, tensor in memory.items()}
        return {**found, "hook.iter": torch.tensor(float(self.power_sgd.iter))}

    def put_back(self, own: dict[str, Tensor], device: torch.device) -> None:
        """Take what `own` gave, of this process or the mean of all."""
        memories = {"residual": self.residuals} if self.power_sgd is None else _memories(self.power_sgd)
        for key, tensor in own.items():
            part, _, rest = key.partition(".")
            name, _, index = rest.partition(".")
            if part == "hook" and index:
                memories[name][int(index)] = tensor.to(device)
            elif part == "hook" and self.power_sgd is not None:
                self.power_sgd.iter = int(tensor)


def _memories(state: powerSGD_hook.PowerSGDState) -> dict[str, dict[int, Tensor]]:
    return {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of one step, uncompressed."""
    return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def compression_note(model: nn.Module, kind: str, processes: int) -> str | None:
    """Say when compression buys nothing: on one process, or with so few weights that a link's latency is all there is."""
    if kind == "none":
        return None
    if processes == 1:
        return f"compress {kind} does nothing on one process: no gradient is sent"
    size = gradient_bytes(model)
    if size >= WORTH:
        return None
    return f"compress {kind} buys nothing here: the gradients of the weights that train are {size:,} bytes a step"


def attach(
    forward: nn.Module, kind: str, images: Tensor, *, seed: int, error_feedback: bool, rank: int
) -> GradientHook | None:
    """Register a hook on what DDP wraps; None on one process, where nothing is sent, and for `none`.

    images: a few. One forward and backward pass of them, in eval mode, makes DDP put its buckets in their final order, so
    that they are the same in a run's first step, in its others, and in those after it resumed. rank: of power_sgd's factors.
    """
    if kind == "none" or not isinstance(forward, DistributedDataParallel):
        return None
    modes = [(module, module.training) for module in forward.modules()]
    forward.eval()
    (forward(images).sum() * 0).backward()
    for module, mode in modes:
        module.training = mode
    for weight in forward.parameters():
        weight.grad = None
    state = None
    if kind == "power_sgd":
        # a group's state asks for at least two plain iterations because of those buckets
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=_POWER_SGD_START, random_seed=seed
        )
    hook = GradientHook(kind, seed, error_feedback, state)
    forward.register_comm_hook(None, hook.average)
    return hook
