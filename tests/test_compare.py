"""Comparisons: exact p-values, intervals that cover, refusals."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from robustify.compare import _worst_of_draws, compare, knapsack_difference, mcnemar
from robustify.errors import UserError
from robustify.knapsack import worst_accuracy
from robustify.report import Report, Row

PGD, KNAPSACK = "pgd Linf:8/255", "knapsack W2-Linf:4/255"


def report(name: str, draw: int, n: int = 60, scale: float = 1.0, **other) -> Report:
    rng = np.random.default_rng(draw)
    distances = (scale * rng.gamma(2, 4 / 255, n) * (rng.random(n) < 0.9)).astype(np.float32)
    clean, held = distances > 0, distances > 8 / 255
    left = n * worst_accuracy(distances, 4 / 255, 2)
    rows = [
        Row("clean", None, n, int(clean.sum()), kind="clean"),
        Row("pgd", "Linf:8/255", n, int(held.sum())),
        Row("knapsack", "W2-Linf:4/255", n, left, kind="distributional"),
    ]
    given = {"data": "digits", "split": "test", "seed": 0, **other}
    return Report(name, rows=rows, verdicts={"clean": clean, PGD: held}, distances={KNAPSACK: distances}, **given)


def test_mcnemar_by_hand_and_against_scipy():
    from scipy.stats import binomtest

    before = np.array([True] * 8 + [False] * 12)
    after = np.array([True] * 7 + [False] + [True] * 6 + [False] * 6)
    assert mcnemar(before, after) == pytest.approx(binomtest(1, 7).pvalue)
    assert mcnemar(before, before) == 1
    rng = np.random.default_rng(0)
    a, b = rng.random(5000) < 0.5, rng.random(5000) < 0.45
    won, lost = int((b & ~a).sum()), int((a & ~b).sum())
    assert mcnemar(a, b) == pytest.approx(binomtest(won, won + lost).pvalue, rel=1e-9)


@pytest.mark.parametrize("p", [1.5, 2.0, 8.0, math.inf])
def test_the_bootstrap_solves_the_same_knapsack(p):
    rng = np.random.default_rng(1)
    d = np.concatenate([np.zeros(3), rng.random(20), [math.inf, 0.5, 0.5]])
    counts = rng.multinomial(len(d), np.full(len(d), 1 / len(d)), size=20)
    for delta in (0.0, 0.1, 0.5, 2.0):
        wanted = [worst_accuracy(np.repeat(d, count), delta, p) for count in counts]
        assert _worst_of_draws(d, counts, delta, p) == pytest.approx(wanted, abs=1e-12)


def test_the_bootstrap_interval_covers():
    """A model whose flips are 1.2 times as far: the true difference, from many images, lies within most intervals."""
    rng = np.random.default_rng(2)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        d = rng.gamma(2, 1, n)
        return d, 1.2 * d * rng.uniform(0.9, 1.1, n)

    many = draw(100_000)
    true = worst_accuracy(many[1], 1.0, 2) - worst_accuracy(many[0], 1.0, 2)
    hits = sum(
        low <= true <= high for _, low, high in (knapsack_difference(*draw(150), 1.0, 2, 300) for _ in range(60))
    )
    assert hits >= 51


def test_reports_are_compared_row_by_row():
    before, after = report("small", 1), report("large", 1, scale=1.5)
    (found,) = compare([before, after])
    assert (found.before, found.after, found.n) == ("small", "large", 60)
    by_name = {f"{d.attack} {d.threat or ''}".strip(): d for d in found.differences}
    pgd, knapsack = by_name[PGD], by_name[KNAPSACK]
    assert pgd.difference == pytest.approx(after.rows[1].accuracy - before.rows[1].accuracy)
    assert pgd.interval[0] <= pgd.difference <= pgd.interval[1]
    assert pgd.p_value < 0.05
    assert knapsack.interval[0] < knapsack.difference < knapsack.interval[1]
    assert knapsack.interval[0] > 0
    assert knapsack.p_value is None
    assert by_name["clean"].difference == 0
    assert json.loads(json.dumps(found.to_json()))["differences"][1]["threat"] == "Linf:8/255"
    assert found.table()[1]["difference"].startswith("+")
    assert list(found.table()[1]) == ["attack", "threat", "small", "large", "difference", "interval", "p"]
    assert list(compare([before, before])[0].table()[1])[2:4] == ["before: small", "after: small"]
    assert len(compare([before, after, report("other", 1, scale=0.5)])) == 2


def test_the_worst_case_of_images_that_share_a_budget_has_no_interval():
    def with_w_pgd(name: str, draw: int) -> Report:
        one = report(name, draw)
        more = Row("w-pgd", "W2-Linf:4/255", 60, 55, kind="distributional")
        return Report(name, one.data, one.split, [*one.rows, more], one.verdicts, distances=one.distances)

    before, after = with_w_pgd("a", 1), with_w_pgd("b", 2)
    (found,) = compare([before, after])
    worst = found.differences[-1]
    assert (worst.attack, worst.threat, worst.interval) == ("worst case", "W2-Linf:4/255", None)
    assert worst.before == before.headline("W2-Linf:4/255").accuracy == before.rows[2].accuracy
    assert worst.in_points() == f"{100 * (worst.after - worst.before):+.2f}"
    changes = {line["attack"]: line["change in points"] for line in found.changes()}
    assert changes["w-pgd"] == f"{100 * found.differences[3].difference:+.2f}"  # without an interval, but not left out
    assert changes["clean"].endswith("]")
    assert found.differences[0].in_points().endswith("]")


@pytest.mark.parametrize(
    "other", [{"data": "cifar10"}, {"split": "val"}, {"seed": 1}, {"n": 50}, {"facts": {"data": "another digest"}}]
)
def test_other_images_are_refused(other):
    with pytest.raises(UserError, match="different images"):
        compare([report("a", 1, facts={"data": "a digest"}), report("b", 1, **other)])


def test_the_same_pixels_under_another_name_are_the_same_images():
    one, other = report("a", 1, facts={"data": "a digest"}), report("b", 2, facts={"data": "a digest"}, data="tensors")
    (found,) = compare([one, other])
    assert found.differences[0].attack == "clean"


def test_nothing_to_compare_is_refused():
    with pytest.raises(UserError, match="nothing to be compared"):
        compare([report("a", 1)])
    one = report("a", 1)
    only_clean = Report("b", "digits", "test", one.rows[:1], {"clean": one.verdicts["clean"]})
    only_pgd = Report("c", "digits", "test", one.rows[1:2], {PGD: one.verdicts[PGD]})
    with pytest.raises(UserError, match="share no attack"):
        compare([only_clean, only_pgd])


def test_reports_of_several_norms_are_compared_in_their_union():
    def report(linf, l1):
        verdicts = {"clean": np.ones(4, bool), "pgd Linf:0.1": np.array(linf, bool), "pgd L1:2": np.array(l1, bool)}
        rows = [Row("clean", None, 4, 4, kind="clean")]
        rows += [Row("pgd", key.split()[1], 4, int(verdicts[key].sum())) for key in list(verdicts)[1:]]
        return Report("m", "d", "test", rows, verdicts)

    (found,) = compare([report([1, 0, 0, 0], [0, 1, 0, 0]), report([1, 1, 0, 0], [1, 1, 1, 0])])
    last = found.differences[-1]
    assert (last.attack, last.threat, last.before, last.after) == ("worst case", "Linf:0.1 and L1:2", 0.0, 0.5)


def test_the_worst_case_is_over_attacks_that_both_were_measured_with():
    strong = report("a", 0)
    half = np.arange(strong.rows[0].n) % 2 == 0
    fgsm = Row("fgsm", "Linf:8/255", len(half), int(half.sum()))
    verdicts = {**strong.verdicts, "fgsm Linf:8/255": half}
    clean, pgd, _ = strong.rows
    strong = dataclasses.replace(strong, rows=(clean, pgd, fgsm), verdicts=verdicts, distances={})
    kept = {key: value for key, value in verdicts.items() if key != PGD}
    weak = dataclasses.replace(strong, model_id="b", rows=(clean, fgsm), verdicts=kept)
    (found,) = compare([strong, weak])
    assert [d.attack for d in found.differences] == ["clean", "fgsm"]
    assert [d.difference for d in found.differences] == [0.0, 0.0]


def test_what_an_attacks_stages_left_is_no_setting():
    """AutoAttack's rows of two models say how many images each stage left: other numbers, the same attack."""
    pair = [report("small", 1), report("large", 1, scale=1.5)]
    for number, one in enumerate(pair):
        settings = {"steps": 100, "stages": ["apgd-ce", "square"], "left": [9 + number, 8]}
        rows = tuple(dataclasses.replace(row, settings=settings) if row.key == PGD else row for row in one.rows)
        pair[number] = dataclasses.replace(one, rows=rows)
    (found,) = compare(pair)
    assert [d.attack for d in found.differences] == ["clean", "pgd", "knapsack"]
    assert not found.left_out


def test_attacks_of_other_settings_are_not_paired():
    """PGD with 50 steps against PGD with 20 would say of the models what is the attacks'."""
    before, after = report("small", 1), report("large", 1, scale=1.5)
    stronger = tuple(dataclasses.replace(row, settings={"steps": 50}) if row.key == PGD else row for row in after.rows)
    (found,) = compare([before, dataclasses.replace(after, rows=stronger)])
    assert not [d for d in found.differences if d.attack == "pgd"]
    assert found.left_out == (f"{PGD}: none against steps=50",)
    only = [dataclasses.replace(r, rows=tuple(row for row in rows if row.attack in ("clean", "pgd")), distances={})
            for r, rows in ((before, before.rows), (after, stronger))]  # fmt: skip
    with pytest.raises(UserError, match="other settings: pgd Linf:8/255: none against steps=50"):
        compare(only)
