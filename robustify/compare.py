"""Paired comparison of reports: what one model gains over another on the very same images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustify.errors import UserError
from robustify.intervals import paired_difference, percent
from robustify.report import Report, Row, plain
from robustify.threat import ThreatModel

_DRAWS = 2000


@dataclass(frozen=True)
class Difference:
    """One measurement of two models. difference = after - before, in shares of the images; interval: 95 %.

    interval: of paired verdicts (report.paired_difference), or a paired bootstrap over the images where the attack is a
    knapsack. p_value: McNemar's exact test that neither model is better. Both None where the images share a budget and
    only verdicts are known: these are not independent.
    """

    attack: str
    threat: str | None
    before: float
    after: float
    difference: float
    interval: tuple[float, float] | None
    p_value: float | None

    def in_points(self) -> str:
        """Return `+1.25 [-0.50, +3.00]`, the interval where there is one."""
        interval = "" if self.interval is None else f" [{100 * self.interval[0]:+.2f}, {100 * self.interval[1]:+.2f}]"
        return f"{100 * self.difference:+.2f}{interval}"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same n images. left_out: rows of both whose attacks had other settings, and which."""

    before: str
    after: str
    n: int
    differences: tuple[Difference, ...]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return plain(dataclasses.asdict(self))

    def table(self, names: tuple[str, str] | None = None) -> list[dict[str, str]]:
        """Return the lines to show as text. names: of the two columns of accuracies, by default the models'."""
        first, second = names or (self.before, self.after)
        if first == second:
            first, second = f"before: {first}", f"after: {second}"
        return [_line(difference, first, second) for difference in self.differences]

    def changes(self) -> list[dict[str, str]]:
        """Return the lines of a shorter table, of one model before and after: the interval stands with the change."""
        return [
            {
                "attack": one.attack,
                "threat": _shown(one),
                "before": percent(one.before),
                "after": percent(one.after),
                "change in points": one.in_points(),
                "n": str(self.n),
            }
            for one in self.differences
        ]


def compare(reports: Sequence[Report]) -> list[Comparison]:
    """Return each later report against the first, in all rows they share, and in the worst case of each shared threat.

    Rows are shared when the attacks had the same settings. Raises UserError with fewer than two reports, when they are of
    other images, or share no row.
    """
    if len(reports) < 2:
        raise UserError("one report has nothing to be compared with", "robustify compare BEFORE.json AFTER.json")
    return [_pair(reports[0], report) for report in reports[1:]]


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Return the exact two-sided p-value that verdicts, bool [n] each, change either way equally often."""
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    changed, fewer = won + lost, min(won, lost)
    ways = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, float(2 * ways / 2**changed))


def knapsack_difference(
    before: np.ndarray, after: np.ndarray, delta: float, p: float, draws: int = _DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Return (after - before, low, high) of the worst accuracy in the W_p ball, 95 % by paired bootstrap over images.

    before, after: flip distances of the same images, [N] each. Every draw of images gets its own budget and knapsack.
    """
    n = len(before)
    once = np.ones((1, n), np.int64)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    value = _worst_of_draws(after, once, delta, p) - _worst_of_draws(before, once, delta, p)
    drawn = _worst_of_draws(after, counts, delta, p) - _worst_of_draws(before, counts, delta, p)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value[0]), float(low), float(high)


def _worst_of_draws(distances: np.ndarray, counts: np.ndarray, delta: float, p: float) -> np.ndarray:
    """knapsack.worst_accuracy of many samples at once: image i is in sample b counts[b, i] times; [B]."""
    d = np.asarray(distances, np.float64)
    if math.isinf(p) or delta == 0:
        return (counts * (d > delta)).sum(1) / counts.sum(1)
    with np.errstate(over="ignore"):
        price = (d / delta) ** p
    order = np.argsort(price, kind="stable")
    order = order[np.isfinite(price[order])]
    total = counts.sum(1)
    if not len(order):
        return np.ones(len(counts))
    price, counts = price[order], counts[:, order]
    costs, flips = (counts * price).cumsum(1), counts.cumsum(1)
    whole = (costs <= total[:, None]).sum(1)  # kinds of flips that can be bought in full
    last = np.maximum(whole - 1, 0)
    rows = np.arange(len(counts))
    spent = np.where(whole > 0, costs[rows, last], 0.0)
    bought = np.where(whole > 0, flips[rows, last], 0.0)
    following = np.minimum(whole, len(order) - 1)
    part = np.where(whole < len(order), (total - spent) / np.maximum(price[following], np.finfo(float).tiny), 0.0)
    return 1 - (bought + part) / total


def _pair(before: Report, after: Report) -> Comparison:
    n = _size(before)
    _same("number of images", n, _size(after))
    if not (before.data_digest and before.data_digest == after.data_digest):  # the same pixels may go by two names
        for what in ("data", "split", "seed"):
            _same(what, getattr(before, what), getattr(after, what))
        if before.data_digest and after.data_digest:
            _same("digest of the pixels and labels", before.data_digest, after.data_digest)
    theirs = {row.key: row for row in after.rows}
    both = [(row, theirs[row.key]) for row in before.rows if row.key in theirs]
    shared = [(a, b) for a, b in both if _same_settings(a, b)]
    others = [(a, b) for a, b in both if not _same_settings(a, b)]
    left_out = tuple(f"{a.key}: {a.told() or 'none'} against {b.told() or 'none'}" for a, b in others)
    if not any(row.threat for row, _ in shared) and left_out:
        hint = "evaluate both with the same settings, as in --attack pgd:steps=50,restarts=5"
        raise UserError(f"the reports' attacks had other settings: {'; '.join(left_out)}", hint)
    if not shared:
        raise UserError(
            "the reports share no attack",
            f"{', '.join(row.key for row in before.rows)} against {', '.join(theirs)}: evaluate both with one attack",
        )
    found = [_difference(before, after, a, b) for a, b in shared]
    keys = {row.key for row, _ in shared}  # a worst case over other attacks on either side would be no comparison
    before, after = _only(before, keys), _only(after, keys)
    for threat in (threat for threat in before.threats if threat in after.threats):
        was, now = before.headline(threat), after.headline(threat)
        if max(len(was.attacks), len(now.attacks)) == 1:
            continue
        held, other = before.held(threat), after.held(threat)
        if held is not None and other is not None:
            found.append(_of_verdicts("worst case", threat, held, other))
        else:
            change = now.accuracy - was.accuracy
            found.append(Difference("worst case", threat, was.accuracy, now.accuracy, change, None, None))
    was, now = before.union(), after.union()
    if was is not None and now is not None and was.threat == now.threat:
        held, other = before.held_by_all(), after.held_by_all()
        assert held is not None
        assert other is not None
        found.append(_of_verdicts("worst case", was.threat, held, other))
    return Comparison(before.model_id, after.model_id, n, tuple(found), left_out)


def _same_settings(a: Row, b: Row) -> bool:
    """Of a cascade `left`, what each stage left, is a result."""
    one, other = ({**row.settings, "left": None} for row in (a, b))
    return one == other


def _only(report: Report, keys: set[str]) -> Report:
    """The report without the rows that the other one lacks."""
    if all(row.key in keys for row in report.rows):
        return report
    rows = tuple(row for row in report.rows if row.key in keys)
    verdicts, distances = ({k: v for k, v in of.items() if k in keys} for of in (report.verdicts, report.distances))
    return dataclasses.replace(report, rows=rows, verdicts=verdicts, distances=distances, headlines=())


def _size(report: Report) -> int:
    return max(row.n for row in report.rows)


def _same(what: str, one: Any, other: Any) -> None:
    if one != other:
        hint = "evaluate both models on the same data and split, with the same n and seed"
        raise UserError(f"the reports are of different images: {what} {one} and {other}", hint)


def _difference(before: Report, after: Report, a: Row, b: Row) -> Difference:
    if a.kind != "distributional" and a.key in before.verdicts and a.key in after.verdicts:
        return _of_verdicts(a.attack, a.threat, before.verdicts[a.key], after.verdicts[a.key])
    interval = None
    if a.kind == "distributional" and a.threat and a.key in before.distances and a.key in after.distances:
        threat = ThreatModel.parse(a.threat)
        pair = before.distances[a.key], after.distances[a.key]
        interval = knapsack_difference(*pair, threat.eps, threat.p or math.inf)[1:]
    return Difference(a.attack, a.threat, a.accuracy, b.accuracy, b.accuracy - a.accuracy, interval, None)


def _of_verdicts(attack: str, threat: str | None, before: np.ndarray, after: np.ndarray) -> Difference:
    n = min(len(before), len(after))
    before, after = np.asarray(before[:n], bool), np.asarray(after[:n], bool)
    value, low, high = paired_difference(before, after)
    accuracies = float(before.mean()), float(after.mean())
    return Difference(attack, threat, *accuracies, value, (low, high), mcnemar(before, after))


def _shown(d: Difference) -> str:
    return (d.threat or "").replace(":", " ")


def _line(d: Difference, before: str, after: str) -> dict[str, str]:
    interval = "" if d.interval is None else f"[{100 * d.interval[0]:+.2f}, {100 * d.interval[1]:+.2f}]"
    return {
        "attack": d.attack,
        "threat": _shown(d),
        before: percent(d.before),
        after: percent(d.after),
        "difference": f"{100 * d.difference:+.2f}",
        "interval": interval,
        "p": "" if d.p_value is None else f"{d.p_value:.2g}",
    }
