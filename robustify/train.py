"""The training loop, one for all methods, readable from top to bottom.

It owns the forwards, precision, accumulation, processes, the NaN check, the held-out probe and the checkpoints; a method
only says what to attack with and what to minimise. Every random number is a function of (seed, step, place in the
global batch), so a run that was killed continues bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustify import checkpoints, files
from robustify.adversaries.budget import Budget
from robustify.augment import augment
from robustify.data import Data, Split, batches, subset
from robustify.distributed import World
from robustify.errors import UserError
from robustify.evaluation import evaluate, sample
from robustify.events import Collapsed, EpochEnd, Event, Listener, Note, Progress, StepEnd
from robustify.gradients import gradient_norms
from robustify.importance import MIN_DRAWS, draw, logit_slopes
from robustify.methods import Gaat
from robustify.methods.base import Method, OwnStep, Passes, Penalised, State, replays
from robustify.methods.wasserstein import Wasserstein
from robustify.modes import Nets, Shadow, borrowed
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.rng import Draws, mix
from robustify.schedules import make_schedule
from robustify.sensitivity import UpsilonTracker
from robustify.threat import ThreatModel

# first words of the seeds, so that no two uses of randomness share a stream
_ORDER, _STEP, _UPSILON = 11, 12, 13
OPTIMIZERS = {"sgd": "momentum", "adamw": "adamw", "lamb": "lamb", "lars": "lars"}  # timm's "sgd" is Nesterov's


@dataclass
class LoopState:
    """What the loop must remember to continue: saved with every checkpoint."""

    step: int = 0
    best: float = -1.0
    trained_best: float = 0.0
    best_epoch: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False

    def state_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass
class Setup:
    """All that a training step needs. forward: what DDP and autocast wrap; model: the bare network, for the attack."""

    model: PixelModel
    forward: nn.Module
    optimizer: Any
    accelerator: Accelerator
    world: World
    method: Method | OwnStep
    threat: ThreatModel
    settings: TrainSettings
    augmentation: str
    tracker: State | None
    shadow: Shadow | None
    ema: Any | None


@dataclass(frozen=True)
class Outcome:
    """How the training went. best: held-out robust accuracy of the kept epoch; seconds: spent in the loop."""

    steps: int
    epochs: int
    best: float
    best_epoch: int
    collapsed: bool
    seconds: float


class _Forward(nn.Module):
    """What accelerate may wrap and patch: the bare model under it stays as it is, for the attack in full precision."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def prepare(
    model: PixelModel,
    method: Method | OwnStep,
    threat: ThreatModel,
    settings: TrainSettings,
    accelerator: Accelerator,
    augmentation: str,
    images: int,
) -> Setup:
    """Build optimiser, shadow, average and Upsilon's state around a model whose requires_grad flags are set.

    images: size of the training set. Raises UserError when the batch does not divide over the processes.
    """
    from timm.optim import create_optimizer_v2

    world = World(accelerator)
    parts = settings.accumulate * world.size
    if settings.batch_size % parts:
        raise UserError(
            f"batch_size {settings.batch_size} is not divisible by {settings.accumulate} passes x {world.size} processes",
            f"take --set train.batch_size={max(1, settings.batch_size // parts) * parts}",
        )
    third_derivatives = isinstance(method, Gaat) and method.second_derivatives and method.order == 2
    if third_derivatives and settings.batchnorm == "train" and _normalised_by_batch(model):
        raise UserError(
            "gaat with gradient exact and order 2 needs third derivatives, which torch's batch norm has not while it trains",
            "take --set method.gradient=hessian-free, --set method.order=1 or --set train.batchnorm=frozen",
        )
    model.to(accelerator.device)
    reduced = settings.precision != "no"
    if reduced:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = create_optimizer_v2(
        model,
        OPTIMIZERS[settings.optimizer],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    forward, optimizer = accelerator.prepare(_Forward(model), optimizer)
    tracker = method.tracker(threat, images)
    if tracker is not None:
        tracker.gather = world.gather
    ema = None
    if settings.ema is not None:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=settings.ema)
    return Setup(
        model,
        forward,
        optimizer,
        accelerator,
        world,
        method,
        threat,
        settings,
        augmentation,
        tracker,
        Shadow(model) if reduced else None,
        ema,
    )


def set_train_mode(setup: Setup) -> None:
    """Training mode, but for BatchNorm whose statistics are to stay: with only the last layer training they must."""
    setup.model.train()
    if setup.settings.batchnorm == "frozen" or setup.settings.layers == "last":
        for module in _normalised_by_batch(setup.model):
            module.eval()


def _normalised_by_batch(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def take_step(setup: Setup, micro_batches: Iterator[tuple[Tensor, Tensor]], step: int) -> tuple[dict[str, float], int]:
    """One optimiser step from `accumulate` micro-batches. Returns (its losses, over all processes; images seen here).

    The losses include `total`. Does not update when the total is not finite; the caller stops the run.
    """
    s, world, method = setup.settings, setup.world, setup.method
    torch.manual_seed(mix(s.seed, _STEP, step, world.rank))  # dropout and its like
    nets = Nets(setup.model, setup.shadow.model if setup.shadow else setup.model)
    backward = lambda loss: setup.accelerator.backward(loss / s.accumulate)  # noqa: E731
    sums: dict[str, Tensor] = {}
    seen = 0
    for k in range(s.accumulate):
        x, y = next(micro_batches)
        seen += len(x)
        whole = s.batch_size // s.accumulate
        draws = Draws(mix(s.seed, _STEP, step // replays(method), k), x.device, whole, world.rows(whole).start)
        x = augment(x, setup.augmentation, draws)
        with setup.accelerator.no_sync(setup.forward) if k + 1 < s.accumulate else nullcontext():
            if isinstance(method, OwnStep):
                passes = Passes(setup.forward, backward, nets, step)
                total, parts = method.step(passes, x, y, setup.threat, draws, setup.tracker)
            else:
                with borrowed(setup.model):
                    x_adv = method.perturb(nets, x, y, setup.threat, draws, setup.tracker)
                logits = setup.forward(x) if method.needs_clean else None
                logits_adv = setup.forward(x_adv)
                total, parts = method.loss(logits, logits_adv, y)
                if isinstance(method, Penalised):
                    terms = method.penalty(setup.forward, x, y, setup.threat, draws)
                    total, parts = sum(terms.values(), total), parts | terms
                backward(total)
        if setup.tracker:
            setup.tracker.update()
        for name, part in {"total": total, **parts}.items():
            sums[name] = sums.get(name, 0.0) + part.detach().double() / s.accumulate
    means = world.sum(torch.stack(list(sums.values()))) / world.size
    losses = dict(zip(sums, means.tolist(), strict=True))
    if math.isfinite(losses["total"]):
        if s.clip_norm is not None:
            setup.accelerator.clip_grad_norm_(setup.model.parameters(), s.clip_norm)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        if setup.shadow:
            setup.shadow.refresh()
        if setup.ema:
            setup.ema.update(setup.model)
    return losses, seen


def train(
    setup: Setup, data: Data, folder: Path, *, resume: Path | None = None, eval_batch: int = 256, workers: int = 0
) -> Generator[Event, None, Outcome]:
    """Train and yield what happens; at the end the model holds the best epoch's weights. Returns the Outcome.

    folder: gets metrics.jsonl, best.safetensors and checkpoints/. resume: a checkpoint of the same run. workers: processes
    that decode pictures which are not in memory.
    Raises UserError when the loss stops being a number, with the facts.
    """
    s, world, method = setup.settings, setup.world, setup.method
    n = len(data.train)
    if n < s.batch_size:
        raise UserError(
            f"batch_size {s.batch_size} is larger than the {n} training images", f"--set train.batch_size={n // 2 or 1}"
        )
    per_epoch = n // s.batch_size * replays(method)
    steps = per_epoch * s.epochs
    state = LoopState()
    for stateful in filter(None, (state, setup.tracker, setup.ema)):
        setup.accelerator.register_for_checkpointing(stateful)
    set_rate = make_schedule(setup.optimizer, s.schedule, s.epochs, per_epoch, s.warmup_epochs)
    probe = subset(data.val, sample(len(data.val), min(s.probe_images, len(data.val)), s.seed))
    if resume is not None:
        checkpoints.load(setup.accelerator, resume)
        if setup.shadow:
            setup.shadow.refresh()
        yield Note(f"resumed at step {state.step} of {steps}")
    metrics = _Metrics(folder / "metrics.jsonl", state.step if resume else None, world)
    if state.step == 0:
        clean, robust, name = _probe(setup, probe, eval_batch)
        if s.init == "loaded":  # a start that no epoch beats is kept
            state.best = robust if method.adversarial else clean
            _save_best(setup, folder)
        metrics.write(step=0, epoch=0, clean=clean, robust=robust, probe=name)
        yield EpochEnd(0, s.epochs, clean, robust, name, False)

    while state.step < steps and not state.collapsed:
        epoch, done = divmod(state.step, per_epoch)
        lists = _epoch_lists(n, epoch, s, world, replays(method))[done * s.accumulate :]
        stream = iter(batches(data.train, lists, setup.accelerator.device, workers))
        set_train_mode(setup)
        for within in range(done, per_epoch):
            begin = time.perf_counter()
            upsilon = setup.tracker if isinstance(setup.tracker, UpsilonTracker) else None
            if upsilon and upsilon.due(state.step, epoch_starts=within == 0):
                yield from _measure_upsilon(setup, upsilon, data.train, state.step, eval_batch)
            set_rate(state.step)
            losses, seen = take_step(setup, stream, state.step)
            if not math.isfinite(losses["total"]):
                raise _not_finite(setup, losses, state.step, epoch)
            state.step += 1
            took = time.perf_counter() - begin
            state.seconds += took
            for name, value in losses.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            lr = setup.optimizer.param_groups[0]["lr"]
            metrics.write(step=state.step, epoch=epoch + 1, lr=lr, **losses)
            setup.accelerator.log({"lr": lr, **losses}, step=state.step)
            yield StepEnd(state.step, steps, epoch + 1, lr, losses, seen * world.size / took)
            if s.checkpoint_steps and state.step % s.checkpoint_steps == 0 and state.step % per_epoch:
                _share_statistics(setup)  # one copy of them is saved
                checkpoints.save(setup.accelerator, world, folder / "checkpoints", state.step)

        _share_statistics(setup)
        clean, robust, name = _probe(setup, probe, eval_batch)
        score = robust if method.adversarial else clean
        best = score > state.best
        if best:
            state.best, state.best_epoch = score, epoch + 1
            _save_best(setup, folder)
        means = {key: value / per_epoch for key, value in state.sums.items()}
        extra = setup.tracker.summary() if setup.tracker else {}
        state.sums = {}
        metrics.write(step=state.step, epoch=epoch + 1, clean=clean, robust=robust, probe=name, best=best, **extra)
        setup.accelerator.log({"clean": clean, "robust": robust, **extra}, step=state.step)
        yield EpochEnd(epoch + 1, s.epochs, clean, robust, name, best, means, extra)
        # against the epochs trained: the first ones from a start that is hardly robust dip before they rise
        state.collapsed = method.adversarial and score < state.trained_best - s.collapse_drop
        state.trained_best = max(state.trained_best, score)
        if state.collapsed:
            yield Collapsed(epoch + 1, robust, state.trained_best, state.best_epoch)
        checkpoints.save(setup.accelerator, world, folder / "checkpoints", state.step)

    metrics.close()
    if state.best_epoch == 0:
        yield Note(
            "no epoch was better on the held-out images than the start, so the start's weights are kept", "warning"
        )
    world.wait()
    if world.is_main:  # the other processes may be on machines that do not see the folder
        setup.model.net.load_state_dict(load_file(str(folder / "best.safetensors")))
    world.copy_from_main(setup.model.net)
    return Outcome(state.step, s.epochs, state.best, state.best_epoch, state.collapsed, state.seconds)


def follow(events: Generator[Event, None, Outcome], tell: Listener) -> Outcome:
    """Pass a training's events on and return its outcome."""
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            return stop.value
        tell(event)


def _epoch_lists(n: int, epoch: int, s: TrainSettings, world: World, times: int) -> list[list[int]]:
    """This process's index lists of an epoch: its rows of every micro-batch of every global batch, each so many times."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(s.seed, _ORDER, epoch))).tolist()
    part = s.batch_size // s.accumulate
    rows = world.rows(part)
    lists = []
    for first in range(0, n // s.batch_size * s.batch_size, s.batch_size):
        starts = range(first, first + s.batch_size, part)
        lists += [order[i + rows.start : i + rows.stop] for i in starts] * times
    return lists


def _share_statistics(setup: Setup) -> None:
    """BatchNorm's statistics drift apart between processes; before a probe or a checkpoint all take their mean."""
    for model in filter(None, (setup.model, setup.ema and setup.ema.module)):
        setup.world.average_buffers(model)


def _measure_upsilon(
    setup: Setup, tracker: UpsilonTracker, train: Split, step: int, batch_size: int
) -> Generator[Event, None, None]:
    """A pass over the training set, or a sub-sample, for the tracker; sharded over the processes."""
    method, world, device = setup.method, setup.world, setup.accelerator.device
    assert isinstance(method, Wasserstein)
    assert isinstance(method.adversary, Budget)
    seed = mix(setup.settings.seed, _UPSILON, step)
    chosen = sample(len(train), tracker.images, seed)
    yield Progress("measuring Upsilon", 0, len(chosen))

    def mine(indices: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = indices[world.rows(len(indices))]
        return batches(train, [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)], device, 0)

    objective, norm = method.adversary.objective, setup.threat.norm
    if tracker.rule == "importance":
        slopes = world.gather(logit_slopes(setup.model, mine(chosen), objective))
        drawn = draw(slopes, tracker.q, max(MIN_DRAWS, len(chosen) // 16), seed)
        some = [chosen[i] for i in drawn.indices.tolist()]
        found = world.gather(gradient_norms(setup.model, mine(some), objective, norm))
        tracker.measure_weighted(found, drawn.weights, drawn.estimate(found, len(train)))
    else:
        tracker.measure(world.gather(gradient_norms(setup.model, mine(chosen), objective, norm)), len(train))


def _probe(setup: Setup, probe: Split, batch_size: int) -> tuple[float, float, str]:
    """Held-out (clean accuracy, robust accuracy, which probe), in full precision; of the average where there is one."""
    model = setup.ema.module if setup.ema else setup.model
    attack = "w-pgd:steps=20" if setup.threat.distributional else "pgd:steps=10"
    report = evaluate(model, probe, [attack], setup.threat, batch_size=batch_size, world=setup.world, split_name="val")
    return report.rows[0].accuracy, report.rows[1].accuracy, f"{attack} {setup.threat.spec}"


def _save_best(setup: Setup, folder: Path) -> None:
    if setup.world.is_main:
        source = setup.ema.module if setup.ema else setup.model
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in source.net.state_dict().items()}
        files.save(folder / "best.safetensors", lambda path: save_file(weights, str(path)))


def _not_finite(setup: Setup, losses: dict[str, float], step: int, epoch: int) -> UserError:
    worst = max((float(w.detach().abs().max()) for w in setup.model.parameters()), default=0.0)
    facts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    lr = setup.optimizer.param_groups[0]["lr"]
    return UserError(
        f"the loss is not a number at step {step + 1} (epoch {epoch + 1}): {facts}; learning rate {lr:g}, "
        f"largest weight {worst:g}, precision {setup.settings.precision}. The last checkpoint is intact.",
        f"try --set train.lr={lr / 10:g}, --set train.clip_norm=1" + (", or --precision no" if setup.shadow else ""),
    )


class _Metrics:
    """metrics.jsonl, one line a step and one an epoch; on resuming, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, resumed_step: int | None, world: World) -> None:
        self.file = None
        if not world.is_main:
            return
        if resumed_step is not None and path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= resumed_step]
            files.write_text(path, "".join(line + "\n" for line in kept))
            self.file = open(path, "a")  # noqa: SIM115
        else:
            self.file = open(path, "w")  # noqa: SIM115

    def write(self, **values: Any) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
