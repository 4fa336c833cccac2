"""Learning-rate schedules: timm's, and the triangle of fast adversarial training. All are functions of the step alone."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

Schedule = Callable[[int], None]


def make_schedule(optimizer: Optimizer, kind: str, epochs: int, steps_per_epoch: int, warmup_epochs: int) -> Schedule:
    """Return set_rate(step): sets the optimiser's learning rate for the step with that number, counted from 0."""
    if kind == "cyclic":
        return _triangle(optimizer, epochs * steps_per_epoch)
    from timm.scheduler import create_scheduler_v2

    # a constant rate is a step schedule that never steps
    decay_epochs = {"step": max(1, epochs // 3), "constant": 10**9}.get(kind, 1)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if kind == "constant" else kind,
        num_epochs=epochs,
        decay_epochs=decay_epochs,
        decay_rate=0.1,
        warmup_epochs=warmup_epochs,
        warmup_lr=0.0,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )  # pyright: ignore[reportArgumentType]
    assert scheduler is not None
    return lambda step: scheduler.step_update(step)


def _triangle(optimizer: Optimizer, total: int) -> Schedule:
    """From 0 up to the rate at half of the run and back to 0 (Wong et al. 2020)."""
    peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rate(step: int) -> None:
        at = (step + 1) / total
        share = 2 * min(at, 1 - at)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * max(share, 0.0)

    return set_rate
