"""The README and the pages name no verb, flag, attack, threat or setting that is not there; one page is run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from robustify.attacks import AttackSpec
from robustify.cli import app
from robustify.resolve import resolve
from robustify.threat import ThreatModel

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
FLAGS = {verb: {flag for option in command.params for flag in option.opts} for verb, command in VERBS.items()}
BENCHMARKS = "".join(path.read_text(encoding="utf8") for path in (ROOT / "benchmarks").glob("*.py"))
OTHERS = {"--no-deps", "--upgrade", "--help", "--version"}  # pip's, and those of robustify itself
OTHERS |= {"--standalone", "--nproc-per-node"}  # torchrun's
OTHERS |= set(re.findall(r"add_argument\(\s*\"(--[a-z0-9-]+)\"", BENCHMARKS))
CHECKS = {"--attack": AttackSpec.parse, "--threat": ThreatModel.parse}


def blocks(text: str, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `robustify ...` in code: fenced, indented or inline; those of a synopsis, [...], are not."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"^    (.*)", text, re.MULTILINE) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    typed = [re.split(r"&&|\s#", re.sub(r"^.*&& ", "", line))[0] for line in lines]
    found = [re.sub(r"^(\S*/)?robustify |^accelerate launch -m robustify ", "", line) for line in typed if " " in line]
    pairs = zip(found, [line for line in typed if " " in line], strict=True)
    return [shlex.split(rest) for rest, line in pairs if rest != line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_typed(page):
    for verb, *arguments in commands(page.read_text(encoding="utf8")):
        assert verb in FLAGS, f"robustify {verb}"
        for number, argument in enumerate(arguments):
            flag, _, value = argument.strip("[]").partition("=")
            if not flag.startswith("-"):
                continue
            assert flag in FLAGS[verb], f"robustify {verb} {flag}"
            value = value or (arguments[number + 1] if number + 1 < len(arguments) else "")
            if flag in CHECKS and verb != "ls" and not re.fullmatch(r"[A-Z]+\]?(\.\.\.)?", value):
                CHECKS[flag](value)
            if flag == "--set" and "=" in value and "KEY" not in value.upper():
                resolve("quickstart", settings=[value])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_is_one(page):
    known = OTHERS.union(*FLAGS.values())
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z0-9]", page.read_text(encoding="utf8")))
    assert named <= known, named - known


def test_the_commands_are_found():
    text = "Run `robustify ls attacks`.\n\n    robustify show x  # why\n\n```bash\na && .venv/bin/robustify env --json\n```\n"
    assert commands(text) == [["env", "--json"], ["show", "x"], ["ls", "attacks"]]


def test_the_page_about_measuring_runs(robustify, finished, tmp_path):
    """Its commands in their order, on few images, after a run that left what the quickstart would."""
    run = tmp_path / "runs" / "digits-wasserstein"
    shutil.copytree(finished[0], run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"limit: 300", "limit: null", recipe))
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf8")
    typed = [shlex.split(line)[1:] for block in blocks(page, "bash") for line in block.splitlines()]
    assert len(typed) > 8
    for arguments in typed:
        if "--processes" in arguments:
            continue  # tests/ddp
        cheap = ["autoattack:steps=2,queries=5,targets=2" if part == "autoattack" else part for part in arguments]
        few = ["--n", "12"] if arguments[0] == "evaluate" and "--recheck" not in arguments else []
        ran = robustify(*cheap, *few)
        assert ran.code == 0, f"{shlex.join(arguments)}\n{ran.err}"
    (python,) = blocks(page, "python")
    exec(python.replace("n=200", "n=12"), {})
    written = {"digits.json", "digits.npz", "digits.adversarials", "hardened.json", "gain.png", "python.json"}
    written |= {"curve.png", "estimates.png"}
    assert written <= {path.name for path in tmp_path.iterdir()}
