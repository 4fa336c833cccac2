"""evaluate: what a model holds against, per example, in full precision, over any number of processes."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustify.attacks import AttackSpec
from robustify.data import Split, batches, chunks
from robustify.distributed import World
from robustify.errors import UserError
from robustify.modes import borrowed
from robustify.report import Report, Row, environment
from robustify.rng import mix
from robustify.threat import ThreatModel, norms

Tell = Callable[[str, int, int], None]
TOLERANCE = 1e-5  # a perturbation may exceed its budget by this share, for rounding


@dataclass
class Passes:
    """Images that went forward, and those of them that asked for an input gradient."""

    forward: int = 0
    backward: int = 0

    def per_image(self, n: int) -> dict[str, float]:
        return {"forward": round(self.forward / n, 3), "backward": round(self.backward / n, 3)}


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    """Count the images that pass through the model."""
    passes = Passes()

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passes.forward += len(inputs[0])
        passes.backward += len(inputs[0]) if inputs[0].requires_grad and torch.is_grad_enabled() else 0

    hook = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def threats_for(attack: AttackSpec, threat: ThreatModel) -> ThreatModel:
    """The threat under which an attack measures: pointwise attacks take the ball of the same radius, distributional ones the
    Wasserstein ball of order 2 when the threat is pointwise."""
    if attack.info.distributional:
        return threat if threat.distributional else ThreatModel(threat.norm, threat.eps, 2.0)
    return threat.pointwise()


def sample(n_available: int, n: int | None, seed: int) -> list[int]:
    """Indices of the images to evaluate: n of them drawn by the seed, in ascending order; all of them with n None.

    Raises UserError when there are fewer than n.
    """
    if n is None or n == n_available:
        return list(range(n_available))
    if n > n_available:
        raise UserError(f"asked for {n} images, the split has {n_available}", f"take --n {n_available} or leave it out")
    return sorted(np.random.default_rng(seed).permutation(n_available)[:n].tolist())


def evaluate(
    model: nn.Module,
    split: Split,
    attacks: Sequence[str],
    threats: ThreatModel | Sequence[ThreatModel],
    *,
    n: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    world: World | None = None,
    tell: Tell | None = None,
    model_id: str = "model",
    data_name: str = "data",
    split_name: str = "test",
    workers: int = 0,
) -> Report:
    """Measure clean accuracy and each attack under each threat, on the same images. Returns a Report with verdicts.

    model: [0,1] images to logits, in full precision; borrowed, so it comes back as it was. attacks: `clean` or
    `name:setting=value,...`. An image counts as robust when it is classified correctly both clean and perturbed, by a
    forward pass of its own after the attack; the perturbation is checked against the threat's budget first. The batch
    order is fixed, so the verdicts do not depend on the number of processes. Raises UserError for bad attacks, n, or images.
    """
    world = world or World()
    several = [threats] if isinstance(threats, ThreatModel) else list(threats)
    specs = [AttackSpec.parse(name) for name in dict.fromkeys(attacks) if name != "clean"]
    plan = list(dict.fromkeys((str(spec), threats_for(spec, threat)) for spec in specs for threat in several))
    by_text = {str(spec): spec for spec in specs}
    for text, threat in plan:
        by_text[text].check(threat)
    chosen = sample(len(split), n, seed)
    device = next((w.device for w in model.parameters()), torch.device("cpu"))
    lists = [[chosen[i] for i in rows] for rows in chunks(len(chosen), batch_size)]
    numbers = range(len(lists))[world.rows(len(lists))]  # whole batches: the same boundaries for any number of processes
    mine = [lists[i] for i in numbers]
    tell = tell or (lambda stage, done, total: None)

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        return batches(split, mine, device, workers)

    rows: list[Row] = []
    verdicts: dict[str, np.ndarray] = {}
    clean, row = _clean(model, read, world, len(chosen), tell, len(mine))
    rows.append(row)
    verdicts[row.key] = clean.numpy()
    for text, threat in plan:
        spec = by_text[text]
        begin = time.perf_counter()
        with counted(model) as passes:
            if spec.info.distributional:
                held = _distributional(model, read, spec, threat, batch_size, world, tell)
            else:
                held = _pointwise(model, read, spec, threat, seed, world, numbers, tell)
        held &= clean
        spent = world.sum(torch.tensor([passes.forward, passes.backward], device=device, dtype=torch.float64))
        passes = Passes(int(spent[0]), int(spent[1]))
        row = Row(
            spec.name, threat.spec, len(chosen), int(held.sum()), spec.settings, passes.per_image(len(chosen)),
            time.perf_counter() - begin, "distributional" if spec.info.distributional else "pointwise",
        )
        if row.key in verdicts:  # the same attack with other settings
            row = Row(**{**row.__dict__, "attack": text})
        rows.append(row)
        verdicts[row.key] = held.numpy()
    return Report(model_id, data_name, split_name, rows, verdicts, environment(str(device)), seed)


def _clean(
    model: nn.Module, read: Callable[[], Iterator[tuple[Tensor, Tensor]]], world: World, n: int, tell: Tell, total: int
) -> tuple[Tensor, Row]:
    begin = time.perf_counter()
    found = []
    with borrowed(model), counted(model), torch.no_grad():
        for i, (x, y) in enumerate(read()):
            logits = model(x)
            _check_logits(logits, y)
            found.append((logits.argmax(1) == y).cpu())
            tell("clean", i + 1, total)
    right = world.gather(torch.cat(found) if found else torch.zeros(0, dtype=torch.bool))
    return right, Row("clean", None, n, int(right.sum()), {}, {"forward": 1, "backward": 0}, time.perf_counter() - begin, "clean")


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2:
        raise UserError(f"the model returns a tensor of shape {tuple(logits.shape)}, not one row of logits per image")
    if int(y.max()) >= logits.shape[1]:
        raise UserError(
            f"the model has {logits.shape[1]} classes, the data has a label {int(y.max())}",
            "take data of the same classes, or a model whose classifier is replaced: --set model.num_classes=N",
        )
    if not torch.isfinite(logits).all():
        raise UserError("the model returns NaN or infinite logits on clean images", "is the file damaged, or the precision too low?")


def _pointwise(
    model: nn.Module, read: Callable[[], Iterator[tuple[Tensor, Tensor]]], spec: AttackSpec, threat: ThreatModel, seed: int,
    world: World, numbers: range, tell: Tell,
) -> Tensor:
    """Whether each image is classified correctly after the attack, over all processes."""
    found = []
    seeded = "seed" in spec.info.run.__kwdefaults__
    for done, (number, (x, y)) in enumerate(zip(numbers, read(), strict=True), start=1):
        more = {"seed": mix(seed, number)} if seeded else {}
        x_adv = spec.info.run(model, x, y, threat=threat, **spec.settings, **more)
        _check_budget(x, x_adv, threat)
        with borrowed(model), torch.no_grad():
            found.append((model(x_adv).argmax(1) == y).cpu())
        tell(f"{spec.name} {threat}", done, len(numbers))
    return world.gather(torch.cat(found) if found else torch.zeros(0, dtype=torch.bool))


def _distributional(
    model: nn.Module, read: Callable[[], Iterator[tuple[Tensor, Tensor]]], spec: AttackSpec, threat: ThreatModel,
    batch_size: int, world: World, tell: Tell,
) -> Tensor:
    """The same for an attack that needs the whole set at once; its budget is checked over all processes."""
    parts = list(read())
    device = parts[0][0].device if parts else torch.device("cpu")
    x = torch.cat([x for x, _ in parts]) if parts else torch.zeros(0, 1, 1, 1, device=device)
    y = torch.cat([y for _, y in parts]) if parts else torch.zeros(0, dtype=torch.int64, device=device)
    done = iter(range(1, 10**9))
    total = (spec.settings.get("steps", 1) + 1) * max(1, -(-len(x) // batch_size))
    hook = model.register_forward_hook(lambda *_: tell(f"{spec.name} {threat}", min(next(done), total), total))
    try:
        x_adv = spec.info.run(model, x, y, threat=threat, batch_size=batch_size, reduce=world.sum, **spec.settings)
    finally:
        hook.remove()
    _check_budget(x, x_adv, threat, world)
    found = []
    with borrowed(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            found.append((model(x_adv[i:i + batch_size]).argmax(1) == y[i:i + batch_size]).cpu())
    return world.gather(torch.cat(found) if found else torch.zeros(0, dtype=torch.bool))


def _check_budget(x: Tensor, x_adv: Tensor, threat: ThreatModel, world: World | None = None) -> None:
    """An attack that leaves its ball or the pixel range would give a number that means nothing: a bug, not a verdict."""
    if len(x) and not (float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1):
        raise AssertionError(f"an attack left the pixel range: [{float(x_adv.min())}, {float(x_adv.max())}]")
    size = norms(x_adv - x, threat.norm).double() if len(x) else torch.zeros(0, dtype=torch.float64, device=x.device)
    if threat.p is None or threat.p == torch.inf:
        spent = float(size.max()) if len(x) else 0.0
    else:
        world = world or World()
        sums = world.sum(torch.tensor([float((size**threat.p).sum()), float(len(x))], dtype=torch.float64, device=x.device))
        spent = float(sums[0] / sums[1]) ** (1 / threat.p)
    if spent > threat.eps * (1 + TOLERANCE) + 1e-7:
        raise AssertionError(f"an attack spent {spent} of a budget of {threat.eps} ({threat})")
