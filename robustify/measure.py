"""The rows of a report: clean, pointwise and distributional, each over this process's share of the batches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robustify import sanity
from robustify.attacks import AttackSpec
from robustify.attacks.cascade import Stage
from robustify.data import Split, batches, chunks
from robustify.distributed import World
from robustify.errors import UserError
from robustify.modes import borrowed
from robustify.pieces import Arrays, Pieces
from robustify.report import Row
from robustify.threat import ThreatModel, norms

Tell = Callable[[str, int, int], None]
# a perturbation may exceed its budget by this share, and by single precision's rounding of every pixel
TOLERANCE, ROUNDING = 1e-5, 1.2e-7


@dataclass
class Passes:
    """Images that went forward, and those of them that asked for an input gradient."""

    forward: int = 0
    backward: int = 0

    def per_image(self, n: int) -> dict[str, float]:
        return {"forward": round(self.forward / n, 3), "backward": round(self.backward / n, 3)}


@contextmanager
def counted(*models: nn.Module) -> Iterator[Passes]:
    """Count the images that pass through the models."""
    passes = Passes()

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passes.forward += len(inputs[0])
        passes.backward += len(inputs[0]) if inputs[0].requires_grad and torch.is_grad_enabled() else 0

    with ExitStack() as hooks:
        for model in models:
            hooks.callback(model.register_forward_pre_hook(count).remove)
        yield passes


@dataclass
class Run:
    """What all attacks of one evaluation share: the model, the images, this process's place, what is stored.

    chosen: indices of the images in the split. search: the model that pointwise attacks climb, `model` or its shadow.
    """

    model: nn.Module
    split: Split
    chosen: list[int]
    batch_size: int
    seed: int
    world: World
    tell: Tell
    search: nn.Module
    workers: int = 0
    pieces: Pieces | None = None
    keep: bool = False
    warned: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next((w.device for w in self.model.parameters()), torch.device("cpu"))

    def lists(self, rows: np.ndarray) -> list[np.ndarray]:
        """The batches that these rows of the evaluated order are cut into: the same for any number of processes."""
        return [rows[part.start : part.stop] for part in chunks(len(rows), self.batch_size)]

    def mine(self, count: int) -> range:
        """Which of so many batches are this process's."""
        return range(count)[self.world.rows(count)]

    def read(self, lists: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.split, [[self.chosen[i] for i in rows] for rows in lists], self.device, self.workers)

    def gather_texts(self, texts: Sequence[str]) -> list[str]:
        """The texts of all processes, in order of rank; the same on every process."""
        sent = torch.frombuffer(bytearray("".join(f"{text}\0" for text in texts).encode() or b"\0"), dtype=torch.uint8)
        return [text for text in bytes(self.world.gather(sent).tolist()).decode().split("\0") if text]


@dataclass(frozen=True)
class Clean:
    """The clean pass: right bool [n]; whether what should be logits are probabilities; data: a digest of the images."""

    row: Row
    right: np.ndarray
    classes: int
    probabilities: bool
    data: str


def measure_clean(run: Run) -> Clean:
    """Classify the clean images. Raises UserError when the model's output cannot be logits for these labels."""
    begin = time.perf_counter()
    lists = run.lists(np.arange(len(run.chosen)))
    mine = run.mine(len(lists))
    right: list[Tensor] = []
    probable: list[bool] = []
    seen: list[str] = []
    classes = 0
    with borrowed(run.model), torch.no_grad():
        for done, (x, y) in enumerate(run.read([lists[i] for i in mine]), start=1):
            logits = run.model(x)
            _check_logits(logits, y)
            right.append((logits.argmax(1) == y).cpu())
            probable.append(sanity.probabilities(logits))
            pairs = zip(x.cpu().numpy(), y.tolist(), strict=True)
            seen += [f"{sanity.digest(image.tobytes())} {label}" for image, label in pairs]
            classes = logits.shape[1]
            run.tell("clean", done, len(mine))
    held = _numpy(run.world, right, torch.bool)
    facts = run.world.gather(torch.tensor([[classes, all(probable)]]))
    data = sanity.digest("".join(run.gather_texts(seen)).encode())
    seconds = time.perf_counter() - begin
    row = Row("clean", None, len(held), int(held.sum()), {}, {"forward": 1, "backward": 0}, seconds, "clean")
    return Clean(row, held, int(facts[:, 0].max()), bool(facts[:, 1].all()), data)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what pyautoattack warns of, by its bare category; every other warning goes on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for warning in caught:
        if warning.category is Warning:
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _numpy(world: World, parts: Sequence[Tensor], dtype: torch.dtype) -> np.ndarray:
    """The parts of all processes in one array."""
    return world.gather(torch.cat(list(parts)) if parts else torch.zeros(0, dtype=dtype)).numpy()


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2:
        raise UserError(f"the model returns a tensor of shape {tuple(logits.shape)}, not one row of logits per image")
    if int(y.max()) >= logits.shape[1]:
        raise UserError(
            f"the model has {logits.shape[1]} classes, the data has a label {int(y.max())}",
            "take data of the same classes, or a model whose classifier is replaced: --set model.num_classes=N",
        )
    if not torch.isfinite(logits).all():
        hint = "is the file damaged, or the precision too low?"
        raise UserError("the model returns NaN or infinite logits on clean images", hint)


def pointwise(
    run: Run, name: str, spec: AttackSpec, threat: ThreatModel, clean: Clean
) -> tuple[Row, np.ndarray, np.ndarray]:
    """The row of a pointwise attack, whether each image withstands it, and the size of what fooled it."""
    held, distance = clean.right.copy(), np.where(clean.right, np.inf, 0).astype(np.float32)
    cascade = spec.cascade(threat, clean.classes)
    forward, backward, seconds = 0.0, 0.0, 0.0
    left: list[int] = []
    for index, stage in enumerate(cascade.stages):
        active = np.flatnonzero(held)
        lists = run.lists(active)
        done = list(_attacked(run, f"{name} {threat.spec} {index}", stage, threat, lists))
        held[active] = _numpy(run.world, [torch.from_numpy(piece["held"]) for piece in done], torch.bool)
        distance[active] = _numpy(run.world, [torch.from_numpy(piece["distance"]) for piece in done], torch.float32)
        spent = [sum(float(piece[what]) for piece in done) for what in ("forward", "backward", "seconds")]
        total = run.world.sum(torch.tensor(spent, dtype=torch.float64, device=run.device)).tolist()
        forward, backward, seconds = forward + total[0], backward + total[1], seconds + total[2] / run.world.size
        run.warned += [str(text) for piece in done for text in piece["warnings"]]
        left.append(int(held.sum()))
    settings = dict(spec.settings)
    if cascade.label:
        settings |= {"version": cascade.label, "stages": [str(stage) for stage in cascade.stages], "left": left}
    if run.search is not run.model:
        settings["search"] = "bf16"
    passes = Passes(int(forward), int(backward)).per_image(len(held))
    return Row(name, threat.spec, len(held), left[-1], settings, passes, seconds), held, distance


def _attacked(run: Run, name: str, stage: Stage, threat: ThreatModel, lists: Sequence[np.ndarray]) -> Iterator[Arrays]:
    """This process's batches, attacked now or by a run before; see `_attack` for what each holds, but for the images."""
    mine = run.mine(len(lists))
    known = {number for number in mine if run.pieces and f"{name} {number}" in run.pieces}
    images = run.read([lists[number] for number in mine if number not in known])
    for done, number in enumerate(mine, start=1):
        if run.pieces and number in known:
            piece = run.pieces.read(f"{name} {number}")
        else:
            piece = _attack(run, stage, threat, number, *next(images))
            piece |= {"rows": lists[number], "row": np.array(name.rpartition(" ")[0]), "threat": np.array(threat.spec)}
            if run.pieces:
                run.pieces.write(f"{name} {number}", piece)
        run.tell(f"{stage.name} {threat}", done, len(mine))
        yield {what: value for what, value in piece.items() if what not in ("moved", "x_adv")}


def _attack(run: Run, stage: Stage, threat: ThreatModel, number: int, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Attack one batch: held bool [b], distance float32 [b], passes, seconds, warnings; on request what moved."""
    begin = time.perf_counter()
    with counted(*{run.model, run.search}) as passes, heard() as texts:
        x_adv = stage.attack(run.search, x, y, threat, run.seed, number)
        check_budget(x, x_adv, threat)
        held = withstands(run.model, x_adv, y)
    size = norms(x_adv - x, threat.norm).float().masked_fill(held, torch.inf)
    piece = {
        "held": held.cpu().numpy(),
        "distance": size.cpu().numpy(),
        "warnings": np.array(texts, dtype=str),
        "forward": np.array(passes.forward),
        "backward": np.array(passes.backward),
        "seconds": np.array(time.perf_counter() - begin),
    }
    if run.keep:
        moved = (x_adv != x).flatten(1).any(1)
        piece |= {"moved": moved.cpu().numpy(), "x_adv": x_adv[moved].cpu().numpy()}
    return piece


def withstands(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each image is classified correctly, [N]: the verdict."""
    with borrowed(model), torch.no_grad():
        return model(x).argmax(1) == y


def distributional(
    run: Run, name: str, spec: AttackSpec, threat: ThreatModel, clean: np.ndarray
) -> tuple[Row, np.ndarray]:
    """The same for an attack that needs the whole set at once, and is one piece."""
    begin = time.perf_counter()
    if run.pieces and f"{name} {threat.spec}" in run.pieces:
        piece = run.pieces.read(f"{name} {threat.spec}")
    else:
        with counted(run.model) as passes:
            held = _whole_set(run, spec, threat) & clean
        spent = torch.tensor([passes.forward, passes.backward], device=run.device, dtype=torch.float64)
        forward, backward = run.world.sum(spent).tolist()
        piece = {
            "held": held,
            "forward": np.array(forward),
            "backward": np.array(backward),
            "seconds": np.array(time.perf_counter() - begin),
        }
        if run.pieces and run.world.is_main:
            run.pieces.write(f"{name} {threat.spec}", piece)
    held, n = piece["held"], len(clean)
    passes = Passes(int(piece["forward"]), int(piece["backward"])).per_image(n)
    row = Row(name, threat.spec, n, int(held.sum()), spec.settings, passes, float(piece["seconds"]), "distributional")
    return row, held


def _whole_set(run: Run, spec: AttackSpec, threat: ThreatModel) -> np.ndarray:
    """Whether each image withstands; the budget is checked over all processes."""
    lists = run.lists(np.arange(len(run.chosen)))
    parts = list(run.read([lists[i] for i in run.mine(len(lists))]))
    device = run.device
    x = torch.cat([x for x, _ in parts]) if parts else torch.zeros(0, 1, 1, 1, device=device)
    y = torch.cat([y for _, y in parts]) if parts else torch.zeros(0, dtype=torch.int64, device=device)
    done = iter(range(1, 10**9))
    total = (spec.settings.get("steps", 1) + 1) * max(1, len(parts))
    hook = run.model.register_forward_hook(lambda *_: run.tell(f"{spec.name} {threat}", min(next(done), total), total))
    try:
        x_adv = spec.info.run(
            run.model, x, y, threat=threat, batch_size=run.batch_size, reduce=run.world.sum, **spec.settings
        )
    finally:
        hook.remove()
    check_budget(x, x_adv, threat, run.world)
    steps = range(0, len(x), run.batch_size)
    found = [withstands(run.model, x_adv[i : i + run.batch_size], y[i : i + run.batch_size]).cpu() for i in steps]
    return _numpy(run.world, found, torch.bool)


def check_budget(x: Tensor, x_adv: Tensor, threat: ThreatModel, world: World | None = None) -> None:
    """Assert the budget: an attack that leaves its ball or the pixel range gives a number that means nothing, a bug."""
    if len(x) and not (float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1):
        raise AssertionError(f"an attack left the pixel range: [{float(x_adv.min())}, {float(x_adv.max())}]")
    size = norms(x_adv - x, threat.norm).double() if len(x) else torch.zeros(0, dtype=torch.float64, device=x.device)
    if threat.p is None or threat.p == torch.inf:
        spent = float(size.max()) if len(x) else 0.0
    else:
        world = world or World()
        mine = [float((size**threat.p).sum()), float(len(x))]
        sums = world.sum(torch.tensor(mine, dtype=torch.float64, device=x.device))
        spent = float(sums[0] / sums[1]) ** (1 / threat.p)
    rounding = float(norms(torch.full_like(x[:1], ROUNDING), threat.norm)) if len(x) else 0.0
    if spent > threat.eps * (1 + TOLERANCE) + rounding:
        raise AssertionError(f"an attack spent {spent} of a budget of {threat.eps} ({threat})")
