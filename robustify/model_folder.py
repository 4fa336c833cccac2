"""A model's folder: which files belong to the model, and its card, made anew from what the other files say.

A run keeps the model in model/, the recipe and the reports above it; an exported folder has all of it in one place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from robustify import files
from robustify.card import render
from robustify.card_update import has_own_text, made_of, update
from robustify.errors import UserError
from robustify.front_matter import eval_results
from robustify.report import Report, load_pair
from robustify.sources import hub
from robustify.sources.checkpoint import agreed_license
from robustify.sources.options import split

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMATS = {"onnx": "model.onnx", "pt2": "model.pt2"}
RECIPE, REPORT, HALF, RESULTS = "recipe.yaml", "report.json", "half.json", ".eval_results/robustify.yaml"
FIGURES = {  # captions, in the card's order
    "accuracy.png": "Accuracy before and after, with 95 % intervals",
    "training.png": "Accuracy on the held-out images during the training",
    "gradients.png": "Images, and the loss's gradient in their pixels before and after",
}
SHA256 = "weights_sha256"  # in config.json: of the weights' file, as the hub shows it too
LICENSE = "LICENSE"  # the base model's terms, put there by a person
VERDICTS = [str(Path(name).with_suffix(".npz")) for name in (REPORT, HALF)]
BELONGINGS = (RECIPE, REPORT, *VERDICTS, CARD, LICENSE, *FIGURES, HALF, RESULTS)  # go along wherever the model goes
# what says something of one model, and must not outlive it where another takes its place
OURS = (CONFIG, WEIGHTS, *FORMATS.values(), *FIGURES, RECIPE, REPORT, HALF, *VERDICTS, RESULTS)


def find(source: str | Path) -> Path | None:
    """Return the folder with the config.json that a run's or a model's folder means, None when there is none."""
    folder = Path(str(source).removeprefix("local-dir:")).expanduser()
    return next((place for place in (folder, folder / "model") if (place / CONFIG).is_file()), None)


def made(source: str | Path) -> Path | None:
    """Return the folder, here or on the hub, of a model that robustify made; None where the source is anything else.

    Of a folder of the hub the files that belong to the model are fetched, as far as it has them and there is a network,
    of the very commit whose config.json is here. Raises UserError when it has no config.json.
    """
    name, _ = split(str(source))
    prefix, _, repo = name.partition(":")
    folder = hub.file(repo, CONFIG).parent if prefix == "hf-hub" else find(name)
    try:
        config = read_config(folder) if folder else None
    except UserError:
        return None
    if folder and config and prefix == "hf-hub":
        with suppress(UserError):  # no network: what is here already will do
            commit = hub.same_commit(repo, folder / CONFIG)
            for belonging in BELONGINGS:
                hub.optional_file(commit, belonging)
    return folder


def belongings(folder: Path) -> dict[str, Path]:
    """Return the files that go with a model wherever it goes, but for its weights: name -> where it is now."""
    places = (_beside(folder), folder)
    found = {name: place / name for place in places for name in BELONGINGS if (place / name).is_file()}
    return {name: found[name] for name in BELONGINGS if name in found}


def write_card(folder: str | Path, *, place: Path | None = None, license: str | None = None) -> Path:
    """Write the card of an exported model from the files in its folder, and return its path; a person's text stays.

    place: where the folder will be, if it is still being built. license: of the base model, where its files do not say
    it; written into config.json too. Raises UserError when they say another, and without a recipe and a report.
    """
    folder = Path(folder).resolve()
    config = read_config(folder)
    if license:
        cfg, base = config["pretrained_cfg"], config["robustness"]["base_model"]
        cfg["license"] = agreed_license(cfg.get("license"), license, base)
        files.write_json(folder / CONFIG, config)
    text, published = card_of(folder, place=place)
    if entries := eval_results(published):
        (folder / RESULTS).parent.mkdir(exist_ok=True)
        files.write_text(folder / RESULTS, yaml.safe_dump(entries, sort_keys=False))
    files.write_text(folder / CARD, text)
    return folder / CARD


def card_of(folder: Path, *, place: Path | None = None, hub: str | None = None) -> tuple[str, Report]:
    """Return the card that the files in a model's folder make, with what a person wrote into it, and the report of
    its very weights.

    place: as for `write_card`. hub: OWNER/NAME, for the card that goes there. Raises UserError without a recipe and a
    report, and as `check_same`.
    """
    folder = folder.resolve()
    place = place or folder
    beside = _beside(folder, place)
    named = place if beside == folder else beside
    before, after = load_pair(beside / REPORT)
    half = load_pair(folder / HALF) if (folder / HALF).is_file() else None
    command, recipe = _recipe(beside / RECIPE)
    config = read_config(folder)
    known = {"report": after.digest(), "half": half and half[1].digest()}
    if folder != place:  # it is being built, and config.json has just been given the digest of its weights
        known[SHA256] = config["robustness"].get(SHA256)
    check_same(folder, config, beside, known)
    text = render(
        name=named.name,
        path=str(place.relative_to(named.parent)),
        hub=hub,
        config=config,
        recipe=recipe,
        command=command,
        before=before,
        after=after,
        half=half,
        figures={file: caption for file, caption in FIGURES.items() if (folder / file).is_file()},
    )
    base = config["robustness"]["base_model"]
    if older := _older_card(folder, place, base):
        here = folder == place or older.parent == place  # else it lies where the folder is being built, and came from elsewhere
        text = update(older.read_text(encoding="utf8"), text, base, str(older) if here else f"the model's {CARD}")
    return text, half[1] if half else after


def check_same(
    folder: Path, config: Mapping[str, Any], beside: Path | None = None, known: Mapping[str, str | None] = MappingProxyType({})
) -> None:
    """Raise UserError when the weights or the reports of a model's folder are not those that its config.json names.

    A figure on the card is of these very weights only as long as nobody has put another file in the place of one of them.
    What an older config.json does not name is not asked. beside: where the report is, where the folder is still being built.
    known: the digests that the caller has taken already, by their names in config.json.
    """
    said, report = config.get("robustness") or {}, (beside or _beside(folder)) / REPORT
    found: dict[str, Path] = {}
    if "report" in said and report.is_file():
        found["report"] = report
    if SHA256 in said and (folder / WEIGHTS).is_file():
        found |= {SHA256: folder / WEIGHTS, "half": folder / HALF}
    for key, path in found.items():
        digest = known[key] if key in known else files.sha256(path) if key == SHA256 else digest_of(path)
        if digest != (named := said.get(key)):
            is_now = f"its digest is {digest[:12]}" if digest else "there is no such file"
            raise UserError(
                f"{path} is not the one that {folder / CONFIG} was written with: {is_now}, not {str(named)[:12]}",
                "the figures would be another model's: put the files of one model together again, as robustify wrote them",
            )


def digest_of(path: Path | None) -> str | None:
    """Return the digest of what a report.json or half.json says of its second model, None when there is none."""
    return load_pair(path)[1].digest() if path and path.is_file() else None


def made_there(folder: Path, base: str) -> bool:
    """Return whether the model in a folder was made of this base model too, as far as its config.json or its card say it.

    Only then what a person put beside it, such as a license, is true of a model that takes its place.
    """
    try:
        return read_config(folder)["robustness"]["base_model"] == base
    except UserError:  # a run that begins anew takes the older config.json away, and leaves the card
        return not (folder / CARD).is_file() or made_of((folder / CARD).read_text(encoding="utf8"), base)


def _older_card(folder: Path, place: Path, base: str) -> Path | None:
    """The card whose own text goes on: the one that came with the model, else the one whose place it takes."""
    came = folder / CARD if (folder / CARD).is_file() else None
    if came and has_own_text(came.read_text(encoding="utf8")):
        return came
    return place / CARD if (place / CARD).is_file() and made_there(place, base) else came


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises UserError when robustify did not write it."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        if "base_model" in config["robustness"] and "pretrained_cfg" in config:
            return config
    except (OSError, ValueError, KeyError, TypeError):
        pass
    hint = "robustify finetune makes one: a run's folder, or one that robustify export wrote"
    raise UserError(f"{folder} is not the folder of a model that robustify made", hint)


def robustness_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says under `robustness` that is true of the model exported anew: nothing of its files."""
    return {key: value for key, value in (config.get("robustness") or {}).items() if key not in ("formats", SHA256, "half")}


def _beside(folder: Path, place: Path | None = None) -> Path:
    """Where the recipe and the report of a model's folder are: in it, or above a run's model/."""
    place = place or folder
    return place.parent if place.name == "model" and not (folder / RECIPE).is_file() else folder


def _recipe(path: Path) -> tuple[str, Mapping[str, Any]]:
    """Return (the command that began the run, the recipe)."""
    try:
        text = path.read_text(encoding="utf8")
    except OSError:
        raise UserError(f"there is no recipe {path}", "a card is made of a run's recipe and report") from None
    first, _, _ = text.partition("\n")
    return first.removeprefix("# ") if first.startswith("# ") else "", yaml.safe_load(text)
