"""Pictures: written, repeatable to the byte, refused with a hint."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from robustify.curves import panels
from robustify.errors import UserError
from robustify.knapsack import worst_curve
from robustify.plots import Line, against_radius, before_after, flip_histogram, gallery, robust_accuracy
from robustify.report import Report, Row

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)
DISTANCES = {"net a": np.append(RNG.gamma(2, 3 / 255, 80), [0, 0, np.inf]), "net b": RNG.gamma(2, 5 / 255, 60)}


def reports() -> tuple[Report, Report]:
    rows = [
        [Row("clean", None, 50, clean, kind="clean"), Row("pgd", "Linf:8/255", 50, held)]
        for clean, held in ((45, 3), (40, 25))
    ]
    return tuple(Report(name, "digits", "test", part) for name, part in zip("ab", rows, strict=True))  # pyright: ignore


def draw(name: str, path) -> None:
    deltas = np.linspace(0, 8 / 255, 9)
    match name:
        case "accuracy":
            robust_accuracy(path, DISTANCES, "Linf", 16 / 255)
        case "worst":
            lines = [Line(model, "knapsack", deltas, worst_curve(d, deltas, 2)) for model, d in DISTANCES.items()]
            lines += [
                Line("net a", "w-pgd", deltas, np.linspace(0.9, 0.3, 9)),
                Line("net a", "certificate", deltas, np.linspace(0.5, 0, 9)),
                Line("net a", "first-order upper", deltas, np.linspace(0.9, 0.5, 9)),
                Line("net a", "first-order lower", deltas, np.linspace(0.9, 0.0, 9)),
            ]
            points = [Line("net b", "worst case", [0, 0.5], [0.9, 0.2], [(0.8, 0.95), (0.1, 0.35)])]
            against_radius(path, {("Linf", 2.0): lines, ("L2", None): points})
        case "histogram":
            flip_histogram(path, DISTANCES, "L2")
        case "gallery":
            x = RNG.random((3, 3, 8, 8)) if path is None else np.linspace(0, 1, 576).reshape(3, 3, 8, 8)
            gallery(path, {"image": x, "gradient": x - 0.5, "grey": x[:, :1]}, ["cat", "dog", "ship"], ["gradient"])
        case "bars":
            before_after(path, *reports())


@pytest.mark.parametrize("name", ["accuracy", "worst", "histogram", "gallery", "bars"])
def test_the_same_figures_give_the_same_bytes(name, tmp_path):
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        one, two = tmp_path / f"one.{kind}", tmp_path / f"two.{kind}"
        draw(name, one)
        draw(name, two)
        assert one.read_bytes().startswith(start)
        assert one.read_bytes() == two.read_bytes()


def test_axes_carry_their_units(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw("accuracy", tmp_path / "a.svg")
        draw("histogram", tmp_path / "h.svg")
    assert "in 255ths" in (tmp_path / "a.svg").read_text()
    text = (tmp_path / "h.svg").read_text()
    assert "L2" in text
    assert "2 misclassified" in text
    assert "1 without a flip" in text


def test_other_formats_and_a_missing_library_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"\.png or a \.svg"):
        draw("bars", tmp_path / "a.pdf")
    known = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"robustify\[plots\]"):
        draw("bars", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_reports_become_curves():
    rows = [
        Row("clean", None, 83, 80, kind="clean"),
        Row("pgd", "Linf:8/255", 83, 10),
        Row("pgd", "Linf:2/255", 83, 60),
        Row("w-pgd", "W2-Linf:2/255", 83, 50, kind="distributional"),
        Row("knapsack", "W2-Linf:2/255", 83, 33.25, kind="distributional"),
        Row("w-pgd", "W2-L2:0.5", 83, 50, kind="distributional"),
    ]
    a = Report("a", "d", "t", rows, distances={"knapsack W2-Linf:2/255": DISTANCES["net a"]})
    b = Report("b", "d", "t", rows[:2])
    found = panels([a, b])
    assert list(found) == [("Linf", None), ("Linf", 2.0), ("L2", 2.0)]
    points, flips, other = found["Linf", None]
    assert (points.model, points.kind, flips.kind, other.model) == (
        "a (n = 83)", "worst case", "nearest flips", "b (n = 83)",
    )  # fmt: skip
    assert list(points.deltas) == [0, 2 / 255, 8 / 255]
    assert list(points.accuracies) == [row.accuracy for row in (rows[0], rows[2], rows[1])]
    assert points.intervals[0] == rows[0].interval
    assert flips.accuracies[0] == np.mean(DISTANCES["net a"] > 0)
    assert max(flips.deltas) == pytest.approx(10 / 255)
    w_pgd, knapsack = found["Linf", 2.0]
    assert (w_pgd.kind, list(w_pgd.deltas)) == ("w-pgd", [2 / 255])
    assert knapsack.accuracies == pytest.approx(worst_curve(DISTANCES["net a"], knapsack.deltas, 2))
    assert [line.kind for line in found["L2", 2.0]] == ["w-pgd"]
    with pytest.raises(UserError, match="no attack to draw"):
        panels([Report("b", "d", "t", rows[:1])])


def test_reports_without_a_common_row_are_refused(tmp_path):
    before, after = reports()
    with pytest.raises(UserError, match="share no attack"):
        before_after(tmp_path / "a.png", Report("a", "d", "t", before.rows[:1]), Report("b", "d", "t", after.rows[1:]))
