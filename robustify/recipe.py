"""Recipe: the frozen, typed description of a run, and the only thing needed to repeat it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from robustify.attacks import AttackSpec
from robustify.errors import UserError, nearest
from robustify.intervals import points
from robustify.methods import METHODS, AnyMethod, Gaat, has_consistency, withstood
from robustify.methods.base import OwnStep, replays
from robustify.methods.remedies import Remedy, next_remedy
from robustify.schedules import OWN_START, Accelat, Kind
from robustify.settings import Settings
from robustify.threat import ThreatModel

Origins = dict[str, str]
DEFAULT_RADIUS = "Linf:8/255"
LOCAL = {  # what no result depends on: where things lie here, what is checked, how fast, what is logged
    "model": ("models_dir", "allow_pickle", "verify", "license"),
    "data": ("root", "workers"),
    "train": ("tracker", "checkpoint_steps"),
}


class ModelSettings(Settings):
    """Where the network comes from. source: a RobustBench name, a timm name, or a folder (`robustify ls models`).
    license: of that network, where it does not say it itself."""

    source: str
    dataset: str | None = None
    threat: str | None = None
    num_classes: int | None = Field(default=None, ge=2)
    pretrained: bool = True
    models_dir: str | None = Field(
        default=None, exclude=True
    )  # where the weights lie here; no part of what is repeated elsewhere
    allow_pickle: bool = False
    verify: bool = True
    license: str | None = None


class DataSettings(Settings):
    """name: digits, cifar10, cifar100, folder:PATH or npz:PATH. limit: use at most so many training images.

    unlabelled: images whose labels are not used, a name like the above or `rest`, the training images that limit leaves out.
    They make up unlabelled_share of every batch: as pseudo-labelled ones, those that the loaded network is
    unlabelled_confidence sure of, or in the consistency term alone, where the method has one."""

    name: str = "cifar10"
    root: str | None = None
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=2)
    augment: Literal["auto", "none", "flip", "crop-flip", "shift"] = "auto"
    workers: int = Field(default=0, ge=0)
    unlabelled: str | None = None
    unlabelled_as: Literal["pseudo", "consistency"] = "pseudo"
    unlabelled_share: float = Field(default=0.5, gt=0, lt=1)
    unlabelled_confidence: float = Field(default=0.9, ge=0, le=1)


class TrainSettings(Settings):
    """layers: last, full, or patterns on parameter names. batch_size: images per optimiser step, over all processes;
    accumulate splits it into that many passes. init: weights as loaded, with the classifier re-initialised, or with
    init_noise * std(w) of Gaussian noise. awp: size of the adversarial weight perturbation (the paper's gamma, 0.005 to
    0.01), which doubles the training passes. probe_images: held-out images on which robust accuracy is watched every epoch,
    the best epoch is kept and a fall of collapse_drop below it is a collapse, if the next epoch has not recovered from it or
    a one-step attack has gone blind. on_collapse: what training goes on with from there, smaller-alpha, n-fgsm or pgd-2, or
    stop (None: n-fgsm for fast-at, pgd-2 for gaat, stop for the others). accelat: the sizes of that schedule's rule. keep:
    the epoch that was most robust on the probe's images, or the last one.
    max_clean_drop: afterwards, go back from the trained weights toward the loaded ones until clean accuracy on the held-out
    images is at most so many points below theirs, to the most robust such point of the line (robustify.blend)."""

    layers: str = "full"
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=0.01, gt=0, le=100)
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    base_batch: int = Field(default=256, ge=1)
    optimizer: Literal["sgd", "adamw", "lamb", "lars"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    trust_clip: bool = False
    schedule: Kind = "cosine"
    accelat: Accelat = Accelat()
    warmup_epochs: int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    awp: float | None = Field(default=None, gt=0, le=0.1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    batchnorm: Literal["train", "frozen", "sync"] = "train"
    compress: Literal["none", "fp16", "bf16", "power_sgd", "qsgd"] = "none"
    compress_rank: int = Field(default=2, ge=1)
    error_feedback: bool = False
    init: Literal["loaded", "reinit", "noise"] = "loaded"
    init_noise: float = Field(default=0.05, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(default=0, ge=0)
    keep: Literal["best", "last"] = "best"
    max_clean_drop: float | None = Field(default=None, ge=0, le=100)
    probe_images: int = Field(default=512, ge=16)
    collapse_drop: float = Field(default=0.2, gt=0, le=1)
    on_collapse: Remedy | None = None
    checkpoint_steps: int | None = Field(default=None, ge=1)
    tracker: str | None = None

    @field_validator("max_clean_drop")
    @classmethod
    def _in_points(cls, drop: float | None) -> float | None:
        return drop if drop is None else _as_value_error(points, drop)

    @model_validator(mode="after")
    def _divisible(self) -> TrainSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} leaves nothing of {self.epochs} epochs")
        if self.error_feedback and self.compress != "qsgd":
            raise ValueError("error_feedback belongs to compress: qsgd; power_sgd always has its own")
        if self.trust_clip and self.optimizer not in ("lamb", "lars"):
            raise ValueError(f"trust_clip belongs to the optimizers lamb and lars, not {self.optimizer}")
        if self.warmup_epochs and self.schedule in OWN_START:
            raise ValueError(f"schedule {self.schedule} takes no warmup_epochs: take cosine, step or constant")
        return self

    @property
    def rate(self) -> float:
        """The learning rate of this batch size: lr times (batch_size / base_batch), or its square root, or 1."""
        return self.lr * (self.batch_size / self.base_batch) ** {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.scale_lr]


class EvalSettings(Settings):
    """What is measured before and after. n: test images, drawn by the seed (None: all)."""

    attacks: tuple[str, ...] = ("clean", "fgsm", "pgd", "w-pgd")
    n: int | None = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("attacks")
    @classmethod
    def _known(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        for attack in attacks:
            if attack != "clean":
                _as_value_error(AttackSpec.parse, attack)
        return attacks


class Recipe(Settings):
    """Model, data, threat, method, training and evaluation of one run."""

    model: ModelSettings
    data: DataSettings = DataSettings()
    threat: ThreatModel
    method: AnyMethod
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        """`model: NAME`, `data: NAME`, `method: NAME`; the threat follows the method when none is given."""
        if not isinstance(values, Mapping):
            return values
        values = expanded(values)
        method_values = values.get("method") or {}
        if isinstance(method_values, Mapping):
            values["method"] = {"name": "wasserstein", **method_values}
            method = METHODS.get(str(values["method"]["name"]))
        else:
            method = None
        if values.get("threat") is None:
            values["threat"] = f"W2-{DEFAULT_RADIUS}" if method and method.distributional else DEFAULT_RADIUS
        return values

    @model_validator(mode="after")
    def _method_fits_threat(self) -> Recipe:
        name, threat = self.method.name, self.threat
        if self.method.distributional and not threat.distributional:
            raise ValueError(
                f"method {name} trains against a Wasserstein threat, {threat.spec} is pointwise: write threat: W2-{threat.spec}"
            )
        if threat.distributional and not self.method.distributional and name != "standard":
            raise ValueError(
                f"method {name} trains against a pointwise threat, {threat.spec} is distributional: "
                f"write threat: {threat.pointwise().spec}, or take method wasserstein"
            )
        adversary = getattr(self.method, "adversary", None)
        if adversary is not None and adversary.name == "dual" and threat.p == math.inf:
            raise ValueError(f"adversary dual needs a price per distance, which {threat.spec} has none of: take method trades")
        if threat.norm not in self.method.norms:
            raise ValueError(
                f"method {name} does not train in the norm {threat.norm}; it knows {', '.join(self.method.norms)}"
                + (
                    ""
                    if self.method.distributional
                    else f". In {threat.norm} there is "
                    + ", ".join(other for other, kind in METHODS.items() if kind.adversarial and threat.norm in kind.norms)
                )
            )
        return self

    @model_validator(mode="after")
    def _method_fits_training(self) -> Recipe:
        name, t = self.method.name, self.train
        if getattr(self.method, "second_derivatives", False) and t.precision != "no":
            other = "gradient: hessian-free" if name == "gaat" else "noise: n-fgsm in place of grad_align"
            raise ValueError(
                f"method {name} differentiates gradients again, which {t.precision} rounds away: take precision no, or {other}"
            )
        if isinstance(self.method, Gaat) and t.precision != "no" and self.method.h < self.method.shortest_in_half:
            raise ValueError(
                f"gaat's differences over h {self.method.h:g} of the step drown in {t.precision}'s rounding: "
                f"with order {self.method.order} take h {self.method.shortest_in_half:g} or more, or precision no"
            )
        if t.on_collapse and next_remedy(self.method, t.on_collapse, ()) != t.on_collapse:
            usual = next_remedy(self.method, None, ())
            raise ValueError(f"on_collapse {t.on_collapse} is no remedy for method {name}: take {usual}")
        if getattr(self.method, "noise", None) == "uniform-radius" and self.threat.norm != "L2":
            raise ValueError("noise uniform-radius is a reading of the L2 ball; in Linf take noise: uniform")
        if name == "free-at" and t.awp is not None:
            raise ValueError(
                "awp finds the worst weights with a first backward pass, which would move free-at's perturbation too. "
                "Take awp with pgd-at, trades, mart or fast-at"
            )
        if t.awp is not None and t.precision == "fp16":
            raise ValueError(
                "awp steps along the gradient of its first backward pass, which fp16's scaling may make infinite: "
                "take precision bf16 or no"
            )
        several = "awp" if t.awp is not None else name if isinstance(self.method, OwnStep) and name != "free-at" else None
        if t.compress != "none" and several:
            raise ValueError(
                f"compress {t.compress} stands for one exchange of gradients a step, {several} takes several backward passes: "
                "take compress none"
            )
        if replays(self.method) > 1 and t.accumulate > 1:
            raise ValueError(
                f"method {name} replays whole batches, accumulate {t.accumulate} splits them: take accumulate 1 and "
                f"batch_size {t.batch_size // t.accumulate}"
            )
        return self

    @model_validator(mode="after")
    def _threat_is_withstood(self) -> Recipe:
        if self.threat not in (union := withstood(self.method, self.threat)):
            specs = ", ".join(threat.spec for threat in union)
            raise ValueError(f"the threat {self.threat.spec} is none of method.threats [{specs}]: take {union[0].spec}")
        return self

    @model_validator(mode="after")
    def _consistency_has_a_term(self) -> Recipe:
        if self.data.unlabelled and self.data.unlabelled_as == "consistency" and not has_consistency(self.method):
            raise ValueError(
                f"method {self.method.name} has no term without labels: write data.unlabelled_as: pseudo, or take "
                "wasserstein or trades"
            )
        return self

    @model_validator(mode="after")
    def _attacks_fit_threat(self) -> Recipe:
        for text in self.eval.attacks:
            if text != "clean":
                spec = AttackSpec.parse(text)
                for threat in withstood(self.method, self.threat):
                    _as_value_error(spec.check, spec.under(threat))
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any setting that the result depends on.

        Settings at their defaults are left out, so a recipe keeps its digest when robustify learns another setting.
        """
        portable = {}
        for section, keys in LOCAL.items():
            part = getattr(self, section)
            portable[section] = part.model_copy(update={key: type(part).model_fields[key].default for key in keys})
        said = _said(self.model_copy(update=portable))
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _said(settings: Settings) -> dict[str, Any]:
    """The settings that are not their defaults, as JSON values. A `name` stays: it says whose settings the others are."""
    fields, written = type(settings).model_fields, settings.model_dump(mode="json")
    return {
        key: _said(value) if isinstance(value, Settings) else written[key]
        for key, value in settings
        if key == "name" or value != fields[key].default
    }


def build(values: Mapping[str, Any], unnamed: Sequence[str] = ()) -> Recipe:
    """Validate a mapping into a Recipe. Raises one UserError that lists every mistake, each with its key and value.

    unnamed: sections whose settings the user typed without the section's name.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(dict(found), unnamed) for found in error.errors()]
        what = "1 setting is" if len(lines) == 1 else f"{len(lines)} settings are"
        raise UserError(f"{what} not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _explain(error: dict[str, Any], unnamed: Sequence[str]) -> str:
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 2 and loc[0] == "method":
        loc = [loc[0], *loc[2:]]  # without pydantic's tag of the union
    key = ".".join(loc[1:] if loc and loc[0] in unnamed else loc)
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"])
        return f"unknown key {key} = {value!r}.{nearest(loc[-1], known)} Known: {', '.join(known)}"
    if error["type"] == "union_tag_invalid":
        name = value.get("name") if isinstance(value, Mapping) else value
        return f"unknown method {name!r}.{nearest(str(name), list(METHODS))} Methods: {', '.join(METHODS)}"
    message = "; ".join(line.strip() for line in str(error["msg"]).removeprefix("Value error, ").splitlines())
    if error["type"] == "missing":
        return f"{key} is missing"
    shown = "" if isinstance(value, (Mapping, Settings)) or error["type"] == "value_error" else f" = {value!r}"
    return f"{key}{shown}: {message}" if key else message


def _known_keys(loc: Sequence[Any]) -> list[str]:
    kind: Any = METHODS[loc[1]] if loc[0] == "method" and len(loc) > 2 else Recipe
    for part in () if kind is not Recipe else loc[:-1]:
        kind = kind.model_fields[part].annotation
    return list(kind.model_fields)


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """`model: NAME`, `data: NAME` and `method: NAME` written out."""
    expanded = {**values}
    for key, inner in (("model", "source"), ("data", "name"), ("method", "name")):
        if isinstance(expanded.get(key), str):
            expanded[key] = {inner: expanded[key]}
    return expanded


def _as_value_error(read: Any, value: Any) -> Any:
    try:
        return read(value)
    except UserError as error:
        raise ValueError(str(error)) from None
