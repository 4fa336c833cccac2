"""The pointwise attacks and AutoAttack on the real networks: a report each, and one table.

    OMP_NUM_THREADS=1 ROBUSTIFY_ASSETS=FOLDER python benchmarks/pointwise.py -o pointwise

Writes OUT/NETWORK.json (reports, with their verdicts beside them) and OUT/table.md. Everything is on the first n images
of the exact test sets, every verdict in float32. A killed run goes on where it was; a finished report stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distributional import assets

from robustify import files, pieces
from robustify.data import from_tensors
from robustify.evaluation import evaluate
from robustify.intervals import percent, percent_interval
from robustify.report import Report
from robustify.threat import ThreatModel

ATTACKS = ["pgd:steps=20", "apgd-ce", "apgd-t", "square", "autoattack"]
ROBUST = ["Linf:2/255", "Linf:4/255", "Linf:8/255"]
RUNS: dict[str, tuple[int, list[str]]] = {  # n, threats
    "resnet2b_adv2": (446, ROBUST),
    "cnn_a_adv2": (446, ROBUST),
    "resnet2b2_adv8": (446, ROBUST),
    "resnet2b2_adv4": (446, ROBUST),
    "mnist_trades": (128, ["Linf:0.3"]),
    "resnet32_standard": (32, ["Linf:0.5/255", "Linf:2/255"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(RUNS))
    parser.add_argument("-o", "--out", type=Path, default=Path("pointwise"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    load = assets()
    for name in given.networks:
        path = given.out / f"{name}.json"
        if not path.exists():
            measured(load, name, given.out / f"{name}.partial").save(path)
            pieces.finish(given.out / f"{name}.partial")
        print(f"{name}: done", file=sys.stderr, flush=True)
        found = [given.out / f"{name}.json" for name in RUNS]
        text = table([Report.load(path) for path in found if path.exists()])
        files.write_text(given.out / "table.md", text + "\n")
    print(text)


def measured(load, name: str, partial: Path) -> Report:
    n, threats = RUNS[name]
    data = load.MODELS[name][4]
    pair = tuple(part[:n] for part in load.images(data))
    return evaluate(
        load.model(name),
        from_tensors(pair, pair, pair).test,
        ATTACKS,
        [ThreatModel.parse(threat) for threat in threats],
        check=True,
        model_id=name,
        data_name=data,
        resume_folder=partial,
        tell=lambda stage, done, total: print(f"{name} {stage} {done}/{total}", file=sys.stderr, flush=True),
    )


def table(reports: list[Report]) -> str:
    """One line per network and threat; intervals of the worst case."""
    heads = ["network", "n", "threat", "clean", "PGD-20", "APGD-CE", "APGD-T", "Square", "AutoAttack", "worst case"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for report in reports:
        rows = {row.key: row for row in report.rows}
        for threat in report.threats:
            keys = [f"{spec.partition(':')[0]} {threat}" for spec in ATTACKS]
            figures = [f"{100 * rows[key].accuracy:.1f}" for key in keys]
            worst = report.headline(threat)
            shown = f"{percent(worst.accuracy)} {percent_interval(worst.interval)}"
            cells = [
                report.model_id,
                str(rows["clean"].n),
                threat.replace(":", " "),
                f"{100 * rows['clean'].accuracy:.1f}",
                *figures,
                shown,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
