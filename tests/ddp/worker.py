"""Trains and evaluates a toy network on this process's share and writes what it got; started by test_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import tiny_net, toy_data

from robustify import layers
from robustify.data import from_tensors, subset
from robustify.distributed import World, make_accelerator
from robustify.evaluation import evaluate
from robustify.methods import Wasserstein
from robustify.pixels import PixelModel
from robustify.probe import alignment
from robustify.recipe import TrainSettings
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import follow, train


class Recorder(Wasserstein):
    """Keeps the perturbations of every step."""

    def perturb(self, nets, x, y, threat, draws, tracker):
        before = exchanged()
        x_adv = super().perturb(nets, x, y, threat, draws, tracker)
        assert exchanged() == before, "a collective fired during the attack"
        SEEN.append((x_adv - x).detach().clone())
        BUDGETS.append(tracker._noted[:, 0].clone())
        return x_adv


def exchanged() -> int:
    """How many collectives this process has taken part in."""
    group = torch.distributed.group.WORLD
    return 0 if group is None else group._get_sequence_number_for_group()


SEEN: list[torch.Tensor] = []
BUDGETS: list[torch.Tensor] = []


def main(out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    world = World(accelerator)
    net = tiny_net().double()
    net[3].p = 0.0
    model = PixelModel(net)
    double = lambda pair: (pair[0].double(), pair[1])  # noqa: E731
    # 97: one image is left over by the batches of 24, and Upsilon's shares differ
    data = from_tensors(double(toy_data(97)), double(toy_data(64, seed=1)), double(toy_data(61, seed=2)))
    settings = TrainSettings(epochs=2, batch_size=24, lr=0.05, probe_images=32, batchnorm="frozen", keep="last")
    layers.select(model.net, "full", [])
    setup = prepare(
        model,
        Recorder(steps=2, adversary={"name": "budget", "upsilon": "every", "every": 3, "images": None}),
        ThreatModel.parse("W2-Linf:8/255"),
        settings,
        accelerator,
        "crop-flip",
        97,
    )
    assert next(setup.model.parameters()).dtype == torch.float64
    out.mkdir(exist_ok=True)
    follow(train(setup, data, out), lambda event: None)
    report = evaluate(
        model,
        data.test,
        ["pgd:steps=3,restarts=2", "w-pgd:steps=3"],
        ThreatModel.parse("W2-Linf:8/255"),
        batch_size=16,
        world=world,
    )
    # four batches, the last one smaller, and one batch: all processes but one are without images
    few = ["fgsm", "w-pgd:steps=2", "knapsack:steps=2,restarts=1"]
    tiny = evaluate(model, data.test, few, ThreatModel.parse("W2-Linf:8/255"), n=3, batch_size=16, world=world)
    torch.save(
        {
            "weights": {k: v.clone() for k, v in net.state_dict().items()},
            "upsilon": setup.tracker.value,
            "perturbations": SEEN,
            "budgets": BUDGETS,
            "alignment": alignment(setup, subset(data.val, range(3)), 2),  # two batches, of two images and of one
            "digest": report.digest(),
            "tiny": tiny.digest(),
            "verdicts": {k: torch.from_numpy(v) for k, v in report.verdicts.items()},
            "passes": [r.passes for r in report.rows],
        },
        out / f"rank{world.rank}.pt",
    )
    world.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
