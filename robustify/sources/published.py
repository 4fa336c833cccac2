"""RobustBench's leaderboard: the published numbers, and which entry a name means. Needs no robustbench.

A row is a dictionary: id, dataset, threat, architecture and accuracies as text in per cent. `weights` is False where
the authors published none.
"""
from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from robustify.errors import UserError

Row = dict[str, Any]

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
# the short name of the case study (TRADES); by its letters it would also mean Zhang2019You
ALIASES = {"Zhang2019": "Zhang2019Theoretically"}
# RobustBench evaluates this one on larger pictures than the other ImageNet models
SIDES = {("imagenet", "Wong2020Fast"): 288}


@cache
def rows() -> list[Row]:
    """Return the rows of all entries."""
    from importlib.resources import files

    return json.loads(files("robustify.sources").joinpath("published.json").read_text())


def key(row: Row) -> tuple[str, str, str]:
    """Return what names an entry: (dataset, threat, id)."""
    return row["dataset"], row["threat"], row["id"]


def arch_name(row: Row) -> str:
    """Return the architecture's name with timm, such as robustbench_cifar10_linf_zhang2019theoretically."""
    return re.sub(r"\W", "_", "_".join(("robustbench", *key(row))).lower())


def input_size(row: Row) -> tuple[int, int, int]:
    """Return (channels, height, width) of the entry's pictures."""
    side = SIDES.get((row["dataset"], row["id"]), 224 if row["dataset"] == "imagenet" else 32)
    return 3, side, side


def find(name: str, dataset: str | None, threat: str | None, rows: list[Row]) -> Row | None:
    """Return the row of exactly this name, or None when there is none; `cifar10/Linf/NAME` says all three.

    Of several, the one for `dataset` and `threat`; where these are not given, cifar10 and Linf are preferred. Raises
    UserError when that leaves none or a choice, and for a model whose weights were never published.
    """
    *place, name = name.split("/")
    if len(place) == 2:
        dataset, threat = place
    same = [row for row in rows if row["id"] == ALIASES.get(name, name)]
    if not same:
        return None
    same = [row for row in same if row.get("weights", True)] or same
    fit = [row for row in same if dataset in (None, row["dataset"]) and threat in (None, row["threat"])]
    preferred = [r for r in fit if (r["dataset"], r["threat"]) == (dataset or "cifar10", threat or "Linf")]
    chosen = preferred or fit
    if len(chosen) != 1:
        places = ", ".join(f"{r['dataset']} {r['threat']}" for r in same)
        asked = " ".join(word for word in (dataset, threat) if word)
        problem = "is published several times" if fit else f"is not published for {asked}"
        first = (fit or same)[0]
        hint = f"it exists for {places}; write robustbench:{first['dataset']}/{first['threat']}/{first['id']}"
        raise UserError(f"{same[0]['id']} {problem}", hint)
    row = chosen[0]
    if not row.get("weights", True):
        hint = f"see {row['link']}; `robustify ls models` lists those with weights"
        raise UserError(f"{row['id']} is on RobustBench's leaderboard, but its weights were never published", hint)
    return row


def find_prefix(name: str, dataset: str | None, threat: str | None, rows: list[Row]) -> Row | None:
    """Return the row of the only model whose name starts so, None when there is none. Raises UserError for several."""
    fit = [r for r in rows if r.get("weights", True) and r["id"].lower().startswith(name.lower())]
    fit = [r for r in fit if dataset in (None, r["dataset"]) and threat in (None, r["threat"])]
    names = sorted({row["id"] for row in fit})
    if len(names) > 1:
        raise UserError(f"{name} can mean {len(names)} RobustBench models", f"write one of: {', '.join(names)}")
    return find(names[0], dataset, threat, fit) if names else None
