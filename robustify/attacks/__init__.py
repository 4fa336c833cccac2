"""ATTACKS names every attack. An attack is `attack(model, x, y, *, threat, ...) -> x_adv` and borrows the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from robustify.attacks.autoattack import apgd_ce, apgd_t, autoattack, check_windows, fab_t, square, standard
from robustify.attacks.cascade import Cascade, Stage
from robustify.attacks.fgsm import fgsm
from robustify.attacks.knapsack import knapsack
from robustify.attacks.pgd import pgd
from robustify.attacks.screen import screen, screen_stages
from robustify.attacks.w_pgd import w_fgsm, w_pgd
from robustify.errors import UserError, nearest
from robustify.losses import LOSSES
from robustify.threat import ThreatModel


@dataclass(frozen=True)
class AttackInfo:
    """run: the function. distributional: it shares one budget over the whole set, so it wants the whole set at once.

    cascade: for an attack that is several in turn: (threat, number of classes, **settings) -> which. fits: raises UserError
    for a threat and images of (height, width) that it cannot take.
    """

    run: Callable[..., Any]
    summary: str
    paper: str
    distributional: bool = False
    norms: tuple[str, ...] = ("Linf", "L2", "L1")
    cascade: Callable[..., Cascade] | None = None
    fits: Callable[[ThreatModel, tuple[int, int]], None] | None = None


_CROCE = "Croce and Hein 2020, arXiv 2003.01690"
ATTACKS: dict[str, AttackInfo] = {
    "fgsm": AttackInfo(fgsm, "one step of steepest ascent", "Goodfellow et al. 2015, arXiv 1412.6572"),
    "pgd": AttackInfo(
        pgd, "projected gradient ascent with restarts, best per example", "Madry et al. 2018, arXiv 1706.06083"
    ),
    "apgd-ce": AttackInfo(apgd_ce, "PGD that sets its own step, cross entropy", _CROCE),
    "apgd-t": AttackInfo(apgd_t, "the same on the targeted DLR loss, four classes or more", _CROCE),
    "fab-t": AttackInfo(fab_t, "targeted search for the smallest change", "Croce and Hein 2020, arXiv 1907.02044"),
    "square": AttackInfo(
        square, "random search without gradients", "Andriushchenko et al. 2020, arXiv 1912.00049", fits=check_windows
    ),
    "autoattack": AttackInfo(
        autoattack, "the four above in turn, by their authors' code", _CROCE, cascade=standard, fits=check_windows
    ),
    "screen": AttackInfo(screen, "a cheap cascade: an upper bound, not AutoAttack", _CROCE, cascade=screen_stages),
    "w-fgsm": AttackInfo(
        w_fgsm, "one step, budget shared over the set", "Bai et al. 2023, arXiv 2306.09844", True, ("Linf", "L2")
    ),
    "w-pgd": AttackInfo(
        w_pgd, "projected ascent, budget shared over the set", "Bai et al. 2023, arXiv 2306.09844", True, ("Linf", "L2")
    ),
    "knapsack": AttackInfo(
        knapsack,
        "the cheapest flips of a minimum-norm search, budget shared over the set",
        "arXiv 2510.10000",
        True,
        ("Linf", "L2"),
    ),
}
# what evaluate passes in by itself
_GIVEN = {"model", "x", "y", "threat", "batch_size", "reduce", "seed"}


@dataclass(frozen=True)
class AttackSpec:
    """An attack with its settings: `pgd:steps=50,restarts=5`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> AttackInfo:
        return ATTACKS[self.name]

    @classmethod
    def parse(cls, text: str) -> AttackSpec:
        """Read `pgd` or `pgd:steps=50,restarts=5`; missing settings take the attack's defaults. Raises UserError."""
        name, _, rest = text.strip().partition(":")
        if name not in ATTACKS:
            raise UserError(
                f"unknown attack {name!r}.{nearest(name, list(ATTACKS))}",
                f"attacks: clean, {', '.join(ATTACKS)}; robustify ls attacks",
            )
        settings = options(name)
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if key not in settings or not equals:
                raise UserError(
                    f"attack {name} has no setting {item!r}.{nearest(key, list(settings))}",
                    f"settings: {', '.join(f'{k}={v}' for k, v in settings.items())}",
                )
            settings[key] = _read(name, key, value, settings[key])
        return cls(name, settings)

    def cascade(self, threat: ThreatModel, classes: int) -> Cascade:
        """What runs in turn against a model of so many classes; a single attack is one stage, without a label."""
        if self.info.cascade is not None:
            return self.info.cascade(threat, classes, **self.settings)
        return Cascade("", (Stage(self.name, self.info.run, self.settings),))

    def under(self, threat: ThreatModel) -> ThreatModel:
        """The threat under which this attack measures: pointwise attacks take the ball of that radius, distributional
        ones the Wasserstein ball of order 2 when the threat is pointwise."""
        if self.info.distributional:
            return threat if threat.distributional else ThreatModel(threat.norm, threat.eps, 2.0)
        return threat.pointwise()

    def check(self, threat: ThreatModel, size: tuple[int, int] | None = None) -> None:
        """Raise UserError when the attack cannot attack under this threat, images of (height, width) where that is known."""
        if threat.norm not in self.info.norms:
            raise UserError(
                f"attack {self.name} does not know the norm {threat.norm}", f"norms: {', '.join(self.info.norms)}"
            )
        if size is not None and self.info.fits is not None:
            self.info.fits(threat, size)

    def __str__(self) -> str:
        return f"{self.name}:{','.join(f'{k}={v}' for k, v in self.settings.items())}" if self.settings else self.name


def options(name: str) -> dict[str, Any]:
    """Return an attack's settings and their defaults, read off its signature."""
    parameters = inspect.signature(ATTACKS[name].run).parameters
    return {key: value.default for key, value in parameters.items() if key not in _GIVEN}


def _read(attack: str, key: str, text: str, default: Any) -> Any:
    value = yaml.safe_load(text)
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    wrong = type(value) is not type(default) or (isinstance(value, (int, float)) and value <= 0)
    if wrong or (key == "loss" and value not in LOSSES):
        allowed = ", ".join(LOSSES) if key == "loss" else f"a positive {type(default).__name__}"
        raise UserError(
            f"attack {attack}: {key}={text} is not valid",
            f"{key} is one of {allowed}" if key == "loss" else f"{key} is {allowed}",
        )
    return value
