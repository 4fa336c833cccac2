"""Exit codes, where the text goes, what it costs to ask for help."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from robustify import shelf

VERBS = ["finetune", "evaluate", "compare", "blend", "sensitivity", "export", "card", "push", "ls", "show", "copy", "env"]


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["ls", "recipes"], ["show", "quickstart"]])
def test_what_needs_no_torch_does_not_load_it(arguments):
    code = (
        "import atexit, sys\n"
        "from robustify.cli import main\n"
        "atexit.register(lambda: print([m for m in ('torch', 'timm') if m in sys.modules], file=sys.stderr))\n"
        f"main({arguments})"
    )
    done = python("-c", code)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == "[]\n"


def test_every_verb_says_what_it_does_with_an_example(robustify):
    overview = robustify("--help").out
    for verb in VERBS:
        text = robustify(verb, "--help").out
        usage, purpose, *rest = text.split("\n\n")
        assert usage.startswith(f"Usage: robustify {verb} ")
        assert purpose.strip().endswith(".")
        assert "\n" not in purpose.strip()
        assert any(part.strip().startswith(f"robustify {verb}") for part in rest)
        assert f"  {verb} " in overview
    assert robustify("--version").out.strip()[0].isdigit()


def test_usage_errors_exit_with_2(robustify):
    for arguments in (["nope"], ["finetune", "--nope"], ["evaluate"], ["evaluate", "digits", "--batch-size", "0"]):
        ran = robustify(*arguments)
        assert ran.code == 2
        assert ran.out == ""
        assert "Error" in ran.err


def test_a_mistake_is_two_lines_and_exit_2(robustify):
    ran = robustify("show", "quickstrat")
    assert (ran.code, ran.out) == (2, "")
    first, second = ran.err.splitlines()
    assert first == "error: no recipe 'quickstrat'. Did you mean quickstart?"
    assert second.startswith("hint: there are: ")


def test_a_mistake_is_json_too_if_asked(robustify):
    ran = robustify("finetune", "nope", "--json")
    assert ran.code == 2
    assert "a model is named by --model nope; there are: " in ran.err
    assert json.loads(ran.out)["error"].startswith("no recipe 'nope'")
    assert ran.err.startswith("error: no recipe 'nope'")


def test_a_bug_keeps_its_traceback(robustify, monkeypatch, capsys):
    monkeypatch.setattr(shelf, "names", lambda: 1 / 0)
    for flags, said in ([], ""), (["--json"], {"error": "ZeroDivisionError: division by zero", "hint": ""}):
        with pytest.raises(ZeroDivisionError):
            robustify("ls", "recipes", *flags)
        out = capsys.readouterr().out
        assert (json.loads(out) if out else "") == said


def test_a_full_disk_is_no_bug(robustify, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelf, "names", full)
    ran = robustify("ls", "recipes", "--json")
    assert ran.code == 2
    assert json.loads(ran.out)["error"] == "the disk of the output is full"
    assert ran.err.startswith("error: the disk of the output is full\nhint: free some space")


def test_an_interruption_is_one_line(robustify, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(shelf, "text", interrupt)
    ran = robustify("show", "quickstart")
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")


def test_python_m_works_and_a_closed_pipe_is_silent():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "robustify", "ls", "data"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""
    assert python("-m", "robustify", "ls", "data").stdout.startswith("name\tabout\ndigits\t")


def test_other_processes_are_silent_but_for_mistakes(robustify, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ran = robustify("show", "quickstart")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    ran = robustify("show", "nope")  # it may be this process alone that has met it
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error [process 1]: no recipe 'nope'")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_breaks_in_the_interpreters_shutdown_spoils_no_exit_code_of_several_processes(code):
    program = f"""
import atexit, os, sys
from robustify import shelf
from robustify.cli import main

class Late:
    def __del__(self, abort=os.abort):
        abort()  # as gloo does when one of its threads frees a tensor so late

def text(name):
    atexit.register(print, "handled")
    return name / 0 if {code} == 1 else real(name)

sys.late, real, shelf.text = Late(), shelf.text, text
main(["show", {"nope" if code == 2 else "quickstart"!r}])
"""
    for processes, ended in ((1, -6), (2, code)):
        environment = {**os.environ, "WORLD_SIZE": str(processes)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == ended, done.stderr
        assert ("Traceback" in done.stderr, done.stdout.endswith("handled\n")) == (code == 1, True)
