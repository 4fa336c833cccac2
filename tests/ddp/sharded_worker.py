"""Trainings split by FSDP2 on this process's share, and unsplit ones to compare with; started by test_sharding.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import toy_data
from resume_worker import STOP, run
from torch import nn

from robustify import harden, layers, train
from robustify.distributed import make_accelerator
from robustify.errors import UserError
from robustify.methods import Trades
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.step import prepare, set_train_mode, take_step
from robustify.threat import ThreatModel


class Block(nn.Module):
    """With BatchNorm, and attention whose output weights nn.MultiheadAttention reads from outside their module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x + self.attention(x, x, x)[0]


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def blocky_net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(Block(), Block())
        return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Flatten(2), body, nn.Flatten(), nn.Linear(256, 4))


class Watched(Trades):
    """Asserts that its attacks exchange nothing."""

    def perturb(self, nets, x, y, threat, draws, tracker):
        before = collectives()
        x_adv = super().perturb(nets, x, y, threat, draws, tracker)
        assert collectives() == before, "a collective fired during the attack"
        return x_adv


def collectives() -> int:
    """How many this process has taken part in."""
    return sum(group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map)


def steps(out: Path, roll_back: bool = False, net: nn.Module | None = None, **settings):
    """Three steps of trades on a network of blocks; roll_back: and back to the weights after the first one, and a step more."""
    net = net or blocky_net()
    s = TrainSettings(**{"batch_size": 16, "lr": 0.05, "batchnorm": "frozen", **settings})
    layers.select(net, s.layers, [])
    threat = ThreatModel.parse("Linf:8/255")
    setup = prepare(PixelModel(net), Watched(steps=2), threat, s, make_accelerator(s.precision), "none", 64)
    set_train_mode(setup)
    x, y = toy_data(64)

    def step(number: int) -> None:
        rows = range(16 * number, 16 * number + 16)[setup.world.rows(16)]
        take_step(setup, iter([(x[list(rows)], y[list(rows)])]), number)

    before = collectives()
    for number in range(3):
        step(number)
        if roll_back and number == 0:
            train._save_best(setup, out)
    exchanged = collectives() - before
    if roll_back:
        train._roll_back(setup, out)
        step(3)
    split = [w for w in setup.forward.parameters() if isinstance(w, DTensor)]
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "split": len(split),
        "collectives": exchanged,
        "mine": sum(w.to_local().numel() for w in split),
        "units": sum(type(module).__name__.startswith("FSDP") for module in setup.forward.modules()),
        "asks for gradients": [w.requires_grad for w in net.parameters()],
        "momentum": sum(v.to_local().numel() for state in setup.optimizer.state.values() for v in state.values())
        if setup.shards
        else 0,
    }


KINDS = {
    "trades": {},
    "bf16": {"precision": "bf16"},
    "some layers": {"layers": "2.1.*,4.*"},
    "live": {"batchnorm": "train"},
    "rolled back": {"roll_back": True},
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    whole = {name: steps(out, **settings) for name, settings in KINDS.items()}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    split = {name: steps(out, **settings) for name, settings in KINDS.items()}
    split["frozen"] = run(out / "frozen", batchnorm="frozen")
    run(out / "frozen, stopped", stop=STOP, batchnorm="frozen")
    split["frozen, stopped"] = run(out / "frozen, stopped", resume=True, batchnorm="frozen")
    split["from one"] = run(out / "from one", resume=True, batchnorm="frozen")
    run(out / "from split", stop=STOP, batchnorm="frozen")
    split["live run"] = run(out / "live")
    run(out / "live, stopped", stop=STOP)
    split["live run, stopped"] = run(out / "live, stopped", resume=True)
    with pytest.raises(UserError) as refused:
        harden(blocky_net(), toy_data(64), method="trades", layers="last", compress="bf16", verify=False)
    split["refused"] = refused.value.message
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"}
    for name, net in (("outside", blocky_net()), ("list", Listed())):
        with pytest.raises(UserError) as refused:
            steps(out, net=net)
        split[name] = refused.value.message
    if not int(os.environ["RANK"]):
        torch.save((whole, split), out / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
