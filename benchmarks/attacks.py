"""Our attacks beside other libraries', in turn in one process: time as a ratio, and whether the verdicts agree.

    python benchmarks/attacks.py --network digits --data digits --quick
    ROBUSTIFY_ASSETS=DIR python benchmarks/attacks.py --network asset:resnet2b2_adv8 --n 256 --out attacks.json

PGD-10 against torchattacks, adv-lib, foolbox and ART, each as its users call it, and each where it is installed
(pip install 'robustify[peers]'; adv-lib is not among them: its dependency visdom does not build); w-pgd against a plain
restatement of the published loop; standard AutoAttack against pyautoattack alone. All run in turn, round after round, so
a drift of the machine's speed meets all alike; medians are compared. Every verdict is a forward pass in full precision,
and its time is counted. Differences under a tenth are not established. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from robustify import data as datasets
from robustify import sources
from robustify.attacks import pgd, w_pgd
from robustify.data import Resident, from_tensors
from robustify.environment import environment
from robustify.evaluation import evaluate
from robustify.losses import redlr
from robustify.measure import withstands
from robustify.modes import Shadow
from robustify.pixels import PixelModel
from robustify.sensitivity import conjugate
from robustify.threat import ThreatModel

Attack = Callable[[], Tensor]  # -> whether each image withstands, bool [N]
STEPS = 10


def torchattacks_pgd(model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    import torchattacks

    return torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)


def adv_lib_pgd(model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    from adv_lib.attacks import pgd_linf

    return lambda x, y: pgd_linf(model, x, y, eps, steps=STEPS, relative_step_size=0.25)


def foolbox_pgd(model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=eps / 4)
    return lambda x, y: attack(wrapped, x, y, epsilons=eps)[1]


def art_pgd(model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(x: Tensor, y: Tensor) -> Tensor:
        classes = model(x[:1]).shape[1]
        wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0, 1))
        attack = ProjectedGradientDescentPyTorch(
            wrapped, eps=eps, eps_step=eps / 4, max_iter=STEPS, num_random_init=1, batch_size=len(x), verbose=False
        )
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return attack


PEERS = {"torchattacks": torchattacks_pgd, "adv-lib": adv_lib_pgd, "foolbox": foolbox_pgd, "ART": art_pgd}


def published_w_pgd(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """The published loop restated (arXiv 2306.09844, algorithm 1, Linf ground norm): batches of 32, the weights' gradients
    switched on, and after every step a forward pass of its own for the accuracy."""
    assert threat.p is not None
    p, q = threat.p, conjugate(threat.p)
    x_adv, best, fewest = x.clone(), x, torch.inf
    for _ in range(steps):
        gradients = []
        for part, labels in zip(x_adv.split(32), y.split(32), strict=True):
            part = part.clone().requires_grad_(True)
            gradients.append(torch.autograd.grad(redlr(model(part), labels).sum(), part)[0])
        g = torch.cat(gradients)
        slope = g.flatten(1).abs().sum(1)
        upsilon = (slope**q).mean() ** (1 / q)
        length = (slope / upsilon) ** (q - 1)
        x_adv = x_adv + 1.875 * threat.eps / steps * length.view(-1, 1, 1, 1) * g.sign()
        size = (x_adv - x).flatten(1).abs().amax(1)
        shrunk = size * (threat.eps / (size**p).mean() ** (1 / p)).clamp_max(1)
        limit = shrunk.view(-1, 1, 1, 1)
        x_adv = (x + (x_adv - x).clamp(-limit, limit)).clamp(0, 1)
        with torch.no_grad():
            parts = zip(x_adv.split(32), y.split(32), strict=True)
            correct = sum(int((model(part).argmax(1) == labels).sum()) for part, labels in parts)
        if correct <= fewest:
            best, fewest = x_adv, correct
    return best


def bare_autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, quick: bool) -> Tensor:
    from pyautoattack import AutoAttack

    adversary = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=0, device=x.device)
    if quick:
        for attack in (adversary.apgd, adversary.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = 10
            attack.n_iter_2, attack.n_iter_min, attack.size_decr = 2, 1, 1
        adversary.fab.n_iter, adversary.square.n_queries = 10, 100
    return adversary.run_standard_evaluation(x, y, batch_size=len(x))[0]


def race(name: str, contenders: dict[str, Attack], baseline: str, rounds: int) -> dict[str, dict[str, float]]:
    """Time all in turn; print and return for each its seconds, its ratio to the baseline, and how verdicts differ."""
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    held: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for contender, attack in contenders.items():
            begin = time.perf_counter()
            held[contender] = attack()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[contender].append(time.perf_counter() - begin)
    medians = {contender: statistics.median(times) for contender, times in seconds.items()}
    print(f"\n{name}, {rounds} rounds, {len(held[baseline])} images")
    found = {}
    for contender, median in medians.items():
        figures = {
            "seconds": median,
            "ratio": medians[baseline] / median,
            "robust": float(held[contender].double().mean()),
            "differ": int((held[contender] != held[baseline]).sum()),
        }
        found[contender] = figures
        print(
            f"  {contender:<28}{median:9.3f} s   {figures['ratio']:6.2f} times as fast as {baseline}   "
            f"robust {figures['robust']:.4f}   {figures['differ']} verdicts differ"
        )
    return found


def load(network: str, data: str, n: int, device: torch.device) -> tuple[PixelModel, Resident]:
    """A network and n images: `asset:NAME` of the folder ROBUSTIFY_ASSETS, or a source and a data set's test images."""
    if network.startswith("asset:"):
        sys.path.insert(0, os.environ["ROBUSTIFY_ASSETS"])
        import load as assets  # pyright: ignore[reportMissingImports]

        name = network.removeprefix("asset:")
        x, y = assets.images("mnist" if name.startswith("mnist") else "cifar10")
        model = PixelModel(assets.model(name))
    else:
        checkpoint = sources.load(network)
        model = checkpoint.model
        images = datasets.load(data, input_size=checkpoint.input_size).test
        x, y = images.batch(range(min(n, len(images))))
    pair = (x[:n], y[:n])
    return model.to(device).eval(), from_tensors(pair, pair, pair).to(device).test  # pyright: ignore[reportReturnType]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--threat", default="Linf:8/255")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--autoattack-n", type=int, default=64, help="images for AutoAttack, which runs twice; 0: none")
    parser.add_argument("--compile", action="store_true", help="the bf16 search compiled too (torch.compile, a C++ compiler)")
    parser.add_argument("--quick", action="store_true", help="few images, one round, AutoAttack's loops shortened")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.n, args.rounds, args.autoattack_n = min(args.n, 48), 1, min(args.autoattack_n, 16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, split = load(args.network, args.data, args.n, device)
    threat = ThreatModel.parse(args.threat)
    if threat.norm != "Linf":
        parser.error("the peers are called with Linf")
    x, y = split.batch(range(len(split)))
    theirs = copy.deepcopy(model)  # as users have it: weights that want gradients
    search = Shadow(model).model

    def verdict(x_adv: Tensor) -> Tensor:
        return withstands(model, x_adv.to(device), y).cpu()

    contenders: dict[str, Attack] = {
        "robustify": lambda: verdict(pgd(model, x, y, threat=threat, steps=STEPS)),
    }
    searches = {"robustify, bf16 search": search}
    if args.compile:
        compiled = Shadow(model).model.requires_grad_(False)  # with weights that want gradients it would compute theirs too
        searches["robustify, bf16 search, compiled"] = torch.compile(compiled)  # pyright: ignore[reportArgumentType]
    for name, network in searches.items():
        contenders[name] = lambda network=network: verdict(pgd(network, x, y, threat=threat, steps=STEPS))
    for name, build in PEERS.items():
        try:
            attack = build(theirs, threat.eps)
        except ImportError as error:
            print(f"without {name}: {error}", file=sys.stderr)
            continue
        contenders[name] = lambda attack=attack: verdict(attack(x, y))
    results = {"PGD-10": race("PGD-10", contenders, "robustify", args.rounds)}

    shared, steps = ThreatModel(threat.norm, threat.eps, 2.0), 10
    contenders = {
        "published loop, restated": lambda: verdict(published_w_pgd(theirs, x, y, shared, steps)),
        "robustify": lambda: verdict(w_pgd(model, x, y, threat=shared, steps=steps)),
    }
    for name, network in searches.items():
        contenders[name] = lambda network=network: verdict(w_pgd(network, x, y, threat=shared, steps=steps))
    results["W-PGD-10"] = race("W-PGD-10", contenders, "published loop, restated", args.rounds)

    if args.autoattack_n:
        few, labels = x[: args.autoattack_n], y[: args.autoattack_n]
        pair = (few, labels)
        part = from_tensors(pair, pair, pair).test
        settings = "autoattack:steps=10,queries=100" if args.quick else "autoattack"

        def measured(fast: bool) -> Tensor:
            report = evaluate(model, part, [settings], threat, batch_size=len(part), fast_search=fast)
            return torch.from_numpy(report.verdicts[report.rows[1].key])

        results["AutoAttack"] = race(
            "AutoAttack, shortened" if args.quick else "standard AutoAttack",
            {
                "pyautoattack alone": lambda: withstands(
                    model, bare_autoattack(theirs, few, labels, threat, args.quick), labels
                ).cpu(),
                "robustify": lambda: measured(False),
                "robustify, bf16 search": lambda: measured(True),
            },
            "pyautoattack alone",
            1,
        )
    if args.out:
        facts = {"network": args.network, "threat": threat.spec, "n": len(x), "environment": environment(str(device))}
        args.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
