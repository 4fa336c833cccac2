"""Files of the Hugging Face hub and of the web, in the caches that everybody shares.

They are fetched with huggingface_hub and handed to timm: timm 1.0.9 beside huggingface_hub 1 or newer believes that there
is no hub.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from robustify import files
from robustify.errors import UserError, reason
from robustify.sources import shards

RANDOM = "or start from random weights: pretrained=False (robustify finetune: --set model.pretrained=false)"


def weight_file(repo: str, filename: str | None = None) -> Path:
    """Return the weight file of a hub folder OWNER/NAME[@REVISION], safetensors where there is one; of weights in several
    files their index, with all of them beside it. Raises UserError."""
    if filename:
        return _as_sent(repo, file(repo, filename))
    for name in shards.NAMES:
        found = optional_file(repo, name)
        if found and name.endswith(shards.INDEX):
            for part in shards.listed(found):
                _as_sent(repo, file(same_commit(repo, found), part))
        if found:
            return _as_sent(repo, found)
    return file(repo, shards.WEIGHTS[0])  # which it has not


def _as_sent(repo: str, path: Path) -> Path:
    """Return `path` if its bytes are those that the hub sent. Raises UserError.

    The cache names a large file after its SHA-256; of a small one git's own sum is known, which is not looked at.
    """
    told = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", told) is None:
        return path
    now = path.stat()
    found = _sha256(path.resolve(), now.st_size, now.st_mtime_ns)
    if found == told:
        return path
    owner_name, _, revision = repo.partition("@")
    at = f" --revision {revision}" if revision else ""
    message = f"{path.name} of {repo} is damaged: its SHA-256 is {found[:12]}..., the hub's {told[:12]}..."
    raise UserError(message, f"fetch it anew: hf download {owner_name} {path.name}{at} --force-download")


@functools.cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file, taken once as long as its size and the time of its last change, in ns, stay the same."""
    return files.sha256(path)


def same_commit(repo: str, path: Path) -> str:
    """Return OWNER/NAME@COMMIT of a file that is here: by its branch, the next one could be of a newer commit."""
    return f"{repo.partition('@')[0]}@{path.parent.name}"


def file(repo: str, name: str) -> Path:
    """Return the place of a hub folder's file on this machine, fetched if need be. Raises UserError."""
    found = optional_file(repo, name)
    if found is None:
        owner_name = repo.partition("@")[0]
        hint = f"see its files: https://huggingface.co/{owner_name}/tree/main; what came later: hf download {owner_name}"
        raise UserError(f"{repo} has no {name}", hint)
    return found


def optional_file(repo: str, name: str) -> Path | None:
    """Return the place of a file as `file` does, None when the folder has no such file; the cache remembers that too."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    owner_name, _, revision = repo.partition("@")
    options: dict[str, Any] = {"repo_id": owner_name, "filename": name, "revision": revision or None}
    try:
        here = try_to_load_from_cache(**options)  # what is here stays what it was, and needs no network
        if here is not None:
            return Path(here) if isinstance(here, str) else None  # else: it was asked for, and is not there
        if not offline():
            reach(constants.ENDPOINT)
        return Path(hf_hub_download(**options))
    except Exception as error:  # offline, unreachable, not there, not allowed
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):  # a kind of the other
            return None
        elsewhere = "free some space, or keep the hub's files on another disk: HF_HOME=FOLDER"
        if full := files.no_room(error, Path(constants.HF_HUB_CACHE), hint=elsewhere):
            raise full from error
        message, hint = _explain(repo, owner_name, name, error)
        raise UserError(message, hint) from error


@functools.cache
def reach(endpoint: str) -> None:
    """Raise ConnectionError at once without a network to the hub; huggingface_hub would try again for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of requests or of httpx, as the version of huggingface_hub has it
        raise ConnectionError(f"the Hugging Face hub cannot be reached: {error}") from error


def _explain(repo: str, owner_name: str, name: str, error: Exception) -> tuple[str, str]:
    """Why a file could not be had, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{repo} is no name of a folder on the Hugging Face hub", "it has the form OWNER/NAME or OWNER/NAME@REVISION"
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{owner_name}"
        return f"{repo} asks its readers to accept its terms", f"accept them on {page}, then: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{owner_name} has no revision {repo.partition('@')[2]}", f"see https://huggingface.co/{owner_name}/commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check OWNER/NAME; a private one needs: hf auth login"
        return f"there is no folder {owner_name} on the Hugging Face hub, or it is private", hint
    why = reason(error)
    hint = f"fetch it where there is a network (hf download {owner_name}) and pass its folder as the model"
    hint += f"; {RANDOM}" if name.startswith(shards.WEIGHTS) else ""  # without a description it cannot
    if isinstance(error, ConnectionError):
        hint = f"{hint}; HF_HUB_OFFLINE=1 asks for nothing that is not here"
        return f"{name} of {repo} is not on this machine, and {why}", hint
    if offline():
        why = "HF_HUB_OFFLINE is set"
    return f"{name} of {repo} is not on this machine and could not be fetched: {why}", hint


def url_file(name: str, url: str) -> Path:
    """Return the file at `url` in torch's cache, fetched if need be. Raises UserError. name: the model's, for messages."""
    from timm.models._hub import download_cached_file, get_cache_dir

    there = Path(get_cache_dir()) / url.rsplit("/", 1)[-1]
    if offline() and not there.is_file():
        raise UserError(
            f"the weights of {name} are not on this machine, and HF_HUB_OFFLINE is set",
            f"download them from {url} and put them at {there}; {RANDOM}",
        )
    try:
        return Path(download_cached_file(url, progress=False))
    except Exception as error:
        elsewhere = "free some space, or keep torch's files on another disk: TORCH_HOME=FOLDER"
        if full := files.no_room(error, there, hint=elsewhere):
            raise full from error
        hint = f"download them elsewhere and put them at {there}; {RANDOM}"
        raise UserError(f"the weights of {name} could not be fetched from {url}: {reason(error)}", hint) from error


def offline() -> bool:
    """Return whether the user forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
