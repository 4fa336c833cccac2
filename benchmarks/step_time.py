"""The time of a distributed step on paper, and its projection to 8, 64 and 512 GPUs.

    python benchmarks/step_time.py

    step = compute + own + max(last, exchange - hidden)

compute: attack, passes and optimiser of one process's images. own: what compression computes. exchange: of the gradients;
`hidden` of it runs while the backward pass still does, but never the last bucket's. scaling.py checks the formulas with what it
measures; the figures below are assumptions (docs/scaling.md says whose), so what this prints is a projection and not a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from robustify.compression import BUCKET
from robustify.methods import FastAt, Standard, Trades, Wasserstein


@dataclass(frozen=True)
class Link:
    """latency: seconds a message. bandwidth: bytes a second. sharing: processes of a machine that share the link."""

    latency: float
    bandwidth: float
    sharing: int = 1


def buckets(total: int) -> list[int]:
    """Bytes of the pieces in which DDP exchanges so many bytes of gradients: a small one first, then 25 MiB at a time."""
    sizes, left = [], total
    while left > 0:
        sizes.append(min(left, (25 if sizes else 1) * 2**20))
        left -= sizes[-1]
    return sizes


def all_reduce(payload: float, n: int, link: Link) -> float:
    """Seconds: 2 (n-1)/n of the bytes leave every process, around rings or, as NCCL does it, through 2 log2(n) hops of trees.

    However many processes of a machine share the link, the bytes of one leave the machine.
    """
    return 2 * math.ceil(math.log2(n)) * link.latency + 2 * (n - 1) / n * payload / link.bandwidth


def quantised(payload: float, n: int, link: Link) -> float:
    """Seconds of qsgd's two exchanges: everyone to everyone, then a gather around a ring.

    Of what everyone has for everyone else, all that leaves a machine goes over its link: `sharing` times a process's.
    """
    leaves = link.sharing * (n - link.sharing) / n + (n - 1) / n
    return n * link.latency + leaves * payload / link.bandwidth


def step_seconds(compute: float, own: float, exchange: float, *, last: float = 0.0, hidden: float = 0.0) -> float:
    return compute + own + max(last, exchange - hidden)


# --- assumptions of the projection ---------------------------------------------------------------------------------------
WEIGHTS = 25_557_032  # ResNet-50
IMAGES = 64  # a GPU and step: a global batch of 512, 4,096 and 32,768
FORWARD = 1 / (3 * 2470)  # seconds a forward pass of an image: an A100 trains 2,470 a second, F + 2 F each
BIN, BW = 1.0, 2.0  # backward passes to the input and to the weights, in forward passes
MEMORY = 1.5e12  # bytes a second
OWN_BYTES = {"none": 0, "bf16": 12, "qsgd": 160}  # memory traffic of compression for each value
VALUE_BYTES = {"none": 4.0, "bf16": 2.0, "qsgd": 1 + 4 / BUCKET}
MACHINE = 8  # GPUs
NVLINK = Link(8e-6, 230e9)
NETWORKS = {
    "8 x 200 Gb/s": Link(15e-6, 8 * 25e9, MACHINE),
    "100 Gb/s": Link(30e-6, 12.5e9, MACHINE),
    "25 Gb/s": Link(50e-6, 3.1e9, MACHINE),
    "25 Gb/s, one GPU a machine": Link(50e-6, 3.1e9),
}
METHODS = {
    "standard": Standard(),
    "fast-at": FastAt(),
    "trades, K = 10": Trades(),
    "wasserstein, K = 10": Wasserstein(),
}


def projected(method: str, hook: str, n: int, link: Link) -> float:
    """Seconds of a step on n GPUs, ResNet-50 with 64 images of 224 pixels each."""
    compute = METHODS[method].passes(BIN, BW) * FORWARD * IMAGES
    own = WEIGHTS * OWN_BYTES[hook] / MEMORY
    exchange = quantised if hook == "qsgd" else all_reduce
    times = [exchange(size / 4 * VALUE_BYTES[hook], n, link) for size in buckets(4 * WEIGHTS)]
    # our qsgd waits for its exchange, so the backward pass hides none of it
    hidden = 0.0 if hook == "qsgd" else BW * FORWARD * IMAGES
    return step_seconds(compute, own, sum(times), last=times[-1], hidden=hidden)


def main() -> None:
    heads = ["GPUs", "between machines", "method", "images/s, none", *(f"efficiency, {hook}" for hook in OWN_BYTES)]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for n in (8, 64, 512):
        for name, link in (
            NETWORKS.items() if n > MACHINE else [("in one machine", NVLINK), *list(NETWORKS.items())[-1:]]
        ):
            for method in METHODS:
                alone = METHODS[method].passes(BIN, BW) * FORWARD * IMAGES
                seconds = [projected(method, hook, n, link) for hook in OWN_BYTES]
                shares = [f"{alone / s:.2f}" for s in seconds]
                print(f"| {n} | {name} | {method} | {n * IMAGES / seconds[0]:,.0f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
