"""Report: what was measured, on what, under which attack; per-example verdicts, JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robustify import files
from robustify.environment import version_of
from robustify.errors import UserError
from robustify.intervals import percent, percent_interval, wilson

Kind = Literal["clean", "pointwise", "distributional"]
Verdicts = Mapping[str, np.ndarray]  # row key -> bool [n]: is example i of the evaluated order classified correctly?
_FORMAT = 1
_DISTANCE = "distance:"  # before the row key, in the .npz
_INNER = ("stages", "left")  # of a cascade: in the JSON only; `left` is a result


@dataclass(frozen=True)
class Row:
    """One attack under one threat, or the clean images.

    threat:  ThreatModel.spec; None for clean.
    correct: how many of the n examples withstood; fractional where a distributional adversary mixes perturbations.
    passes:  average forward and backward passes per image, of all networks that it took; seconds: wall time of the whole row.
    """

    attack: str
    threat: str | None
    n: int
    correct: float
    settings: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    kind: Kind = "pointwise"

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n or self.n < 1:
            raise ValueError(f"{self.attack}: {self.correct} correct of {self.n} examples")
        if (self.kind == "clean") != (self.threat is None):
            raise ValueError(f"{self.attack}: a {self.kind} row cannot have the threat {self.threat}")
        for name in ("settings", "passes"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def key(self) -> str:
        """What names the row's verdicts: unique within a report."""
        return f"{self.attack} {self.threat}" if self.threat else self.attack

    @property
    def accuracy(self) -> float:
        """Share of the examples classified correctly, in [0,1]."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the accuracy."""
        return wilson(self.correct, self.n)

    def told(self) -> str:
        """The settings for people, `steps=20, restarts=1`."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items() if name not in _INNER)


@dataclass(frozen=True)
class Headline:
    """The one number of a threat: accuracy in the worst case over the attacks run, an upper bound of the true one."""

    threat: str
    n: int
    correct: float
    attacks: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the accuracy."""
        return wilson(self.correct, self.n)


@dataclass(frozen=True)
class Report:
    """All measurements of one model on one split.

    verdicts:  bool [n] per row key, in the evaluated order: a row of fewer examples covers the first ones.
               Distributional rows have none. They live in an .npz beside the JSON.
    distances: float32 [n] per row key: the size of the perturbation that fooled, 0 where the clean image is wrong,
               infinite where none was found. An upper bound of the flip distance; beside the verdicts in the .npz.
    checks:    what the checks of the model measured, robustify.sanity; what they found wrong is among the notes.
    facts:     what another evaluation must share to be this one: digests of the weights and of the images, settings.
    headlines: filled when read back, so that the figures stand without the .npz.
    """

    model_id: str
    data: str
    split: str
    rows: Sequence[Row]
    verdicts: Verdicts = field(default_factory=dict, compare=False, repr=False)
    environment: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = field(default_factory=lambda: version_of("robustify"))
    notes: list[str] = field(default_factory=list)
    distances: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    checks: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    headlines: tuple[Headline, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        rows = {row.key: row for row in self.rows}
        if len(rows) < len(self.rows):
            raise ValueError(f"two rows have the same attack and threat: {[row.key for row in self.rows]}")
        for key, distance in self.distances.items():
            if key not in rows or distance.shape != (rows[key].n,):
                raise ValueError(f"the distances of {key!r} do not belong to its row")
        for key, verdict in self.verdicts.items():
            if key not in rows or verdict.shape != (rows[key].n,) or int(verdict.sum()) != rows[key].correct:
                raise ValueError(f"the verdicts of {key!r} do not belong to its row")

    @property
    def data_digest(self) -> str | None:
        """A digest of the images and labels that were evaluated, in their order."""
        return self.facts.get("data")

    @property
    def clean(self) -> Row | None:
        """The row of the clean images."""
        return next((row for row in self.rows if row.kind == "clean"), None)

    @property
    def threats(self) -> list[str]:
        """The specs of the threats measured, in the order of the rows."""
        return list(dict.fromkeys(row.threat for row in self.rows if row.threat))

    def headline(self, threat: str) -> Headline:
        """Return the worst case over all attacks of that threat: per example where every row has verdicts.

        threat: a ThreatModel.spec. The clean image is among the perturbed ones. Rows of different n are joined on the
        first examples, which all share. A distributional adversary acts on all examples at once: the lowest row stands.
        Raises KeyError when the report has no attack of that threat.
        """
        rows = [row for row in self.rows if row.threat == threat]
        if not rows:
            raise KeyError(f"no attack of {threat} in this report; it has {', '.join(self.threats) or 'none'}")
        names = tuple(row.attack for row in rows)
        held = self.held(threat)
        if held is not None:
            return Headline(threat, len(held), int(held.sum()), names)
        known = next((headline for headline in self.headlines if headline.threat == threat), None)
        if known:
            return known
        worst = min(rows, key=lambda row: row.accuracy)
        return Headline(threat, worst.n, worst.correct, names)

    def held(self, threat: str) -> np.ndarray | None:
        """Return bool [n]: which examples withstand every attack of a pointwise threat; None where verdicts lack."""
        rows = [row for row in self.rows if row.threat == threat]
        if not rows or not all(row.kind == "pointwise" and row.key in self.verdicts for row in rows):
            return None
        if self.clean and self.clean.key in self.verdicts:
            rows.append(self.clean)
        n = min(row.n for row in rows)
        return np.logical_and.reduce([self.verdicts[row.key][:n] for row in rows])

    def union(self) -> Headline | None:
        """Return the worst case over all pointwise threats where they are of several norms; else None."""
        held = self.held_by_all()
        if held is None:
            return None
        rows = [row for row in self.rows if row.kind == "pointwise"]
        threat = " and ".join(dict.fromkeys(row.threat for row in rows if row.threat))
        return Headline(threat, len(held), int(held.sum()), tuple(dict.fromkeys(row.attack for row in rows)))

    def held_by_all(self) -> np.ndarray | None:
        """Return bool [n]: which examples withstand every pointwise threat; None with one norm or without verdicts."""
        threats = list(dict.fromkeys(row.threat for row in self.rows if row.kind == "pointwise" and row.threat))
        if len({threat.partition(":")[0] for threat in threats}) < 2:
            return None
        found = [self.held(threat) for threat in threats]
        held = [verdicts for verdicts in found if verdicts is not None]
        if len(held) < len(found):
            return None
        n = min(map(len, held))
        return np.logical_and.reduce([verdicts[:n] for verdicts in held])

    def per_threat(self) -> list[Headline]:
        """Return the headline of each threat, then that of all norms together where they are several."""
        union = self.union()
        return [*map(self.headline, self.threats), *([union] if union else [])]

    def worst_cases(self) -> list[Headline]:
        """Return those headlines that no single row says: over several attacks, or over several norms."""
        return [found for found in self.per_threat() if len(found.attacks) > 1 or found.threat not in self.threats]

    def to_json(self) -> dict[str, Any]:
        """Return everything but what is per example as JSON values; derived figures are included for others."""
        rows = [_with_figures(row) for row in self.rows]
        headlines = [_with_figures(self.headline(threat)) for threat in self.threats]
        apart = ("rows", "verdicts", "distances", "headlines")
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in apart}
        return {"format": _FORMAT, "digest": self.digest(), **plain(shown), "headlines": headlines, "rows": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Report:
        """Read what `to_json` and `arrays` returned. Raises UserError when it is not such a report, and when the figures
        are not those whose digest it names, which every robustify of this format has taken alike."""
        distances = {k.removeprefix(_DISTANCE): v for k, v in (arrays or {}).items() if k.startswith(_DISTANCE)}
        verdicts = {k: v for k, v in (arrays or {}).items() if not k.startswith(_DISTANCE)}
        try:
            if value["format"] > _FORMAT:
                raise UserError(f"the report has format {value['format']}, not {_FORMAT}", "upgrade robustify")
            rows = [_only_fields(Row, row) for row in value["rows"]]
            headlines = tuple(_only_fields(Headline, {**h, "attacks": tuple(h["attacks"])}) for h in value["headlines"])
            known = {f.name: value[f.name] for f in dataclasses.fields(cls) if f.name in value}
            found = cls(**{**known, "rows": rows, "headlines": headlines, "verdicts": verdicts, "distances": distances})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a report of robustify: {error}", "`robustify evaluate` writes report.json") from error
        if (stored := value.get("digest", found.digest())) != found.digest():
            message = f"the report of {found.model_id} was changed: its figures have the digest {found.digest()}, not {stored}"
            raise UserError(message, "take the report as it was written, or measure anew: robustify evaluate")
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is per example, as it is stored beside the JSON: verdicts by row key, and the distances."""
        distances = {_DISTANCE + key: np.asarray(v, np.float32) for key, v in self.distances.items()}
        return {**{key: np.asarray(v, bool) for key, v in self.verdicts.items()}, **distances}

    def digest(self) -> str:
        """Return 12 hex digits of the figures: equal for equal measurements, whenever and however fast they ran."""
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if k != "seconds"} for row in self.rows]
        headlines = [dataclasses.asdict(self.headline(threat)) for threat in self.threats]
        figures = {"data": self.data, "split": self.split, "seed": self.seed, "rows": rows, "headlines": headlines}
        return hashlib.sha256(json.dumps(plain(figures), sort_keys=True).encode()).hexdigest()[:12]

    def __repr__(self) -> str:
        return f"<Report of {self.model_id} on {self.data}, {self.split}: {len(self.rows)} rows>"

    def __str__(self) -> str:
        """The table and the notes, for people."""
        tables = [*_aligned(self.table()), *_aligned(self.attacks())]
        return "\n".join([f"{self.model_id} on {self.data}, {self.split}", *tables, *self.notes])

    def table(self) -> list[dict[str, str]]:
        """Return the lines to show as text: attack, threat, accuracy, interval, n, seconds; worst cases come last."""
        lines = [_line(row.attack, row.threat, row, f"{row.seconds:.1f}") for row in self.rows]
        return lines + [_line("worst case", h.threat, h, "") for h in self.worst_cases()]

    def attacks(self) -> list[dict[str, str]]:
        """Return the lines that say with which settings each attack ran."""
        known = dict.fromkeys((row.attack, row.told()) for row in self.rows if row.told())
        return [{"attack": attack, "settings": settings} for attack, settings in known]

    def save(self, path: str | Path) -> None:
        """Write the JSON to `path` and what is per example beside it (.npz). Raises UserError when the disk is full."""
        _save(Path(path), self.to_json(), self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote. Raises UserError when there is none."""
        value, arrays = _load(Path(path), "`robustify evaluate -o FILE` writes one")
        if {"before", "after"} <= value.keys():
            hint = "`robustify evaluate RUN -o measured.json` writes one of the hardened model"
            raise UserError(f"{path} holds a run's two reports, before and after it, not one", hint)
        return cls.from_json(value, arrays)


def save_pair(path: str | Path, before: Report, after: Report) -> None:
    """Write both reports of a run into one JSON, {"before", "after"}, and what is per example beside it."""
    both = {"before": before, "after": after}
    arrays = {f"{name}:{key}": v for name, report in both.items() for key, v in report.arrays().items()}
    _save(Path(path), {name: report.to_json() for name, report in both.items()}, arrays)


def load_pair(path: str | Path) -> tuple[Report, Report]:
    """Read what `save_pair` wrote: (before, after). Raises UserError when there is none."""
    hint = "`robustify finetune` measures before and after, and writes both"
    value, arrays = _load(Path(path), hint)
    if not {"before", "after"} <= value.keys():
        raise UserError(f"{path} does not hold a report before and one after", hint)

    def part(name: str) -> Report:
        mine = {key.removeprefix(f"{name}:"): v for key, v in arrays.items() if key.startswith(f"{name}:")}
        return Report.from_json(value[name], mine)

    return part("before"), part("after")


def plain(value: Any) -> Any:
    """Return the value made of JSON's types: arrays and tuples as lists, infinities as text, anything else by str()."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _with_figures(row: Row | Headline) -> dict[str, Any]:
    return plain({**dataclasses.asdict(row), "accuracy": row.accuracy, "interval": row.interval})


def _only_fields(kind: type[Any], value: Mapping[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in value.items() if k in names})


def _line(attack: str, threat: str | None, row: Row | Headline, seconds: str) -> dict[str, str]:
    figures = {"accuracy": percent(row.accuracy), "interval": percent_interval(row.interval), "n": str(row.n)}
    return {"attack": attack, "threat": (threat or "").replace(":", " "), **figures, "seconds": seconds}


def _aligned(table: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [list(table[0]), *(list(line.values()) for line in table)] if table else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _save(path: Path, value: dict[str, Any], verdicts: Mapping[str, np.ndarray]) -> None:
    """The verdicts go first, and the JSON names their digest: a kill between the two files cannot mix two runs."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **verdicts)  # pyright: ignore[reportArgumentType]
    files.write_bytes(path.with_suffix(".npz"), buffer.getvalue())
    files.write_json(path, {**value, "verdicts_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})


def _load(path: Path, hint: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the JSON and the verdicts, which are empty when their file is gone or belongs to another report."""
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UserError(f"there is no report {path}", hint) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the report {path}: {error}", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a report of robustify", hint)
    side = path.with_suffix(".npz")
    data = side.read_bytes() if side.is_file() else b""
    if hashlib.sha256(data).hexdigest() != value.get("verdicts_sha256"):
        return value, {}
    with np.load(io.BytesIO(data)) as arrays:
        return value, {name: arrays[name] for name in arrays.files}
