"""What reports know about accuracy at a radius, as lines of a picture: one panel for each norm and Wasserstein order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robustify.errors import UserError
from robustify.knapsack import worst_curve
from robustify.plots import Kind, Line, Panel
from robustify.report import Report, Row
from robustify.threat import Norm, ThreatModel

_BEYOND = 1.25  # of the largest radius measured: as far as the curves are drawn
_POINTS = 201


def panels(reports: Sequence[Report]) -> dict[Panel, list[Line]]:
    """Return the lines of all models, told apart by `model_id`, that were measured under a threat.

    Pointwise: the worst case over the attacks at each radius. Distributional: each attack at each radius, and the
    knapsack's whole curve, from the flip distances beside the report. Where these are known, the pointwise panel has
    their curve as well. Raises UserError when nothing was attacked.
    """
    threats = [ThreatModel.parse(threat) for report in reports for threat in report.threats]
    if not threats:
        raise UserError("there is no attack to draw, clean accuracy has no radius", "--attack pgd --threat Linf:8/255")
    found: dict[Panel, list[Line]] = {}
    radius: dict[Panel, float] = {}  # the largest
    for threat in threats:
        radius[threat.norm, threat.p] = max(threat.eps, radius.get((threat.norm, threat.p), 0.0))
    for (norm, p), largest in radius.items():
        radii = np.linspace(0, _BEYOND * largest, _POINTS)
        lines = [_pointwise(r, norm, radii) if p is None else _distributional(r, norm, p, radii) for r in reports]
        found[norm, p] = [line for some in lines for line in some]
    return found


def _pointwise(report: Report, norm: Norm, radii: np.ndarray) -> list[Line]:
    several = sorted(
        (threat for threat in map(ThreatModel.parse, report.threats) if (threat.norm, threat.p) == (norm, None)),
        key=lambda threat: threat.eps,
    )
    lines = []
    if several:
        clean = [report.clean] if report.clean else []
        known = [*clean, *(report.headline(threat.spec) for threat in several)]
        at = [0.0] * len(clean) + [threat.eps for threat in several]
        shares, intervals = [one.accuracy for one in known], [one.interval for one in known]
        lines.append(Line(_name(report), "worst case", at, shares, intervals))
    d = _flips(report, norm)
    if d is not None:
        lines.append(Line(_name(report), "nearest flips", radii, (d > radii[:, None]).mean(1)))
    return lines


def _distributional(report: Report, norm: Norm, p: float, radii: np.ndarray) -> list[Line]:
    lines = []
    kinds: tuple[Kind, ...] = ("w-fgsm", "w-pgd", "knapsack")
    d = _flips(report, norm)
    for kind in kinds:
        rows = {eps: row for row in report.rows if (eps := _radius(row, kind, norm, p)) is not None}
        if kind == "knapsack" and d is not None:
            lines.append(Line(_name(report), kind, radii, worst_curve(d, radii, p)))
        elif rows:
            at = sorted(rows)
            lines.append(Line(_name(report), kind, at, [rows[eps].accuracy for eps in at]))
    return lines


def _radius(row: Row, attack: str, norm: Norm, p: float) -> float | None:
    """The radius of a row of this attack, norm and order; None of another row."""
    if row.threat is None or row.attack.partition(":")[0] != attack:
        return None
    threat = ThreatModel.parse(row.threat)
    return threat.eps if (threat.norm, threat.p) == (norm, p) else None


def _flips(report: Report, norm: Norm) -> np.ndarray | None:
    """The flip distances that a knapsack bought at, [n]; None without one. Attacks at one radius know no other."""
    for row in report.rows:
        known = row.attack.startswith("knapsack") and row.key in report.distances
        if known and ThreatModel.parse(str(row.threat)).norm == norm:
            return np.asarray(report.distances[row.key], np.float64)
    return None


def _name(report: Report) -> str:
    return f"{report.model_id} (n = {max(row.n for row in report.rows)})"
