"""What a card cites: the base model, the method, the attacks, the data. The entries are in model_cards/papers.bib."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from robustify.front_matter import typed_name
from robustify.methods import METHODS
from robustify.report import Report
from robustify.sources import published

ATTACK_PAPERS = {
    "fgsm": "goodfellow2015explaining",
    "pgd": "madry2017towards",
    **dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square", "autoattack"), "croce2020reliable"),
    **dict.fromkeys(("w-fgsm", "w-pgd"), "bai2023wasserstein"),
}
METHOD_PAPERS = {
    "wasserstein": ("bai2025wasserstein", "bai2023wasserstein", "zhang2019theoretically"),
    "trades": ("zhang2019theoretically",),
    "pgd-at": ("madry2017towards",),
    "fast-at": ("wong2020fast",),
}
DATA_PAPERS = {
    "digits": "alpaydin1998optical",
    **dict.fromkeys(("cifar10", "cifar100"), "krizhevsky2009learning"),
    "imagenet": "russakovsky2015imagenet",
    "mnist": "lecun1998gradient",
}


def citations(config: Mapping[str, Any], method: str, after: Report) -> str:
    """Return the card's BibTeX block. config: config.json; after: the report, whose attacks and data are cited."""
    base = str(config["robustness"]["base_model"])
    keys = ["wightman2019pytorch"] if base.startswith("timm/") else []
    keys += METHOD_PAPERS.get(method, ())
    keys += [ATTACK_PAPERS[name] for name in (row.attack.partition(":")[0] for row in after.rows) if name in ATTACK_PAPERS]
    keys += [DATA_PAPERS[name] for name in (config["robustness"].get("dataset"), typed_name(after)) if name in DATA_PAPERS]
    entries: list[str] = []
    if row := published_row(base):
        entries.append(_base_entry(row))
        keys.insert(0, "croce2020robustbench")
    known = entries_by_key()
    entries += [known[key] for key in dict.fromkeys(keys)]
    more = METHODS[method].paper if method in METHODS and method not in METHOD_PAPERS else ""
    text = "```bibtex\n" + "\n\n".join(entries) + "\n```" if entries else ""
    return f"The method: {more}.\n\n{text}" if re.search(r"\d{4}", more) else text


def entries_by_key() -> dict[str, str]:
    """Return the entries of papers.bib."""
    text = resources.files("robustify.model_cards").joinpath("papers.bib").read_text(encoding="utf8")
    return {re.split(r"[{,]", entry, maxsplit=2)[1]: entry for entry in text.strip().split("\n\n")}


def published_row(base_id: str) -> dict[str, Any] | None:
    """Return RobustBench's row of the base model, None when it is no model of RobustBench."""
    if not base_id.startswith("robustbench:"):
        return None
    place = tuple(base_id.removeprefix("robustbench:").split("/"))
    return next((row for row in published.rows() if published.key(row) == place), None)


def _base_entry(row: Mapping[str, Any]) -> str:
    key = re.sub(r"\W", "", row["id"]).lower()
    fields = {"title": f"{row['id']}, a model of RobustBench", "howpublished": row.get("venue"), "url": row.get("link")}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{lines}\n}}"
