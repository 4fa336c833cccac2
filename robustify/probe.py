"""What the held-out images say of an epoch: its accuracies, whether it is the best so far, whether robustness has collapsed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustify.data import Split, batches
from robustify.evaluation import evaluate
from robustify.gradients import gradient_alignment
from robustify.methods import withstood
from robustify.methods.base import Method, OwnStep
from robustify.methods.remedies import Remedy, has_fallen, is_blind, is_hopeless, next_remedy
from robustify.recipe import TrainSettings
from robustify.rng import Draws, mix
from robustify.step import Setup

_ALIGNMENT = 18  # first word of the seed


@dataclass
class Standing:
    """What the epochs so far were worth.

    best: held-out accuracy of the kept weights, trained_best: of the best epoch trained, aligned: its gradient alignment;
    fallen: whether the last epoch fell from that, or was hopeless; remedies: taken, in order.
    """

    best: float = -1.0
    trained_best: float = 0.0
    aligned: float = 0.0
    fallen: bool = False
    best_epoch: int = 0
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracies:
    """clean, robust: in [0,1] on the held-out images; probe: the attack and its threats; classes: how many there are among the
    images that are right."""

    clean: float
    robust: float
    probe: str
    classes: int

    @property
    def constant(self) -> bool:
        """Whether the network says the same whatever it sees, as far as these images show."""
        return self.classes < 2

    def score(self, method: Method | OwnStep) -> float:
        """What it is judged by: who always says the same withstands every attack, and is worth nothing."""
        return 0.0 if self.constant else self.robust if method.adversarial else self.clean


@dataclass(frozen=True)
class Verdict:
    """What to make of an epoch.

    best: whether its weights are kept. fallen: as in Standing. collapsed: whether robustness has; overfitted, remedy: how, and
    what to do.
    """

    score: float
    best: bool
    fallen: bool
    collapsed: bool
    overfitted: bool
    remedy: Remedy


def judge(
    so_far: Standing,
    found: Accuracies,
    alignment: float | None,
    n: int,
    method: Method | OwnStep,
    s: TrainSettings,
) -> Verdict:
    """Judge an epoch by its accuracies and its gradient alignment (None: not measured) on n held-out images."""
    score = found.score(method)
    # against the epochs trained: the first ones from a start that is hardly robust dip before they rise
    fell = method.adversarial and has_fallen(score, so_far.trained_best, s.collapse_drop, n)
    blind, remedy = is_blind(alignment, so_far.aligned), next_remedy(method, s.on_collapse, so_far.remedies)
    # a slow start looks the same, so nobody's training ends for it who did not ask for that
    hopeless = is_hopeless(found.clean, found.robust, alignment) and (remedy != "stop" or s.on_collapse == "stop")
    collapsed = (fell and blind) or ((fell or hopeless) and so_far.fallen)
    best = not fell and (score > so_far.best or s.keep == "last")
    return Verdict(score, best, fell or hopeless, collapsed, blind or hopeless, remedy)


def accuracies(setup: Setup, held: Split, batch_size: int) -> Accuracies:
    """Measure the network, or the average of its weights if there is one, in full precision."""
    model = setup.ema.module if setup.ema else setup.model
    attack = "w-pgd:steps=20" if setup.threat.distributional else "pgd:steps=10"
    threats = withstood(setup.method, setup.threat)
    report = evaluate(model, held, [attack], threats, batch_size=batch_size, world=setup.world, split_name="val")
    worst = report.union() or report.rows[1]
    probe = f"{attack} {' and '.join(threat.spec for threat in threats)}"
    right = torch.from_numpy(report.verdicts[report.rows[0].key])
    return Accuracies(report.rows[0].accuracy, worst.accuracy, probe, len(held.labels[right.to(held.labels.device)].unique()))


def alignment(setup: Setup, held: Split, batch_size: int) -> float:
    """Return the mean cosine between the gradients at x and beside it: near 0, a one-step attack is blind."""
    world, device, seed = setup.world, setup.accelerator.device, setup.settings.seed
    lists, draws = [], []
    for first in range(0, len(held), batch_size):
        whole = range(len(held))[first : first + batch_size]
        rows = world.rows(len(whole))
        if whole[rows]:
            lists.append(whole[rows])
            draws.append(Draws(mix(seed, _ALIGNMENT, first), device, len(whole), rows.start))
    pairs = zip(batches(held, lists, device), draws, strict=True)
    found = gradient_alignment(setup.model, ((x, y, own) for (x, y), own in pairs), setup.threat)
    return float(setup.world.gather(found).nanmean())
