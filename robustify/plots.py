"""Pictures of measurements, as PNG or SVG by the file's name. The same figures give the same bytes.

Every function takes arrays by the model's name and writes one file. Radii are in pixel units and shown in 255ths for
Linf; models have colours, kinds of curve have line styles. Raises UserError when matplotlib is missing.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from robustify import files
from robustify.errors import UserError
from robustify.intervals import wilson
from robustify.report import Report, Row
from robustify.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal[
    "worst case", "nearest flips", "knapsack", "w-pgd", "w-fgsm", "certificate", "first-order upper", "first-order lower"
]
Panel = tuple[Norm, float | None]  # the norm and the Wasserstein order, None for the pointwise threat
# colours that colour-blind readers tell apart (Okabe and Ito 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: dict[Kind, tuple[Any, str, str]] = {  # line, marker, words
    # attacks at one radius say nothing about another: no line joins them
    "worst case": ("", "o", "worst case of the attacks, 95 % interval"),
    "nearest flips": ("-", "", "nearest flips found (attack)"),
    "w-fgsm": ("", "v", "W-FGSM (attack)"),
    "w-pgd": ("", "s", "W-PGD (attack)"),
    "knapsack": ("-", "", "knapsack (attack)"),
    "certificate": ((0, (6, 2, 1, 2)), "", "certified, of the smoothed classifier"),
    "first-order upper": (":", ".", "first-order upper estimate"),
    "first-order lower": ((0, (4, 1, 1, 1, 1, 1)), ".", "first-order lower estimate"),
}
_LOOK = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.hashsalt": "robustify",  # names of clip paths are random otherwise
}
_DPI = 150


@dataclass(frozen=True)
class Line:
    """One curve: accuracies in [0,1] at the radii deltas, of one model, by one kind of computation.

    intervals: (low, high) of each accuracy, where there are any.
    """

    model: str
    kind: Kind
    deltas: Sequence[float] | np.ndarray
    accuracies: Sequence[float] | np.ndarray
    intervals: Sequence[tuple[float, float]] = ()


def robust_accuracy(path: str | Path, distances: Mapping[str, np.ndarray], norm: Norm, largest: float) -> None:
    """Draw the share of images that hold at every radius up to `largest`, with its Wilson 95 % band.

    distances: flip distances [N] by model. They come from an attack, so the curves are upper bounds.
    """
    with _figure(path, (6.4, 4.2)) as figure:
        axes = figure.subplots()
        radii = np.linspace(0, largest, 400)
        for colour, (name, d) in zip(_colours(distances), distances.items(), strict=True):
            held = (np.asarray(d)[None] > radii[:, None]).sum(1)
            low, high = np.array([wilson(float(k), len(d)) for k in held]).T
            axes.fill_between(_units(radii, norm), 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
            axes.step(
                _units(radii, norm), 100 * held / len(d), color=colour, where="post", label=f"{name} (n = {len(d)})"
            )
        _accuracy_axes(axes, norm, largest, "radius ε of every image")
        axes.set_title("Robust accuracy against the nearest flips found", loc="left", fontsize=11)
        axes.legend()


def against_radius(path: str | Path, panels: Mapping[Panel, Sequence[Line]]) -> None:
    """Draw accuracy against the radius of the threat, one panel a norm and order: any models and kinds on one plot.

    Attacks bound the true curve from above, certificates (of the smoothed classifier) from below; first-order lines are
    estimates and may lie on either side.
    """
    everything = [line for lines in panels.values() for line in lines]
    models, kinds = dict.fromkeys(line.model for line in everything), {line.kind for line in everything}
    colours = dict(zip(models, _colours(models), strict=True))
    with _figure(path, (3.2 + 4.4 * len(panels), 4.6)) as figure:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, ((norm, p), lines) in zip(row, panels.items(), strict=True):
            for line in lines:
                _draw(axes, line, norm, colours[line.model])
            largest = max(float(np.max(line.deltas)) for line in lines)
            what = "radius ε of every image" if p is None else f"radius δ of the W{p:g} ball"
            _accuracy_axes(axes, norm, largest, what)
            adversary = "every image moves by ε" if p is None else "a distributional adversary"
            axes.set_title(f"Worst accuracy, {adversary}", loc="left", fontsize=11)
        handles = [row[0].plot([], [], color=colours[name], label=name)[0] for name in models]
        shown = [(kind, *STYLES[kind]) for kind in STYLES if kind in kinds]
        for _, style, marker, words in shown:
            look = {"linestyle": style, "marker": marker, "markersize": 4.5}
            handles += [row[0].plot([], [], color="#555555", label=words, **look)[0]]
        figure.legend(handles=handles, loc="outside right upper")


def _draw(axes: Axes, line: Line, norm: Norm, colour: str) -> None:
    style, marker, _ = STYLES[line.kind]
    wide = 2.0 if line.kind in ("knapsack", "nearest flips", "certificate") else 1.4
    x, y = _units(np.asarray(line.deltas), norm), 100 * np.asarray(line.accuracies)
    axes.plot(x, y, color=colour, linestyle=style, linewidth=wide, marker=marker, markersize=4.5)
    if line.intervals:
        low, high = 100 * np.asarray(line.intervals).T
        axes.errorbar(x, y, np.maximum(0, [y - low, high - y]), fmt="none", ecolor=colour, elinewidth=1, capsize=3)


def flip_histogram(path: str | Path, distances: Mapping[str, np.ndarray], norm: Norm, bins: int = 40) -> None:
    """Draw how far the correctly classified images are from their nearest flip, one panel a model, on one axis."""
    finite = [np.asarray(d)[np.isfinite(d)] for d in distances.values()]
    largest = max((float(np.quantile(d, 0.995)) for d in finite if len(d)), default=1.0) or 1.0
    edges = np.linspace(0, largest, bins + 1)
    with _figure(path, (6.4, 1.0 + 1.5 * len(distances))) as figure:
        panels = figure.subplots(len(distances), 1, sharex=True, squeeze=False)[:, 0]
        for axes, colour, (name, d) in zip(panels, _colours(distances), distances.items(), strict=True):
            d = np.asarray(d)
            moved = d[(d > 0) & np.isfinite(d)]
            axes.hist(_units(np.minimum(moved, largest), norm), _units(edges, norm), color=colour, alpha=0.85)
            if len(moved):
                middle = float(_units(np.median(moved), norm))
                axes.axvline(middle, color="#222222", linewidth=1)
                axes.annotate(
                    f"median {middle:.3g}", (middle, 1), (4, -2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="top", fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                )  # fmt: skip
            beyond, wrong, none = int((moved > largest).sum()), int((d == 0).sum()), int(np.isinf(d).sum())
            rest = [f"{wrong} misclassified"] + [f"{beyond} beyond, in the last bin"] * bool(beyond)
            rest += [f"{none} without a flip"] * bool(none)
            axes.set_title(f"{name}   {len(moved)} of {len(d)} images; {', '.join(rest)}", loc="left", fontsize=9)
            axes.set_ylabel("images")
            axes.grid(axis="x", visible=False)
        panels[-1].set_xlabel(f"distance to the nearest flip, {_unit_name(norm)}")
        panels[-1].set_xlim(0, float(_units(largest, norm)))


def gallery(
    path: str | Path, columns: Mapping[str, np.ndarray], labels: Sequence[str], gradients: Sequence[str] = ()
) -> None:
    """Draw one row per image and one column per picture of it, e.g. {"image", "gradient", "adversarial, ε = 32/255"}.

    columns: arrays [N, C, H, W]; those named in `gradients` are centred on grey and scaled to three standard deviations,
    the others lie in [0,1]. labels: one text per image.
    """
    count = len(labels)
    with _figure(path, (0.2 + 1.35 * len(columns), 0.5 + 1.35 * count)) as figure:
        cells = figure.subplots(count, len(columns), squeeze=False)
        for j, (name, pictures) in enumerate(columns.items()):
            for i in range(count):
                axes, picture = cells[i, j], np.asarray(pictures[i], np.float64)
                if name in gradients:
                    spread = float(picture.std()) or 1.0
                    picture = 0.5 + picture / (6 * spread)
                shown = np.clip(picture, 0, 1).transpose(1, 2, 0)
                if shown.shape[2] == 1:
                    axes.imshow(shown[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                else:
                    axes.imshow(shown, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                for side in axes.spines.values():
                    side.set_visible(False)
                if i == 0:
                    axes.set_title(name, fontsize=8)
                if j == 0:
                    axes.set_ylabel(labels[i], fontsize=8)


def trade_off(path: str | Path, lines: Mapping[str, np.ndarray], threat: ThreatModel, n: int) -> None:
    """Draw robust accuracy under the threat against clean accuracy along the lines between networks (robustify.blend).

    lines: by name, rows of (way from the start, clean accuracy, robust accuracy), [K, 3] in [0,1]. n: images, for the 95 %
    intervals that every point has either way.
    """
    with _figure(path, (6.0, 4.4)) as figure:
        axes = figure.subplots()
        for colour, (name, points) in zip(_colours(lines), lines.items(), strict=True):
            _, clean, robust = points.T
            drawn = {"color": colour, "marker": "o", "markersize": 4, "elinewidth": 0.6, "label": name}
            axes.errorbar(100 * clean, 100 * robust, xerr=_around(clean, n), yerr=_around(robust, n), **drawn)
            for alpha, clean, robust in points:
                near = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7}
                axes.annotate(f"{alpha:g}", (100 * clean, 100 * robust), **near)
        axes.set(xlabel="clean accuracy, %", ylabel=f"accuracy at {threat}, %")
        axes.set_title("The line between two networks' weights, held-out images", loc="left", fontsize=11)
        axes.legend()


def _around(shares: np.ndarray, n: int) -> np.ndarray:
    """How far the 95 % interval of each share of n images reaches below and above it, in points, [2, K]."""
    return 100 * np.abs([np.array(wilson(n * share, n)) - share for share in shares]).T


def before_after(path: str | Path, before: Report, after: Report, names: tuple[str, str] = ("before", "after")) -> None:
    """Draw the accuracies of two reports side by side with their Wilson 95 % intervals, for every row they share.

    Raises UserError when they share none.
    """
    theirs = {row.key: row for row in after.rows}
    pairs = [(row, theirs[row.key]) for row in before.rows if row.key in theirs]
    if not pairs:
        raise UserError("the reports share no attack", "evaluate both with the same --attack and --threat")
    with _figure(path, (max(4.0, 1.6 + 1.3 * len(pairs)), 4.2)) as figure:
        axes = figure.subplots()
        for k, name in enumerate(names):
            rows = [pair[k] for pair in pairs]
            at = np.arange(len(rows)) + (k - 0.5) * 0.38
            value = np.array([100 * row.accuracy for row in rows])
            low, high = 100 * np.array([row.interval for row in rows]).T
            error = np.maximum(0, [value - low, high - value])
            axes.bar(at, value, 0.36, yerr=error, color=COLOURS[k], label=name, capsize=3, ecolor="#333333")
            for x, v, top in zip(at, value, high, strict=True):
                axes.annotate(f"{v:.1f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(range(len(pairs)), [_row_name(row) for row, _ in pairs], fontsize=9)
        axes.set(ylim=(0, 108), ylabel="accuracy, %")
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", ncols=2)
        title = f"{after.data}, n = {pairs[0][0].n}; bars: Wilson 95 % intervals"
        axes.set_title(title, loc="left", fontsize=10)


def check(path: str | Path) -> None:
    """Raise UserError unless a picture can be drawn into `path`: before anything is spent on what it shall show."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"a picture is a .png or a .svg, not {path.name}", f"name it {path.with_suffix('.png').name}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib", "pip install 'robustify[plots]'") from None


def training(path: str | Path, epochs: Sequence[int], accuracies: Mapping[str, Sequence[float]]) -> None:
    """Draw held-out accuracies in [0,1] by epoch, one line each; epoch 0 is before the training."""
    with _figure(path, (6.4, 3.6)) as figure:
        axes = figure.subplots()
        for colour, (name, values) in zip(_colours(accuracies), accuracies.items(), strict=True):
            axes.plot(epochs, 100 * np.asarray(values), color=colour, marker="o", markersize=3, label=name)
        axes.set(ylim=(0, 100), xlabel="epoch", ylabel="accuracy, %")
        axes.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportCallIssue]
        axes.set_title("Held-out images", loc="left", fontsize=11)
        axes.legend()


@contextmanager
def _figure(path: str | Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is saved to `path` when the block ends well."""
    check(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kind = Path(path).suffix[1:].lower()
    with rc_context(_LOOK):  # pyright: ignore[reportArgumentType]
        figure = Figure(size, dpi=_DPI, layout="constrained")
        yield figure
        buffer = io.BytesIO()
        # dates and versions would change the file
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    files.write_bytes(path, buffer.getvalue())


def _colours(models: Mapping[str, Any]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(models))]


def _units(radii: Any, norm: Norm) -> Any:
    return radii * 255 if norm == "Linf" else radii


def _unit_name(norm: Norm) -> str:
    return "Linf, in 255ths" if norm == "Linf" else norm


def _accuracy_axes(axes: Axes, norm: Norm, largest: float, what: str) -> None:
    axes.set(xlim=(0, float(_units(largest, norm))), ylim=(0, 100), ylabel="accuracy, %")
    axes.set_xlabel(f"{what}, {_unit_name(norm)}")


def _row_name(row: Row) -> str:
    return row.attack.partition(":")[0] + (f"\n{row.threat.replace(':', ' ')}" if row.threat else "")
