"""What people see. Results go to stdout: a table on a terminal, tab-separated lines in a pipe, JSON for scripts.
Progress, notes and errors go to stderr. Of several processes only the main one speaks."""
from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from robustify.durations import duration
from robustify.events import EpochEnd, Event, Planned, Progress, StepEnd, said
from robustify.report import plain

if TYPE_CHECKING:
    from robustify.compare import Comparison  # loads torch

Item = TypeVar("Item")
EVERY = 5.0  # seconds between two lines of progress where there is no terminal


def is_main() -> bool:
    """Whether this process is the one that speaks."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))


def quiet_libraries() -> None:
    """Silence what other libraries say to their developers, unless Python was told otherwise. Comes before torch loads."""
    if not sys.warnoptions:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # it prints its own stack beside the exception that we explain
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        logging.getLogger("huggingface_hub.utils._http").addFilter(_trying_again)


def _trying_again(record: logging.LogRecord) -> bool:
    """Say once what huggingface_hub says in two lines of every request that it repeats; let its other lines pass."""
    text = record.getMessage()
    if "thrown while requesting" in text:
        status = re.search(r"HTTP Error (\d+)", text)
        _say_once(f"the Hugging Face hub {f'answers with error {status[1]}' if status else 'does not answer'}; trying again")
        return False
    return not text.startswith(("Retrying in", "Rate limited"))


@cache
def _say_once(text: str) -> None:
    note(text)


def result(text: str) -> None:
    """Print a line of the result on stdout."""
    if is_main():
        print(text, flush=True)


def result_json(value: Any) -> None:
    """Print the whole result on stdout as JSON."""
    result(json.dumps(plain(value), indent=2, ensure_ascii=False))


def table(rows: Sequence[Mapping[str, str]], header: bool = True) -> None:
    """Print rows of equal keys on stdout: aligned on a terminal, separated by tabs elsewhere."""
    if not rows or not is_main():
        return
    if not sys.stdout.isatty():
        lines = ([list(rows[0])] if header else []) + [list(row.values()) for row in rows]
        print("\n".join("\t".join(" ".join(cell.split()) for cell in line) for line in lines), flush=True)
        return
    shown = Table(box=None, pad_edge=False, show_header=header, header_style="bold")
    for number, key in enumerate(rows[0]):
        numeric = all(row[key][:1] in "-+.0123456789[" for row in rows)
        shown.add_column(key, justify="right" if numeric else "left", overflow="fold", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row.values()))
    _out().print(shown)


def changes(found: Comparison) -> None:
    """Print what one model gained or lost, on stdout; why an interval is missing, on stderr."""
    table(found.changes())
    unpaired(found)


def unpaired(*comparisons: Comparison) -> None:
    """Say why differences have no interval, where some have none."""
    bare = [one for found in comparisons for one in found.differences if one.interval is None]
    if any((one.threat or "").startswith("W") for one in bare):
        note("a difference without an interval is of images that share one budget, which are not independent")
    if any(not (one.threat or "").startswith("W") for one in bare):
        note("a difference without an interval is of a report whose verdicts, the .npz beside it, are missing")


def facts(values: Mapping[str, Any]) -> None:
    """Print names and values on stdout, one pair a line."""
    table([{"name": name, "value": str(value)} for name, value in values.items() if value is not None], header=False)


def note(text: str, style: str = "", anywhere: bool = False) -> None:
    """Print a line on stderr; of several processes only the main one's, unless `anywhere`."""
    if not (anywhere or is_main()):
        return
    sys.stdout.flush()
    if _err().is_terminal:
        _err().print(text, style=style, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def mistake(message: str, hint: str = "") -> None:
    """Print what is wrong and what would do, on stderr."""
    process = "" if is_main() else f" [process {os.environ.get('RANK')}]"
    note(f"error{process}: {message}", "red", anywhere=True)
    if hint:
        note(f"hint: {hint}", anywhere=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a line while the block runs, on a terminal only: for the seconds in which libraries load."""
    if not (is_main() and _err().is_terminal):
        yield
        return
    with _err().status(text):
        yield


def flush() -> None:
    """Write what is left. A reader that has gone away, as `head` does, is nobody's mistake."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def _out() -> Console:
    return Console(highlight=False)


@cache
def _err() -> Console:
    return Console(stderr=True, highlight=False, markup=False)


class Watch:
    """A listener that shows a run on stderr: a bar with rate and remaining time on a terminal, sparse lines elsewhere.

    Use it as a context manager, so that the bar is gone when an error is printed.
    """

    def __init__(self) -> None:
        self.live = is_main() and _err().is_terminal
        self.bar: Bar | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.began, self.began_at = 0.0, 0
        self.spoke = -EVERY

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Progress(stage, done, total, detail):
                self._advance(stage, done, total, detail)
            case StepEnd():
                detail = f"epoch {event.epoch}, loss {event.losses['total']:.4g}, {event.rate:.0f} images/s"
                self._advance("training", event.step, event.steps, detail)
            case Planned(values):
                for name, value in values.items():
                    if value is not None:
                        self._say(f"{name}: {value}")
            case EpochEnd() if not (self.live or self._silent() or event.epoch in (0, event.epochs)):
                pass
            case _:
                for text in said(event):
                    self._say(text, "yellow" if text.startswith("warning: ") else "")

    def over(self, items: Iterable[Item], stage: str, total: int) -> Iterator[Item]:
        """Yield the items, and show how many are done."""
        for done, item in enumerate(items):
            self(Progress(stage, done, total))
            yield item

    def _say(self, text: str, style: str = "") -> None:
        note(text, style)
        self.spoke = time.monotonic()

    def _silent(self) -> bool:
        """Whether it has been long since the last line."""
        return time.monotonic() - self.spoke >= EVERY

    def _advance(self, stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if stage != self.stage or done < self.began_at:
            self.stage, self.began, self.began_at = stage, now, done
            if self.bar and self.task is not None:
                self.bar.remove_task(self.task)
                self.task = None
        rate = (done - self.began_at) / max(now - self.began, 1e-9)
        if self.live:
            shown = detail or (f"{rate:.3g}/s" if rate else "")
            self._draw(done, total, f"{done}/{total} {shown}" if total > 1 else shown)
        elif self._silent() and done < total:
            left = f"{duration((total - done) / rate)} left" if rate else ""
            said = [f"{stage} {done}/{total}" if total > 1 else stage, detail, left]
            self._say(", ".join(part for part in said if part))

    def _draw(self, done: int, total: int, detail: str) -> None:
        bar = self.bar
        if bar is None:
            columns = ("{task.description}", BarColumn(), "{task.fields[detail]}", TimeRemainingColumn())
            self.bar = bar = Bar(*columns, console=_err(), transient=True)
            bar.start()
        if self.task is None:
            self.task = bar.add_task(self.stage, total=total if total > 1 else None, completed=done, detail=detail)
        bar.update(self.task, completed=done, detail=detail)
