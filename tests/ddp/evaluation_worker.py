"""Evaluates a toy network on this process's share and saves the report; started by test_evaluation_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import tiny_net, toy_data

from robustify.data import Split, from_tensors
from robustify.distributed import World, make_accelerator
from robustify.evaluation import evaluate
from robustify.threat import ThreatModel

ATTACKS = [
    "pgd:steps=3",
    "screen",
    "autoattack:steps=2,queries=10,targets=2",
    "w-pgd:steps=3",
    "knapsack:steps=4,restarts=1",
]


def subject() -> tuple[nn.Module, Split]:
    """The network and its images."""
    model = tiny_net().eval()
    x, y = toy_data(50)
    with torch.no_grad():
        model[6].bias.sub_(model(x).mean(0))
        model[6].weight.mul_(8)
        y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return model, from_tensors(*[(x, y)] * 3).test


def main(pieces: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = World(make_accelerator())
    report = evaluate(
        *subject(),
        ATTACKS,
        ThreatModel.parse("Linf:2/255"),
        batch_size=12,
        world=world,
        check=True,
        resume_folder=pieces,
        keep_adversarials=True,
    )
    report.save(out / f"report{world.rank}.json")
    world.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
