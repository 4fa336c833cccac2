"""The direction of imports in docs/architecture.md, and the few modules that may know each library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "robustify"
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# a library, and the modules that may import it anywhere in their text
KNOWS = {
    "accelerate": {"distributed", "step"},
    "timm": {"sources", "registry", "data", "export", "equivalents", "step", "schedules", "nets"},
    "robustbench": {"sources/robustbench"},
    "typer": {"cli", "console"},
    "rich": {"cli", "console"},
}
# layers from the ground up: a module imports only from its own layer or from those before it
LAYERS = [
    {
        "errors",
        "rng",
        "threat",
        "losses",
        "pixels",
        "modes",
        "awp",
        "gradients",
        "files",
        "durations",
        "shelf",
        "knapsack",
        "duality",
        "intervals",
        "environment",
        "settings",
        "ledger",
    },
    {"attacks", "sensitivity", "importance", "flips", "bounds", "smoothing"},
    {"adversaries"},
    {
        "methods",
        "sources",
        "registry",
        "nets",
        "layers",
        "data",
        "augment",
        "splits",
        "images",
        "folders",
        "cifar",
        "arrays",
        "report",
        "verify",
    },  # what feeds a run
    {
        "recipe",
        "resolve",
        "schedules",
        "distributed",
        "events",
        "batchnorm",
        "compression",
        "sharding",
        "faults",
        "order",
        "unlabelled",
        "launch",
        "metrics",
        "export",
        "card",
        "card_figures",
        "citations",
        "equivalents",
        "formats",
        "front_matter",
        "card_update",
        "leaderboard",
        "model_folder",
        "push",
        "pieces",
        "sanity",
        "readings",
        "compare",
        "plots",
        "curves",
    },
    {"step", "checkpoints", "probe", "train", "evaluation", "measure", "pointwise", "distributional", "recheck"},
    {"inputs", "runs", "memory", "plan", "blend"},
    {"stages"},
    {"pipeline"},
    {"api", "blended", "console"},
    {"cli", "", "__main__"},
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    top = module.split("/")[0] if module not in ("__init__",) else ""
    for number, names in enumerate(LAYERS):
        if top in names:
            return number
    raise AssertionError(f"{module} stands in no layer of tests/test_architecture.py and docs/architecture.md")


@pytest.mark.parametrize("library", KNOWS)
def test_only_these_modules_know(library):
    for module, path in FILES.items():
        known = any(module == allowed or module.startswith(allowed + "/") for allowed in KNOWS[library])
        if not known:
            assert not {name for name in imports(path) if name.split(".")[0] == library}, f"{module} imports {library}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    if module in ("", "__init__"):
        return  # the public names, loaded on first use
    for name in imports(FILES[module]):
        parts = name.split(".")
        if (
            parts[0] == "robustify"
            and len(parts) > 1
            and (PACKAGE / parts[1]).with_suffix(".py").exists() | (PACKAGE / parts[1]).is_dir()
        ):
            assert layer(parts[1]) <= layer(module), f"{module} imports {name}"


def test_results_do_not_know_the_training():
    for module in ("export", "card", "report"):
        assert not {n for n in imports(FILES[module]) if n.startswith(("robustify.train", "robustify.pipeline"))}, (
            module
        )


def test_importing_robustify_costs_nothing():
    heavy = ["torch", "timm", "torchvision", "robustbench", "accelerate", "sklearn", "matplotlib"]
    code = f"import sys, robustify; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_long():
    for module, path in FILES.items():
        assert len(path.read_text().splitlines()) <= 450, module
