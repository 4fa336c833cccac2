"""Takes three steps with each method on this process's share and writes the weights; started by test_method_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import tiny_net, toy_data

from robustify import layers
from robustify.distributed import World, make_accelerator
from robustify.methods import FastAt, FreeAt, Gaat, Mart, MultiNorm, Trades
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.step import prepare, set_train_mode, take_step
from robustify.threat import ThreatModel

CASES = {
    "mart": (Mart(steps=2), {}),
    "n-fgsm": (FastAt(noise="n-fgsm"), {}),
    "grad_align": (FastAt(grad_align=0.5), {}),
    "gaat": (Gaat(), {}),
    "gaat in two passes": (Gaat(order=2), {"accumulate": 2}),
    "gaat exact": (Gaat(gradient="exact", order=2), {}),
    "gaat pgd": (Gaat(pgd_every=2, pgd_steps=2), {}),
    "free-at": (FreeAt(replays=2), {}),
    "multi-norm": (MultiNorm(threats=("Linf:0.03", "L2:0.3", "L1:2"), train_on="all", steps=2), {}),
    "awp": (Trades(steps=2), {"awp": 0.01}),
    "grad_align, sync": (FastAt(grad_align=0.5), {"batchnorm": "sync"}),
    "gaat exact, sync": (Gaat(gradient="exact"), {"batchnorm": "sync"}),
    "trades in two passes": (Trades(steps=2), {"accumulate": 2, "clip_norm": 0.1, "ema": 0.5}),
    "adamw": (Trades(steps=2), {"optimizer": "adamw", "lr": 1e-3}),
    "lars": (Trades(steps=2), {"optimizer": "lars", "trust_clip": True}),
    "sync": (Trades(steps=2), {"batchnorm": "sync"}),
}


def weights_after(method, settings, accelerator, world) -> tuple[torch.Tensor, dict]:
    net = tiny_net().double()
    net[3].p = 0.0
    model = PixelModel(net)
    s = TrainSettings(**{"batch_size": 24, "lr": 0.05, "batchnorm": "frozen", **settings})
    layers.select(net, "full", [])
    setup = prepare(model, method, ThreatModel.parse("Linf:8/255"), s, accelerator, "crop-flip", 96)
    set_train_mode(setup)
    x, y = toy_data(96)
    part = s.batch_size // s.accumulate
    for step in range(3):
        starts = range(24 * step, 24 * step + 24, part)
        rows = [range(96)[i : i + part][world.rows(part)] for i in starts]
        take_step(setup, iter([(x[list(r)].double(), y[list(r)]) for r in rows]), step)
    state = setup.tracker.state_dict() if setup.tracker else {}
    kept = [net, *([setup.ema.module] if setup.ema else [])]
    return torch.cat([w.detach().flatten() for one in kept for w in one.parameters()]), state


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, (method, settings) in CASES.items():
        accelerator = make_accelerator()
        world = World(accelerator)
        if world.sharded and getattr(method, "second_derivatives", False):
            continue
        found[name] = weights_after(method, settings, accelerator, world)
    out.mkdir(exist_ok=True)
    torch.save(found, out / f"rank{world.rank}.pt")
    world.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
