"""From a recipe's file, flags and settings to a Recipe, and where each of its values came from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from robustify import shelf
from robustify.errors import UserError
from robustify.methods import METHODS
from robustify.recipe import Origins, Recipe, build, expanded
from robustify.sources import names_code
from robustify.threat import ThreatModel


@dataclass(frozen=True)
class Resolved:
    """A recipe and where each of its values came from: `recipe`, `command line`, `default`, `the method`, or the run of its
    model. note: what to say when the method asks for another threat than the recipe has."""

    recipe: Recipe
    origins: Origins
    note: str | None = None


def resolve(
    name: str | None = None,
    flags: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    run: Recipe | None = None,
) -> Resolved:
    """Read a recipe and lay the command line over it.

    name: file or name of a recipe, or None. flags: dotted keys and values, `None` meaning not given. settings: `key=value`
    texts. Later ones win; what runs code (`model.allow_pickle`, a function as `model.source`) is taken from these two
    alone. run: the recipe that the model came from; without a recipe here its data, threat and method are kept where
    nothing else is said. Raises one UserError that lists every mistake.
    """
    values: dict[str, Any] = {}
    origins: Origins = {}
    if name:
        try:
            hint = f"a model is named by --model {shlex.quote(name)}; "
            values = yaml.safe_load(shelf.text(name, hint=hint)) or {}
        except yaml.YAMLError as error:
            raise UserError(f"recipe {name} is not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise UserError(
                f"recipe {name} must be a mapping of settings", "robustify show quickstart prints a valid one"
            )
        values = expanded(values)
        origins = dict.fromkeys(_leaves(values), f"recipe {name}")
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} is not of the form key=value", "for instance --set method.beta=3")
        given[key.strip()] = _read(value)
    _runs_no_code(name, values, given)
    if run is not None and not name:
        kept = run.to_dict()
        values = {"threat": kept["threat"], "method": kept["method"]}
        if given.get("data.name") in (None, run.data.name):
            values["data"] = kept["data"]
        origins = dict.fromkeys(_leaves(values), "the model's run")
    followed = _follow_method(values, given)
    for key, value in given.items():
        _put(values, key, value)
        origins[key] = "command line"
    if followed:
        origins["threat"] = "the method"
    if "model" not in values:
        raise UserError("no model", "name one: robustify finetune --model Zhang2019, or a recipe: robustify ls recipes")
    if "data" not in values and _source(values["model"]) in ("digits", "digits-cnn"):
        values["data"] = {"name": "digits"}  # CIFAR-10, the default, would be a hundred megabytes for nothing
        origins["data.name"] = "the model's own"
    recipe = build(values)
    every = _leaves(recipe.to_dict())
    return Resolved(recipe, {key: origins.get(key, "default") for key in every}, followed)


def _runs_no_code(name: str | None, values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise UserError when a recipe's file, not the command line, would have code executed: it may come from anyone."""
    model = values.get("model")
    if not isinstance(model, Mapping):
        return
    if model.get("allow_pickle") and "model.allow_pickle" not in given:
        message = f"recipe {name} sets model.allow_pickle, which would run the code that a weight file may hold"
        raise UserError(message, "if you trust the file, say so yourself: --allow-pickle; a recipe cannot")
    source = model.get("source")
    if isinstance(source, str) and "model.source" not in given and names_code(source):
        message = f"recipe {name} names code to run: {source}"
        raise UserError(message, f"if you trust it, name it yourself: --model {shlex.quote(source)}")


def _source(model: Any) -> Any:
    return model.get("source") if isinstance(model, Mapping) else model


def _follow_method(values: dict[str, Any], given: dict[str, Any]) -> str | None:
    """--method over a recipe of another method: its own defaults, and the recipe's radius as the threat it can train for.

    Returns what to say when the threat is another.
    """
    new = given.get("method.name")
    there = values.get("method")
    if new is None or (isinstance(there, Mapping) and new == there.get("name")):
        return None
    values["method"] = {}
    method = METHODS.get(new)
    if method and "threat" not in given and values.get("threat"):
        threat = _as_threat(values["threat"])
        if threat and threat.distributional != method.distributional:
            pointwise = threat.pointwise().spec
            given["threat"] = f"W2-{pointwise}" if method.distributional else pointwise
            kind = "distributional" if method.distributional else "pointwise"
            return f"the threat is {given['threat']} instead of {threat.spec}: {new} trains against a {kind} one"
    return None


def _as_threat(text: Any) -> ThreatModel | None:
    try:
        return ThreatModel.parse(text)
    except UserError:
        return None  # the recipe's validation reports it with all other mistakes


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for part in outer:
        inner = values.get(part)
        if inner is not None and not isinstance(inner, Mapping):
            raise UserError(f"{part} = {inner!r} in the recipe is no mapping, so {key} cannot be set in it")
        values[part] = inner = dict(inner or {})
        values = inner
    values[last] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


def _read(text: str) -> Any:
    """The value of a --set: YAML, but text that is no YAML, such as *fc*, is itself, and 1e-3 is a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
