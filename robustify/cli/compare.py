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
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="FIGURE", help="Draw two reports into a .png or .svg.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare reports of the same images: paired differences with 95 % intervals.

    All are compared with the first; p is that of McNemar's exact test. Among several reports a run's folder stands for
    its hardened model.

    \b
    robustify compare runs/digits-wasserstein
    robustify compare digits.json runs/digits-wasserstein -o gain.png
    """
    with console.status("loading torch"):
        from robustify.compare import compare
        from robustify.plots import before_after
    reports = read(paths)
    comparisons = compare(reports)
    if output and len(reports) != 2:
        raise UserError(f"a figure shows two reports, not {len(reports)}", "leave out -o, or compare two at a time")
    if output and console.is_main():
        before_after(output, reports[0], reports[1], (reports[0].model_id, reports[1].model_id))
        console.note(f"figure: {output}")
    if as_json:
        console.result_json([comparison.to_json() for comparison in comparisons])
        return
    first = comparisons[0]
    console.note(f"before: {first.before}; n = {first.n}; differences in points, with 95 % intervals")
    console.table([{"model": found.after, **line} for found in comparisons for line in found.table()])


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
