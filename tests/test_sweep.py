"""A sample of benchmarks/sweep_models.py: each kind of model there is, from its published file to another process."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "sweep_models.py"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep_models", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_models"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sweep_models"]


@pytest.fixture(scope="module")
def machine(sweep, tmp_path_factory):
    with sweep.machine(None, tmp_path_factory.mktemp("sweep")) as here:
        yield here


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("timm:deit_tiny_distilled_patch16_224", ["head", "head_dist"]),  # two heads, images of a fixed size
        ("timm:levit_128s", ["head.linear", "head_dist.linear"]),  # keeps in eval mode what it computed from its weights
        ("timm:mobilenetv3_small_050", ["classifier"]),
        ("robustbench:cifar10/Linf/Sehwag2021Proxy_R18", ["linear"]),
    ],
)
def test_a_sample(sweep, machine, name, classifier):
    row = sweep.sweep({"name": name, "family": name}, machine)
    assert row["outcome"] == "passed", f"{row['stage']}: {row.get('reason')}"
    assert row["classifier"] == classifier
    assert row["weights"]
    again = sweep.sweep({"name": name, "family": name}, machine)
    assert again["outcome"] == "same"
    assert name in again["reason"]


def test_what_the_memory_does_not_hold_is_not_tried(sweep, machine):
    small = dataclasses.replace(machine, memory=1.8e9)
    row = sweep.sweep({"name": "timm:resnet50", "family": "timm resnet"}, small)
    assert row["outcome"] == "too large"
    assert row["reason"] == "needs 1.91 GB of memory, 1.8 are free"


def test_a_large_model_with_fewer_blocks_is_no_pass_of_its_size(sweep, machine):
    entry = sweep.narrowed({"name": "timm:vit_tiny_patch16_384", "family": "timm vision_transformer"})
    assert (entry["args"], entry["full"]) == ({"depth": 2}, 5_790_376)
    before = dict(machine.seen)
    row = sweep.sweep(entry, machine)
    assert row["outcome"] == "narrowed", f"{row['stage']}: {row.get('reason')}"
    assert row["parameters"] < 0.6 * entry["full"]
    assert machine.seen == before
    page = sweep.table({row["name"]: row}, [entry], "python benchmarks/sweep_models.py")
    assert "| timm | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 0 |  |" in page
    assert "5,790,376 weights and more were not tried at their full size" in page
    assert sweep.narrowed({"name": "timm:vgg11", "family": "timm vgg"}) is None


def test_the_list_and_the_page(sweep):
    every = sweep.every_model()
    assert len({entry["name"] for entry in every}) == len(every) > 1300
    assert sum(entry["name"].startswith("robustbench:") for entry in every) == 206
    first, second = every[0]["name"], every[1]["name"]
    rows = {first: {"outcome": "passed"}, second: {"outcome": "failed", "stage": "load", "reason": "a | b"}}
    rows[every[2]["name"]] = {"outcome": "too large", "parameters": 5_000_000_000}
    page = sweep.table(rows, every, "python benchmarks/sweep_models.py")
    assert "1 of 5,000,000,000 and more are too large for this machine's memory" in page
    assert f"| `{second}` | failed | load | a / b |" in page
    assert page.count(" not reached |") == 2
