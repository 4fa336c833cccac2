"""What goes to stdout and what to stderr, on a terminal and in a pipe, on the main process and on the others."""
from __future__ import annotations

import json
import re
import sys

import pytest

from robustify import console
from robustify.events import Collapsed, EpochEnd, Note, Planned, Progress, StepEnd, headlines
from robustify.report import Report, Row

ROWS = [{"name": "one [x]", "value": "1"}, {"name": "two", "value": "22"}]


def show_to_a_terminal(monkeypatch):
    """Call it inside the test: pytest changes the streams between a fixture and its test."""
    for name, value in {"NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(console, "_out", console._out.__wrapped__)
    err = console._err.__wrapped__()
    monkeypatch.setattr(console, "_err", lambda: err)


def test_a_pipe_gets_tabs(capsys):
    console.table(ROWS)
    console.facts({"a": 1, "b": None})
    assert capsys.readouterr() == ("name\tvalue\none [x]\t1\ntwo\t22\na\t1\n", "")


def test_a_terminal_gets_columns_without_colour_if_asked(capsys, monkeypatch):
    show_to_a_terminal(monkeypatch)
    console.table(ROWS)
    out = capsys.readouterr().out
    assert "\x1b[3" not in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert [line.split() for line in plain.splitlines()] == [["name", "value"], ["one", "[x]", "1"], ["two", "22"]]
    assert "\t" not in out


def test_json_is_json_even_for_infinities(capsys):
    console.result_json({"p": float("inf"), "pair": (1, 2)})
    assert json.loads(capsys.readouterr().out) == {"p": "inf", "pair": [1, 2]}


def test_mistakes_go_to_stderr(capsys):
    console.mistake("too big", "take less")
    assert capsys.readouterr() == ("", "error: too big\nhint: take less\n")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_only_the_main_process_speaks(capsys, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    console.result("result")
    console.table(ROWS)
    console.note("note")
    with console.Watch() as watch:
        watch(Note("note"))
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_comes_every_five_seconds(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Watch() as watch:
        for step in range(1, 61):
            watch(StepEnd(step, 60, 1, 0.1, {"total": 1.5}, 320.0))
            clock[0] += 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 12
    assert lines[1] == "training 6/60, epoch 1, loss 1.5, 320 images/s, 54 s left"


def test_events_that_matter_always_show(capsys):
    with console.Watch() as watch:
        watch(Progress("loading the model", 0, 1))
        watch(Note("slow", "warning"))
        watch(Planned({"model": "tiny", "classifier": None}))
        watch(EpochEnd(0, 4, 0.9, 0.1, "pgd:steps=10 Linf:8/255", False))
        watch(EpochEnd(1, 4, 0.8, 0.3, "pgd:steps=10 Linf:8/255", True))
        watch(Collapsed(3, 0.01, 0.3, 1, overfitted=True, remedy="n-fgsm"))
        watch(EpochEnd(4, 4, 0.8, 0.2, "pgd:steps=10 Linf:8/255", True))
        watch(Collapsed(2, 0.0, 0.0, 1, overfitted=True, remedy="stop"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["loading the model", "warning: slow", "model: tiny"]
    assert lines[3].startswith("before training: clean 90.00 %, robust 10.00 % (pgd:steps=10 Linf:8/255")
    assert lines[4].startswith("warning: robust accuracy collapsed in epoch 3, from 30.00 % to 1.00 %")
    assert lines[5] == "epoch 4/4: clean 80.00 %, robust 20.00 %, best so far"
    assert lines[6].startswith("warning: robust accuracy has come to nothing by epoch 2: 0.00 % (catastrophic overfitting)")


def test_a_terminal_gets_a_bar_and_lines_above_it(capsys, monkeypatch):
    show_to_a_terminal(monkeypatch)
    with console.Watch() as watch:
        watch(Progress("loading the model", 0, 1))
        for done in range(1, 4):
            watch(Progress("pgd", done, 3))
        watch(Note("done"))
        with console.status("loading"):
            pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "pgd" in err
    assert "3/3" in err
    assert "done" in err


def test_over_counts_what_passes(capsys):
    with console.Watch() as watch:
        assert list(watch.over("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "letters 0/3\n"


def test_durations_read_well():
    assert [console.duration(s) for s in (5, 600, 9000)] == ["5 s", "10 min", "2.5 h"]


def test_a_headline_names_its_attacks():
    """A figure of one gradient step must not pass for one of a strong attack."""
    rows = [Row("clean", None, 10, 9, kind="clean"), Row("fgsm", "Linf:8/255", 10, 4)]
    assert headlines(Report("m", "d", "test", rows)) == "clean 90.00 %, Linf 8/255 40.00 % (fgsm)"
