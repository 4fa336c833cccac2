"""What folding BatchNorm into the convolutions before it would save an attack's pass, in fp32 and in the bf16 search.

    OMP_NUM_THREADS=1 python benchmarks/folding.py

Random weights; the layouts are those of RobustBench's networks. Every variant in turn, the least processor time of the
rounds, so that a busy machine disturbs little. Folding rounds otherwise, so an attack that climbs the folded network
needs each verdict from the network itself.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from robustify import sources
from robustify.gradients import input_gradient
from robustify.losses import ce
from robustify.modes import Shadow

NETWORKS = ("robustbench_cifar10_linf_sehwag2021proxy_r18", "robustbench_cifar10_l2_rice2020overfitting")


def batch_norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    x = torch.rand(args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(args.batch) % 10
    for name in args.networks:
        model = sources.load(f"timm:{name}", pretrained=False).model.eval().requires_grad_(False)
        folded = copy.deepcopy(model)
        folded.net = fuse(folded.net).requires_grad_(False)
        variants = {"fp32": model, "folded": folded, "bf16": Shadow(model).model, "bf16 folded": Shadow(folded).model}
        least = {variant: [float("inf")] * 2 for variant in variants}
        for _ in range(args.rounds):
            for variant, net in variants.items():
                begin = time.process_time()
                input_gradient(net, x, lambda logits: ce(logits, y))
                middle = time.process_time()
                with torch.no_grad():
                    net(x)
                took = (middle - begin, time.process_time() - middle)
                least[variant] = [min(pair) for pair in zip(least[variant], took, strict=True)]
        print(f"{name}: {batch_norms(model) - batch_norms(folded)} of {batch_norms(model)} BatchNorm layers fold")
        for plain, other in (("fp32", "folded"), ("bf16", "bf16 folded")):
            gains = [a / b for a, b in zip(least[plain], least[other], strict=True)]
            print(f"  {other}: a gradient {gains[0]:.2f} times as fast as {plain}, a forward pass {gains[1]:.2f} times")


if __name__ == "__main__":
    main()
