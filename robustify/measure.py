"""What every row of a report is measured with: this process's batches, the clean pass, verdicts, budgets, passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from robustify import sanity
from robustify.arrays import counted_from_one
from robustify.data import Split, batches, chunks
from robustify.distributed import World
from robustify.errors import UserError
from robustify.modes import borrowed
from robustify.pieces import Pieces
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
            _check_logits(logits, y, run.split.labels)
            right.append((logits.argmax(1) == y).cpu())
            probable.append(sanity.probabilities(logits))
            pairs = zip(x.cpu().numpy(), y.tolist(), strict=True)
            seen += [f"{sanity.digest(image.tobytes())} {label}" for image, label in pairs]
            classes = logits.shape[1]
            run.tell("clean", done, len(mine))
    held = gathered(run.world, right, torch.bool)
    facts = run.world.gather(torch.tensor([[classes, all(probable)]]))
    data = sanity.digest("".join(run.gather_texts(seen)).encode())
    seconds = time.perf_counter() - begin
    row = Row("clean", None, len(held), int(held.sum()), {}, {"forward": 1, "backward": 0}, seconds, "clean")
    return Clean(row, held, int(facts[:, 0].max()), bool(facts[:, 1].all()), data)


def gathered(world: World, parts: Sequence[Tensor], dtype: torch.dtype) -> np.ndarray:
    """The parts of all processes in one array."""
    return world.gather(torch.cat(list(parts)) if parts else torch.zeros(0, dtype=dtype)).numpy()


def _check_logits(logits: Tensor, y: Tensor, labels: Tensor) -> None:
    """labels: of the whole split."""
    if logits.ndim != 2:
        raise UserError(f"the model returns a tensor of shape {tuple(logits.shape)}, not one row of logits per image")
    if int(y.max()) >= logits.shape[1]:
        raise counted_from_one(labels, logits.shape[1]) or UserError(
            f"the model has {logits.shape[1]} classes, the data has a label {int(y.max())}",
            "take data of the same classes and in the same order, or give the model a new classifier, which then is trained: "
            "robustify finetune --num-classes N (robustify.load(..., num_classes=N) in Python)",
        )
    if not torch.isfinite(logits).all():
        hint = "is the file damaged, or the precision too low?"
        raise UserError("the model returns NaN or infinite logits on clean images", hint)


def withstands(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each image is classified correctly, [N]: the verdict."""
    with borrowed(model), torch.no_grad():
        return model(x).argmax(1) == y


def kept_images(x: Tensor, x_adv: Tensor) -> dict[str, np.ndarray]:
    """What a piece keeps of adversarial images: moved bool [b], and those that moved."""
    moved = (x_adv != x).flatten(1).any(1)
    return {"moved": moved.cpu().numpy(), "x_adv": x_adv[moved].cpu().numpy()}


def check_range(x_adv: Tensor) -> None:
    """Assert that all pixels are in [0,1]."""
    if len(x_adv) and not (float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1):
        raise AssertionError(f"an attack left the pixel range: [{float(x_adv.min())}, {float(x_adv.max())}]")


def check_budget(x: Tensor, x_adv: Tensor, threat: ThreatModel, world: World | None = None) -> None:
    """Assert the budget: an attack that leaves its ball or the pixel range gives a number that means nothing, a bug."""
    check_range(x_adv)
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
