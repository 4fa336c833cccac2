"""robustify ls: what there is to choose from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from robustify import console, shelf
from robustify.cli import options
from robustify.errors import UserError

DATA = {
    "digits": "1797 grey images of 8 x 8 pixels, 10 classes; comes with scikit-learn",
    "cifar10": "60000 colour images of 32 x 32 pixels, 10 classes; fetched once",
    "cifar100": "60000 colour images of 32 x 32 pixels, 100 classes; fetched once",
    "folder:PATH": "one folder a class, perhaps inside train, val and test",
    "npz:PATH": "arrays x_train, y_train, perhaps x_val, y_val, x_test, y_test",
}
Lines = list[dict[str, Any]]


class What(StrEnum):
    models = "models"
    methods = "methods"
    adversaries = "adversaries"
    attacks = "attacks"
    recipes = "recipes"
    data = "data"


def run(
    what: Annotated[What, typer.Argument(metavar="WHAT", help="models, methods, adversaries, attacks, recipes or data.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Part of the name; timm:PART, torchvision:PART.")] = "",
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Models of this data set only.")] = None,
    threat: Annotated[
        str | None, typer.Option(metavar="NORM", help="Models against this threat only: Linf, L2, corruptions.")
    ] = None,
    models_dir: options.ModelsDir = None,
    as_json: options.AsJson = False,
) -> None:
    """List models, methods, adversaries, attacks, recipes or data to choose from.

    \b
    robustify ls models Wang --dataset cifar10 --threat Linf
    robustify ls attacks
    """
    if what is What.models:
        lines = _models(query, dataset, threat, models_dir)
    else:
        lists = {
            What.methods: _methods,
            What.adversaries: _adversaries,
            What.attacks: _attacks,
            What.recipes: _recipes,
            What.data: _data,
        }
        found = lists[what]()
        lines = [line for line in found if query.lower() in line["name"].lower()]
    if as_json:
        console.result_json(lines)
        return
    if not lines:
        raise UserError(f"no {what.value} with {query!r} in the name", f"robustify ls {what.value} lists all")
    shown = [key for key in lines[0] if any(line[key] is not None for line in lines)]  # columns that say something
    console.table([{key.replace("_", " "): _cell(line[key]) for key in shown} for line in lines])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ",".join(f"{key}={_setting(setting)}" for key, setting in value.items())
    return "" if value is None else str(value)


def _setting(value: Any) -> str:
    """Of an adversary, which has a list of its own, the name."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value["name"] if isinstance(value, dict) else value)


def _models(query: str, dataset: str | None, threat: str | None, models_dir: Path | None) -> Lines:
    with console.status("reading the lists"):
        from robustify import sources

        return [
            {
                "name": info.id,
                "data": info.dataset,
                "threat": info.threat,
                "architecture": info.architecture,
                "parameters": info.parameters,
                "published_clean": info.clean_acc,
                "published_robust": info.robust_acc,
                "extra_data": info.additional_data,
                "file_here": info.file is not None,
                "refused": info.refused,
            }
            for info in sources.names(query, dataset, threat, models_dir)
        ]


def _methods() -> Lines:
    with console.status("loading torch"):
        from robustify.methods import METHODS
    return [
        {
            "name": name,
            "threat": "none" if not method.adversarial else "distributional" if method.distributional else "pointwise",
            "norms": " ".join(method.norms),
            "about": method.summary,
            "paper": method.paper,
            "settings": method().model_dump(mode="json", exclude={"name"}),
        }
        for name, method in METHODS.items()
    ]


def _adversaries() -> Lines:
    with console.status("reading the adversaries"):
        from robustify.adversaries import ADVERSARIES

        return [
            {"name": name, "summary": kind.summary, "settings": kind().model_dump(exclude={"name"})}
            for name, kind in ADVERSARIES.items()
        ]


def _attacks() -> Lines:
    with console.status("loading torch"):
        from robustify.attacks import ATTACKS
        from robustify.attacks import options as settings_of
    return [
        {
            "name": name,
            "threat": "distributional" if info.distributional else "pointwise",
            "norms": " ".join(info.norms),
            "about": info.summary,
            "paper": info.paper,
            "settings": settings_of(name),
        }
        for name, info in ATTACKS.items()
    ]


def _recipes() -> Lines:
    return [_recipe(name, shelf.text(name)) for name in shelf.names()]


def _recipe(name: str, text: str) -> dict[str, Any]:
    values = yaml.safe_load(text)
    about = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
    chosen = {
        key: value.get(inner) if isinstance(value := values.get(key), dict) else value
        for key, inner in (("model", "source"), ("data", "name"), ("method", "name"))
    }
    return {"name": name, **chosen, "threat": values.get("threat"), "about": about}


def _data() -> Lines:
    return [{"name": name, "about": about} for name, about in DATA.items()]
