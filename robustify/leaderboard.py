"""RobustBench's leaderboard: the JSON of a new entry and the text of its issue, from a report of the full AutoAttack.

The rules (arXiv 2010.09670, section 3, and RobustBench's README): the standard AutoAttack on the whole test set of 10,000
images of CIFAR, or on RobustBench's own 5,000 of ImageNet; a deterministic forward pass without an optimisation loop,
whose gradients are not zero. What a report shows to be excluded is refused; that there is no such loop its author says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

from robustify import model_folder
from robustify.errors import UserError
from robustify.report import Report, Row
from robustify.threat import ThreatModel

IMAGES = 10_000
THREATS = {"cifar10": ("Linf:8/255", "L2:0.5"), "cifar100": ("Linf:8/255",)}
ASKED = ("link", "name", "authors", "venue", "architecture", "additional_data", "checkpoint")  # what no report knows
TEXTS = tuple(key for key in (*ASKED, "footnote") if key != "additional_data")
RANDOM = 1e-6  # of the largest logit, between two passes on the same images
ISSUE = """\
# [New Model] $id

## Paper Information

- **Paper Title**: $name
- **Paper URL**: $link
- **Paper authors**: $authors

## Leaderboard Claim(s)

- **Architecture**: $architecture
- **Dataset**: $dataset
- **Threat Model**: $norm
- **eps**: $eps
- **Clean accuracy**: $clean_acc %
- **Robust accuracy**: $autoattack_acc %
- **Additional data**: $additional
- **Evaluation method**: AutoAttack, standard version, $n test images, seed $seed (report `$digest` of robustify $version)
- **Checkpoint and code**: $checkpoint

The forward pass is deterministic, without an optimisation loop, and its gradients are not zero.

## Model Zoo

- [ ] I want to add my models to the Model Zoo
- [ ] I use an architecture that is not included among those of RobustBench
- [ ] I agree to release my model(s) under MIT license, OR
- [ ] I want my models to be released under a custom license, located here:
"""


def submission(model_id: str, report: Report, paper: Mapping[str, Any], model: str) -> dict[str, str]:
    """Return the two files of a submission by name. Raises UserError as `entry` does, and for an ID that is no name or
    that of one of the model's own files."""
    example = "letters, digits, _, - and ., such as Doe2026Robust_R18"
    if not re.fullmatch(r"\w[\w.-]*", model_id):
        raise UserError(f"{model_id!r} is no ID of a model", example)
    name, text = f"{model_id}.json", f"{model_id}-issue.md"
    if name.lower() in model_folder.OURS:  # some disks do not tell Config from config
        raise UserError(f"the ID {model_id} would overwrite {name.lower()}, a file of the model itself", example)
    return {name: to_text(entry(report, paper, model)), text: issue(model_id, report, paper, model)}


def entry(report: Report, paper: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the leaderboard's JSON of a new model. Raises UserError for what its rules exclude, all reasons at once.

    report: of the model as it is published, whose evaluation.model_digest is `model`. paper: link, name, authors, venue,
    architecture, additional_data, checkpoint.
    """
    row, reasons = _row(report)
    data = report.data.split(" (")[0]
    if data not in THREATS:
        known = f"{', '.join(THREATS)}; of ImageNet it takes 5,000 images of its own choice, which its benchmark() reads"
        reasons.append(f"the data is {data}; the leaderboard's are {known}")
    if report.split != "test":
        reasons.append(f"the images are of the split {report.split}, not test")
    if row is not None:
        reasons += _row_reasons(report, row, data)
    reasons += _model_reasons(report, model)
    missing = [key for key in ASKED if paper.get(key) in (None, "")]
    if missing:
        reasons.append(f"the paper's file does not say {', '.join(missing)}")
    elif not isinstance(paper["additional_data"], bool):
        reasons.append(f"additional_data is {paper['additional_data']!r}, neither true nor false")
    for key in TEXTS:
        if (value := paper.get(key)) not in (None, "") and not (isinstance(value, str) and len(value.splitlines()) == 1):
            reasons.append(f"the paper's file says {key}: {value!r}, which is no line of text")
    if reasons or row is None or report.clean is None:
        hint = "robustify evaluate RUN --data cifar10 --attack autoattack --threat Linf:8/255 --n all -o report.json"
        raise UserError("RobustBench would not take this:\n" + "\n".join(f"  - {reason}" for reason in reasons), hint)
    robust = f"{100 * row.accuracy:.2f}"
    return {
        "link": paper["link"],
        "name": paper["name"],
        "authors": paper["authors"],
        "additional_data": paper["additional_data"],
        "number_forward_passes": 1,
        "dataset": data,
        "venue": paper["venue"],
        "architecture": paper["architecture"],
        "eps": ThreatModel.parse(str(row.threat)).spec.rsplit(":", 1)[1],
        "clean_acc": f"{100 * report.clean.accuracy:.2f}",
        "reported": str(paper.get("reported", robust)),
        "autoattack_acc": robust,
        "footnote": paper.get("footnote"),
        "unreliable": False,
    }


def issue(model_id: str, report: Report, paper: Mapping[str, Any], model: str) -> str:
    """Return the text of the issue that asks for the entry."""
    found = entry(report, paper, model)
    row = _row(report)[0]
    assert row is not None
    facts = {"id": model_id, "norm": str(row.threat).split(":")[0], "n": f"{row.n:,}", "seed": report.seed}
    facts |= {"digest": report.digest(), "version": report.version, "checkpoint": paper["checkpoint"]}
    return Template(ISSUE).substitute({**found, **facts, "additional": str(found["additional_data"]).lower()})


def read_paper(path: Path) -> dict[str, Any]:
    """Read what no report knows from a YAML file; a list of authors becomes their line. Raises UserError when there is no
    such mapping."""
    example = "; ".join(f"{key}: ..." for key in ASKED)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", f"a YAML file with {example}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}", f"a YAML file with {example}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a mapping", f"a YAML file with {example}")
    authors = value.get("authors")
    if isinstance(authors, list) and all(isinstance(author, str) for author in authors):
        value["authors"] = ", ".join(authors)
    return value


def to_text(found: Mapping[str, Any]) -> str:
    """Return the JSON as it stands in RobustBench's model_info/; what is not said is left out."""
    return json.dumps({k: v for k, v in found.items() if v is not None}, indent=2, ensure_ascii=False) + "\n"


def _row(report: Report) -> tuple[Row | None, list[str]]:
    """The one row of AutoAttack, or why there is none."""
    rows = [row for row in report.rows if row.attack.partition(":")[0] == "autoattack"]
    if len(rows) == 1:
        return rows[0], []
    return None, [f"the report has {len(rows)} rows of autoattack, not one: measure one threat"]


def _row_reasons(report: Report, row: Row, data: str) -> list[str]:
    reasons = []
    if row.settings.get("version") != "standard":
        reasons.append(f"AutoAttack was not the standard version: {row.settings.get('version')}")
    if row.n != IMAGES:
        reasons.append(f"{row.n:,} images were measured, not all {IMAGES:,}")
    if data in THREATS and row.threat not in THREATS[data]:
        reasons.append(f"the threat is {row.threat}; the leaderboard's for {data}: {', '.join(THREATS[data])}")
    if report.clean is None:
        reasons.append("the clean images were not measured")
    if any(found.key not in report.verdicts for found in (row, report.clean) if found):
        reasons.append("the verdicts of each image, the .npz beside the report, are missing or another report's")
    return reasons


def _model_reasons(report: Report, model: str) -> list[str]:
    """Whether the report is of this model, and what its checks found that the rules exclude."""
    reasons = []
    if report.facts.get("model") != model:
        reasons.append(f"the report is of another model, {report.facts.get('model', 'which it does not name')}, not {model}")
    if report.facts.get("fast_search"):
        reasons.append("the attacks searched in bfloat16: measure without --fast-search")
    checks = report.checks
    if not checks:
        return [*reasons, "the model was not checked for randomness and zero gradients: measure without --no-checks"]
    for name, most, what, unit in (
        ("logits_change_on_repeat", RANDOM, "the same images give logits that differ by", "of the largest"),
        ("logits_change_in_another_batch", 1e-4, "with other images beside it an image's logits differ by", "of the largest"),
        ("zero_gradients", 0.1, "the gradient is zero on a share of", "of the images checked"),
    ):
        if name not in checks:
            reasons.append(f"the report's checks do not say {name}")
        elif not checks[name] <= most:
            reasons.append(f"{what} {checks[name]:g} {unit}")
    return reasons
