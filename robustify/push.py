"""Publish a model on the Hugging Face hub: the only thing that robustify ever sends anywhere, and only when told to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import yaml

from robustify import model_folder
from robustify.card import without_home
from robustify.card_update import has_own_text, made_of, update
from robustify.errors import UserError, reason
from robustify.front_matter import HUB_ID
from robustify.sources import hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Parcel = Mapping[str, Path | bytes]  # what each file on the hub is made of


def pack(source: str | Path, repo: str) -> Parcel:
    """Return the files of a run's or a model's folder that belong on the hub, with a card that names the place there.

    Raises UserError when `repo` is no OWNER/NAME, and when there is no such model or no card.
    """
    if not HUB_ID.match(repo):
        raise UserError(f"{repo!r} is no place on the hub", "write OWNER/NAME, with your name on the hub as OWNER")
    folder = model_folder.find(source)
    if folder is None or not (folder / model_folder.WEIGHTS).is_file():
        raise UserError(f"{source} is not the folder of a model", "give a run's folder, or one that robustify export wrote")
    belongings = model_folder.belongings(folder)
    if not {model_folder.CARD, model_folder.RECIPE, model_folder.REPORT} <= belongings.keys():
        hint = "robustify finetune measures and writes one; without it nobody knows what the model holds against"
        raise UserError(f"{source} has no card with its recipe and report", hint)
    text, _ = model_folder.card_of(folder, hub=repo)
    weights = [model_folder.CONFIG, model_folder.WEIGHTS, *model_folder.FORMATS.values()]
    found = {name: folder / name for name in weights if (folder / name).is_file()}
    recipe = without_home(belongings[model_folder.RECIPE].read_text(encoding="utf8"))
    return {**found, **belongings, model_folder.RECIPE: recipe.encode(), model_folder.CARD: text.encode()}


def check_license(parcel: Parcel, source: str | Path) -> None:
    """Raise UserError when the card of `source` states no license: that is asked for, never guessed."""
    head = yaml.safe_load(_bytes(parcel[model_folder.CARD]).decode().split("---\n")[1])
    if not head.get("license"):
        hint = f"ask its authors, then: robustify card {source} --license mit; the hub also knows the license `unknown`"
        raise UserError("the card states no license, because the base model's is not known", hint)


def push(parcel: Parcel, repo: str, *, private: bool = False) -> tuple[str, bool]:
    """Upload the files to the model repository OWNER/NAME, made if need be, in one commit. Returns its web address, and
    whether it is private, as the hub says.

    An older model's files there go with it. What a person put there, a LICENSE and text in the card, stays where that card
    is of the same base model, and the card here has no such text of its own.
    What an interrupted upload left on the hub, and what has not changed, is not sent again. The token is the one that
    huggingface_hub knows; it is never shown. Raises UserError for a card without a license, for whatever the hub or the
    network refuses, and when `private` is asked for and the repository is public.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    config = parcel[model_folder.CONFIG]
    check_license(parcel, config.parent if isinstance(config, Path) else repo)
    if hub.offline():
        raise UserError(f"{repo} was not published: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE where there is a network")
    api = HfApi(library_name="robustify")
    try:
        hub.reach(constants.ENDPOINT)
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
        if private and not info.private:
            raise UserError(f"{repo} is already there, and public", "choose another name, or make it private on the hub")
        there = {file.rfilename for file in info.siblings or ()}
        ours = model_folder.OURS
        if model_folder.CARD in there:
            card = _card(api, repo)
            base = json.loads(_bytes(parcel[model_folder.CONFIG]))["robustness"]["base_model"]
            if made_of(card, base):
                new = _bytes(parcel[model_folder.CARD]).decode()
                kept = new if has_own_text(new) else update(card, new, base, f"the card of {repo}")
                parcel = {**parcel, model_folder.CARD: kept.encode()}
            else:
                ours = (*ours, model_folder.LICENSE)
        files = [CommitOperationAdd(name, str(part) if isinstance(part, Path) else part) for name, part in parcel.items()]
        gone = [CommitOperationDelete(name) for name in ours if name in there and name not in parcel]
        api.create_commit(repo, [*files, *gone], commit_message="Upload a model hardened with robustify")
    except UserError:
        raise
    except Exception as error:  # refused, unreachable, interrupted: its own words say which
        raise _explained(error, repo) from None  # its notes may hold the headers that were sent
    return str(url), bool(info.private)


def _card(api: HfApi, repo: str) -> str:
    """The card on the hub."""
    with TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo, model_folder.CARD, local_dir=folder)).read_text(encoding="utf8")


def _bytes(part: Path | bytes) -> bytes:
    return part.read_bytes() if isinstance(part, Path) else part


def _explained(error: Exception, repo: str) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = _without_token(reason(error))
    hints = {
        401: "log in: hf auth login, or set HF_TOKEN; the token needs the right to write",
        403: "the token has no right to write there: is OWNER your name, and the token one that may write?",
    }
    again = "the same command goes on where it stopped: what has arrived is not sent again"
    return UserError(f"{repo} was not published: {said}", hints.get(status or 0, again))


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    for secret in filter(None, (get_token(), os.environ.get("HF_TOKEN"))):
        text = text.replace(secret, "(token)")
    return re.sub(r"\bhf_\w{8,}", "(token)", text)
