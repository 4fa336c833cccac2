"""The head of a model card, which the Hugging Face hub reads. What is not known is left out: nothing is guessed."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from robustify.methods import METHODS
from robustify.report import Headline, Report, Row, plain

# what the weights are: a base model's trained further, trained from random ones, or as they were before: a base model's, random
Origin = Literal["finetuned", "trained", "unchanged", "random"]
HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
    "mnist": "ylecun/mnist",
}
# identifiers that the hub accepts; other licenses go by `other` and their name
HUB_LICENSES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail"),
    "unknown",
}
WRITTEN = {  # every key that `front_matter` may write
    *("license", "license_name", "base_model", "base_model_relation", "library_name", "pipeline_tag", "datasets"),
    *("metrics", "tags", "model-index"),
}
TAGS = {"image-classification", "adversarial-robustness", "robustify", *METHODS}  # that it may write
HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")  # OWNER/NAME; the names of other sources have a colon, no slash, or several


def front_matter(
    name: str, config: Mapping[str, Any], method: str, origin: Origin, after: Report, listed: Report
) -> str:
    """Return the YAML between the card's two lines of dashes.

    config: config.json. after: of the hardening. listed: what model-index lists, of the weights as they are published.
    Without a relation the hub takes a base model for one that was fine-tuned, so only such a one is named.
    """
    data = typed_name(after)
    facts: dict[str, Any] = {}
    if config["pretrained_cfg"].get("license"):
        known = config["pretrained_cfg"]["license"].lower()
        facts = {"license": known} if known in HUB_LICENSES else {"license": "other", "license_name": known}
    if origin == "finetuned" and HUB_ID.match(config["robustness"]["base_model"]):
        facts |= {"base_model": config["robustness"]["base_model"], "base_model_relation": "finetune"}
    changed = origin in ("finetuned", "trained")
    hardened = changed and METHODS[method].adversarial
    card = ModelCardData(
        library_name="pytorch" if config["architecture"] == "custom" else "timm",
        pipeline_tag="image-classification",
        datasets=[HUB_DATASETS[data]] if data in HUB_DATASETS else None,
        metrics=["accuracy"],
        tags=[
            "image-classification",
            *(["adversarial-robustness"] if hardened else []),
            "robustify",
            *([method] if changed else []),
        ],
        model_name=name,
        eval_results=_results(listed),
        **facts,
    )
    return card.to_yaml().strip()


def eval_results(after: Report) -> list[dict[str, Any]]:
    """Return the same results as .eval_results/*.yaml lists them; none for data that the hub does not have.

    The schema is the hub's (github.com/huggingface/hub-docs, eval_results.yaml). The hub shows a result once the data
    set's own page defines a task of that name.
    """
    data = typed_name(after)
    if data not in HUB_DATASETS:
        return []
    entries = []
    for row in after.rows:
        low, high = row.interval
        task = "-".join(re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in (row.attack, row.threat) if text)
        notes = f"{attack_name(row)} accuracy{_radius(row.threat)}, n={row.n}, 95 % interval [{low:.4f}, {high:.4f}]"
        value = round(row.accuracy, 4)
        dataset = {"id": HUB_DATASETS[data], "task_id": task}
        entries.append({"dataset": dataset, "value": value, "date": after.created[:10], "notes": notes})
    return entries


def dataset_name(report: Report) -> str:
    """The data set's name without its digest, and without the folders of the one who ran it."""
    kind, _, path = report.data.split(" (")[0].partition(":")
    return Path(path).name if path else kind


def typed_name(report: Report) -> str:
    """The data's name with its kind: folder:mnist is somebody's folder, only mnist is MNIST."""
    return report.data.split(" (")[0]


def attack_name(row: Row) -> str:
    """`PGD`, or `PGD (steps=50)` for a row that names its settings to tell it from another."""
    name, _, settings = row.attack.partition(":")
    shown = {"clean": "Clean", "autoattack": "AutoAttack"}.get(name, name.upper())
    return f"{shown} ({settings})" if settings else shown


def _results(after: Report) -> list[EvalResult]:
    """One result per row, then one per worst case: shares to four digits, like the card's per cents."""
    data = dataset_name(after)

    def result(label: str, row: Row | Headline, arguments: dict[str, Any]) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=HUB_DATASETS.get(typed_name(after), data),
            dataset_name=data,
            dataset_split=after.split,
            metric_type="accuracy",
            metric_value=round(row.accuracy, 4),
            metric_name=f"{label} accuracy{_radius(row.threat)}",
            metric_args=plain({**arguments, "n": row.n}),
        )

    rows = [result(attack_name(r), r, {"attack": r.attack, "threat": r.threat, **r.settings}) for r in after.rows]
    worst = [result("Worst-case", h, {"attacks": h.attacks, "threat": h.threat}) for h in after.worst_cases()]
    return rows + worst


def _radius(threat: str | None) -> str:
    """` (Linf, eps=8/255)`, as leaderboards write it; of several norms all."""
    if threat is None:
        return ""
    parts = [spec.rpartition(":") for spec in threat.split(" and ")]
    named = [f"{norm}, {'delta' if norm.startswith('W') else 'eps'}={radius}" for norm, _, radius in parts]
    return f" ({' and '.join(named)})"
