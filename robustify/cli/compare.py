"""robustify compare: what one model gains over another, on the same images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from robustify import console
from robustify.cli import options
from robustify.errors import UserError
from robustify.report import Report, load_pair


def run(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...", help="report.json files or runs' folders; one run alone: before and after."
        ),
    ],
    figure: Annotated[
        Path | None, Option(metavar="FILE", help="Draw all models' accuracy against the radius into a .png or .svg.")
    ] = None,
    bars: Annotated[Path | None, Option(metavar="FILE", help="Draw every row of two reports side by side.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare reports of the same images: paired differences with 95 % intervals.

    All are compared with the first; p is that of McNemar's exact test. Among several reports a run's folder stands for
    its hardened model.

    \b
    robustify compare runs/digits-wasserstein
    robustify compare digits.json runs/digits-wasserstein --figure gain.png
    """
    with console.status("loading torch"):
        from robustify import curves, plots
        from robustify.compare import compare
    reports = read(paths)
    comparisons = compare(reports)
    if bars and len(reports) != 2:
        raise UserError(f"bars show two reports, not {len(reports)}", "take --figure, or compare two at a time")
    if figure and console.is_main():
        plots.against_radius(figure, curves.panels(reports))
        console.note(f"figure: {figure}")
    if bars and console.is_main():
        plots.before_after(bars, reports[0], reports[1], (reports[0].model_id, reports[1].model_id))
        console.note(f"bars: {bars}")
    if as_json:
        console.result_json([comparison.to_json() for comparison in comparisons])
        return
    console.note(f"n = {comparisons[0].n}; differences in points, with 95 % intervals")
    for left_out in dict.fromkeys(text for found in comparisons for text in found.left_out):
        console.note(f"not compared, the settings differ: {left_out}")
    for number, found in enumerate(comparisons):
        if number:
            console.result("")
        console.table(found.table(("before", "after") if len(paths) == 1 else None))
    console.unpaired(*comparisons)


def read(paths: Sequence[Path]) -> list[Report]:
    """Return the reports, told apart by their models' names or else by the paths. Raises UserError.

    Of a run's two reports the one after hardening counts; of a run alone both do.
    """
    files = [path / "report.json" if path.is_dir() else path for path in paths]
    if len(files) == 1 and _is_pair(files[0]):
        return list(load_pair(files[0]))
    reports = [load_pair(file)[1] if _is_pair(file) else Report.load(file) for file in files]
    if len({report.model_id for report in reports}) == len(reports):
        return reports
    named = zip(reports, paths, strict=True)
    return [dataclasses.replace(report, model_id=str(path)) for report, path in named]


def _is_pair(file: Path) -> bool:
    """Whether it holds both reports of a run. What cannot be read holds none: `Report.load` says why."""
    try:
        value = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and {"before", "after"} <= value.keys()
