"""What a run reports while it goes: plain data, shown by the command line or by the caller's own function, and its words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustify.intervals import percent
from robustify.report import Report


@dataclass(frozen=True)
class Note:
    """Something worth a line. level: info or warning."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class Progress:
    """done of total units of a stage that takes longer than a moment."""

    stage: str
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True)
class Planned:
    """The resolved plan: what trains, on what, at what cost in passes."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class StepEnd:
    """One optimiser step. step counts from 1 over the whole run; rate is images per second."""

    step: int
    steps: int
    epoch: int
    lr: float
    losses: dict[str, float]
    rate: float


@dataclass(frozen=True)
class EpochEnd:
    """The held-out figures after an epoch (epoch 0: before training), in [0,1]; extra: what the method logs."""

    epoch: int
    epochs: int
    clean: float
    robust: float
    probe: str
    best: bool
    losses: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Collapsed:
    """Robust accuracy fell by more than the limit below its best and stayed there, or of a one-step method was never there: the
    weights go back to best_epoch's.

    overfitted: the one-step attack has gone blind, so this is catastrophic overfitting. remedy: what the training goes on
    with, or `stop`.
    """

    epoch: int
    robust: float
    best: float
    best_epoch: int
    overfitted: bool
    remedy: str


@dataclass(frozen=True)
class Measured:
    """A finished evaluation. when: before or after."""

    when: str
    report: Report


@dataclass(frozen=True)
class Exported:
    path: Path


Event = Note | Progress | Planned | StepEnd | EpochEnd | Collapsed | Measured | Exported
Listener = Callable[[Event], None]


def said(event: Event) -> list[str]:
    """Return what is worth telling anyone, in lines: of an epoch, a collapse, a measurement, an export and a note."""
    match event:
        case Note(text, level):
            return [f"warning: {text}" if level == "warning" else text]
        case EpochEnd():
            return [_epoch(event)]
        case Collapsed():
            cause = " (catastrophic overfitting)" if event.overfitted else ""
            end = "training ends" if event.remedy == "stop" else f"training goes on with {event.remedy}"
            fell = event.robust < event.best
            what = (
                f"robust accuracy collapsed in epoch {event.epoch}, from {percent(event.best)} to {percent(event.robust)}"
                if fell
                else f"robust accuracy has come to nothing by epoch {event.epoch}: {percent(event.robust)}"
            )
            return [f"warning: {what}{cause}; back to epoch {event.best_epoch}, {end}"]
        case Measured(when, report):
            return [f"{when}: {text}" for text in (headlines(report), *report.notes)]
        case Exported(path):
            return [f"exported {path}"]
        case _:
            return []


def headlines(report: Report) -> str:
    """Return the report's few numbers in one line: clean, and of each threat and of several norms the worst case over the
    attacks named."""
    clean = [f"clean {percent(report.clean.accuracy)}"] if report.clean else []
    found = report.per_threat()
    robust = [f"{h.threat.replace(':', ' ')} {percent(h.accuracy)} ({', '.join(h.attacks)})" for h in found]
    return ", ".join(clean + robust)


def _epoch(event: EpochEnd) -> str:
    found = f"clean {percent(event.clean)}, robust {percent(event.robust)}"
    if event.epoch == 0:
        return f"before training: {found} ({event.probe}, on held-out images, here and in every epoch)"
    return f"epoch {event.epoch}/{event.epochs}: {found}{', best so far' if event.best else ''}"
