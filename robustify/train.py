"""The training loop, one for all methods, readable from top to bottom.

It owns the order of the data, the NaN check, the held-out probe, the collapse and the checkpoints; one step is step.py. Every
random number is a function of (seed, step, place in the global batch), so a run that was killed continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from robustify import checkpoints, files
from robustify.adversaries.budget import Budget
from robustify.compression import attach, compression_note, gradient_bytes
from robustify.data import Data, Split, batches, subset
from robustify.errors import UserError
from robustify.evaluation import sample
from robustify.events import Collapsed, EpochEnd, Event, Listener, Note, Progress, StepEnd
from robustify.faults import Preempted, Termination
from robustify.gradients import gradient_norms
from robustify.importance import MIN_DRAWS, draw, logit_slopes
from robustify.intervals import few_images
from robustify.methods.base import replays
from robustify.methods.remedies import remedied
from robustify.methods.wasserstein import Wasserstein
from robustify.metrics import Metrics
from robustify.order import Pool, epoch_lists, interleaved, pool_lists, pool_share
from robustify.probe import Standing, accuracies, alignment, judge
from robustify.recipe import TrainSettings
from robustify.rng import mix
from robustify.schedules import BY_SCORE, make_schedule
from robustify.sensitivity import UpsilonTracker
from robustify.step import Setup, set_train_mode, share_statistics, take_step

_UPSILON = 13  # first word of the seed
FEW = 100  # held-out images, on which an accuracy has a standard error of up to 5 points


@dataclass
class LoopState(Standing):
    """What the loop must remember to continue: saved with every checkpoint.

    epoch: how many are over, with their probe; sums: of the losses of the one that is not.
    gradient_bytes: what a process put into the exchange per step, in the last epoch whose steps are made; 0 without one.
    """

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    gradient_bytes: float = 0.0
    collapsed: bool = False

    def state_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "epoch" not in state:
            raise ValueError("it is an older robustify's, which did not count the epochs that are over")
        self.__dict__.update(state)


@dataclass(frozen=True)
class Outcome:
    """How the training went. epochs: that it took; best: held-out robust accuracy of the kept one; remedies: taken, in order,
    when robustness collapsed; collapsed: whether that ended the training; seconds: spent in the loop."""

    steps: int
    epochs: int
    best: float
    best_epoch: int
    collapsed: bool
    seconds: float
    remedies: tuple[str, ...] = ()


def train(
    setup: Setup,
    data: Data,
    folder: Path,
    *,
    resume: Path | None = None,
    eval_batch: int = 256,
    workers: int = 0,
    pool: Pool | None = None,
    termination: Termination | None = None,
) -> Generator[Event, None, Outcome]:
    """Train and yield what happens; at the end the model holds the best epoch's weights. Returns the Outcome.

    folder: gets metrics.jsonl, best.safetensors and checkpoints/. resume: a checkpoint of the same run. workers: processes
    that decode pictures which are not in memory. pool: images that take their share of every batch; an epoch goes over the
    labelled ones. termination: once it is asked for on any process, the state is saved at
    the end of the step, or of a batch of Upsilon's measurement, and Preempted raised; in a probe, before which the state is
    saved, at once.
    Raises UserError when the loss stops being a number, with the facts.
    """
    termination = termination or Termination()
    s, world, method = setup.settings, setup.world, setup.method
    n = len(data.train)
    unlabelled = 0 if pool is None else pool_share(s.batch_size, pool.share)
    labelled, times = s.batch_size - unlabelled, replays(method)
    per_epoch = n // labelled * times
    steps = per_epoch * s.epochs
    state = LoopState()
    schedule = make_schedule(setup.optimizer, s.schedule, s.epochs, per_epoch, s.warmup_epochs, s.accelat)
    own = {"loop": state, "schedule": schedule}
    held = subset(data.val, sample(len(data.val), min(s.probe_images, len(data.val)), s.seed))
    if len(held) < FEW:
        yield Note(
            f"{few_images(len(held), 'choose the best epoch and tell a collapse')}; hold out more (data.val_fraction, "
            "train.probe_images; val_data, probe_images in robustify.harden)",
            "warning",
        )
    setup.hook = attach(
        setup.forward,
        s.compress,
        data.train.batch([0, 1])[0].to(world.device),
        seed=s.seed,
        error_feedback=s.error_feedback,
        rank=s.compress_rank,
    )
    if (useless := compression_note(setup.model, s.compress, world.size)) is not None:
        yield Note(useless, "warning")
    if resume is not None:
        checkpoints.resume(setup, own, resume)
        setup.method = remedied(method, state.remedies)
        termination.saved = saved(state.step)
        yield Note(f"resumed at step {state.step} of {steps}")
    metrics = Metrics(folder / "metrics.jsonl" if world.is_main else None, state.step if resume else None, state.epoch)
    if resume is None:
        found = accuracies(setup, held, eval_batch)
        clean, robust, name = found.clean, found.robust, found.probe
        if s.init == "loaded":  # a start that no epoch beats is kept
            state.best = found.score(method)
            _save_best(setup, folder)
        metrics.write(step=0, epoch=0, clean=clean, robust=robust, probe=name)
        yield EpochEnd(0, s.epochs, clean, robust, name, False)

    while state.epoch < s.epochs and not state.collapsed:
        epoch, done = state.epoch, state.step - state.epoch * per_epoch
        lists = epoch_lists(n, epoch, s, world, labelled, times)[done * s.accumulate :]
        stream = iter(batches(data.train, lists, world.device, workers))
        if pool is not None:
            first = epoch * per_epoch // times
            more = pool_lists(len(pool.images), first, per_epoch // times, s, world, unlabelled, times)
            stream = interleaved(stream, batches(pool.images, more[done * s.accumulate :], world.device, workers))
        set_train_mode(setup)
        termination.hold()
        for within in range(done, per_epoch):
            begin = time.perf_counter()
            upsilon = setup.tracker if isinstance(setup.tracker, UpsilonTracker) else None
            if upsilon and upsilon.due(state.step, epoch_starts=within == 0):
                try:
                    yield from _measure_upsilon(setup, upsilon, data.train, state.step, eval_batch, termination)
                except Preempted:
                    checkpoints.save(setup, own, folder / "checkpoints", state.step)
                    raise
            schedule.set(state.step)
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
            ended, probe_next = world.any(termination.asked), within + 1 == per_epoch
            if probe_next:
                state.gradient_bytes = _bytes_per_step(setup, per_epoch - done)
            if ended or probe_next or (s.checkpoint_steps and state.step % s.checkpoint_steps == 0):
                checkpoints.save(setup, own, folder / "checkpoints", state.step)
                termination.saved = saved(state.step)
            if ended:
                raise Preempted(saved(state.step))
        termination.release()

        share_statistics(setup)
        found = accuracies(setup, held, eval_batch)
        clean, robust, name = found.clean, found.robust, found.probe
        aligned = alignment(setup, held, eval_batch) if method.one_step else None
        verdict = judge(state, found, aligned, len(held), method, s)
        termination.hold()
        if verdict.best:
            state.best, state.best_epoch = verdict.score, epoch + 1
            _save_best(setup, folder)
        means = {key: value / per_epoch for key, value in state.sums.items()}
        extra = setup.tracker.summary() if setup.tracker else {}
        if state.gradient_bytes:
            extra |= {"gradient_bytes_per_step": state.gradient_bytes}
        if aligned is not None:
            extra |= {"gradient_alignment": aligned}
        state.sums, state.epoch = {}, epoch + 1
        metrics.write(step=state.step, epoch=epoch + 1, clean=clean, robust=robust, probe=name, best=verdict.best, **extra)
        setup.accelerator.log({"clean": clean, "robust": robust, **extra}, step=state.step)
        yield EpochEnd(epoch + 1, s.epochs, clean, robust, name, verdict.best, means, extra)
        if (slow := world.slow_process(per_epoch - done)) is not None:
            yield Note(slow, "warning")
        if found.constant and not verdict.best:
            yield Note(
                f"epoch {epoch + 1} is right on images of one class only: such a network withstands every attack, and counts "
                "as nothing here; a lower learning rate may help (train.lr; lr in robustify.harden)",
                "warning",
            )
        schedule.tell(verdict.score)
        if verdict.collapsed:
            yield Collapsed(epoch + 1, robust, state.trained_best, state.best_epoch, verdict.overfitted, verdict.remedy)
            state.collapsed = verdict.remedy == "stop"
            if not state.collapsed:
                state.remedies = (*state.remedies, verdict.remedy)
                setup.method = remedied(method, state.remedies)
                _roll_back(setup, folder)
        state.fallen = verdict.fallen and not verdict.collapsed  # what comes next starts from the best epoch
        if verdict.score > state.trained_best:
            state.trained_best, state.aligned = verdict.score, aligned or 0.0
        checkpoints.save(setup, own, folder / "checkpoints", state.step)
        if world.any(termination.asked):
            raise Preempted(saved(state.step))
    termination.release()

    metrics.close()
    if state.best_epoch == 0:
        yield Note(
            "no epoch was better on the held-out images than the start, so the start's weights are kept: train for more "
            "epochs, at another learning rate (train.lr), or take the last epoch's (train.keep: last; lr, keep='last' in "
            "robustify.harden)",
            "warning",
        )
    elif s.keep == "last" and state.best_epoch < state.epoch and not state.collapsed:
        yield Note(f"robust accuracy fell in the last epoch, so the weights of epoch {state.best_epoch} are kept", "warning")
    _load_best(setup, folder)
    return Outcome(state.step, state.epoch, state.best, state.best_epoch, state.collapsed, state.seconds, state.remedies)


def saved(step: int) -> str:
    """Say what is on disk."""
    return f"the state after step {step} is saved"


def check_held_out(settings: TrainSettings, val: Split) -> None:
    """Raise UserError when there are no held-out images, which every training is judged on."""
    if not len(val):
        raise UserError(
            f"no images are held out, but schedule {settings.schedule} follows the accuracy on them"
            if settings.schedule in BY_SCORE
            else "no images are held out, but the best epoch is chosen on them",
            "hold some out of the training set (data.val_fraction=0.1, or leave val_data out)",
        )


def follow(events: Generator[Event, None, Outcome], tell: Listener) -> Outcome:
    """Pass a training's events on and return its outcome."""
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            return stop.value
        tell(event)


def _measure_upsilon(
    setup: Setup, tracker: UpsilonTracker, train: Split, step: int, batch_size: int, termination: Termination
) -> Generator[Event, None, None]:
    """A pass over the training set, or a sub-sample, for the tracker; sharded over the processes.

    Raises Preempted, on all processes, between two batches.
    """
    method, world, device = setup.method, setup.world, setup.accelerator.device
    assert isinstance(method, Wasserstein)
    assert isinstance(method.adversary, Budget)
    seed = mix(setup.settings.seed, _UPSILON, step)
    chosen = sample(len(train), tracker.images, seed)
    yield Progress("measuring Upsilon", 0, len(chosen))

    def mine(indices: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = indices[world.rows(len(indices))]
        most = -(-len(indices) // world.size)  # that a process has: all ask equally often
        parts = [rows[i : i + batch_size] for i in range(0, most, batch_size)]
        images = batches(train, [part for part in parts if part], device, 0)
        for part in parts:
            if world.any(termination.asked):
                raise Preempted(saved(step))
            if part:
                yield next(images)

    objective, norm = method.adversary.objective, setup.threat.norm
    if tracker.rule == "importance":
        slopes = world.gather(logit_slopes(setup.model, mine(chosen), objective))
        drawn = draw(slopes, tracker.q, max(MIN_DRAWS, len(chosen) // 16), seed)
        some = [chosen[i] for i in drawn.indices.tolist()]
        found = world.gather(gradient_norms(setup.model, mine(some), objective, norm))
        tracker.measure_weighted(found, drawn.weights, drawn.estimate(found, len(train)))
    else:
        tracker.measure(world.gather(gradient_norms(setup.model, mine(chosen), objective, norm)), len(train))


def _bytes_per_step(setup: Setup, steps: int) -> float:
    """What this process has put into the exchange of gradients in each of so many steps; the count begins anew."""
    plain = gradient_bytes(setup.model) * setup.exchanges / steps
    setup.exchanges = 0
    if setup.world.size == 1:
        return 0.0
    return setup.hook.payload() if setup.hook else plain


def _save_best(setup: Setup, folder: Path) -> None:
    if setup.world.is_main:
        source = setup.ema.module if setup.ema else setup.model
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in source.net.state_dict().items()}
        files.save(folder / "best.safetensors", lambda path: save_file(weights, str(path)))


def _load_best(setup: Setup, folder: Path) -> None:
    setup.world.wait()
    if setup.world.is_main:  # the other processes may be on machines that do not see the folder
        setup.model.net.load_state_dict(load_file(str(folder / "best.safetensors")))
    setup.world.copy_from_main(setup.model.net)


def _roll_back(setup: Setup, folder: Path) -> None:
    """Back to the best epoch's weights, and nothing left of the way that led astray: no momentum, no newer average."""
    _load_best(setup, folder)
    setup.optimizer.optimizer.state.clear()
    if setup.ema:
        setup.ema.module.load_state_dict(setup.model.state_dict())
    if setup.shards:
        setup.shards.scatter()
    if setup.shadow:
        setup.shadow.refresh()


def _not_finite(setup: Setup, losses: dict[str, float], step: int, epoch: int) -> UserError:
    worst = max((float(w.detach().abs().max()) for w in setup.model.parameters()), default=0.0)
    facts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    lr = setup.optimizer.param_groups[0]["lr"]
    return UserError(
        f"the loss is not a number at step {step + 1} (epoch {epoch + 1}): {facts}; learning rate {lr:g}, "
        f"largest weight {worst:g}, precision {setup.settings.precision}. The last checkpoint is intact.",
        f"try --set train.lr={lr / 10:g}, --set train.clip_norm=1" + (", or --precision no" if setup.shadow else "")
        + f" (lr={lr / 10:g}, clip_norm=1 in robustify.harden)",
    )
