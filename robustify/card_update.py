"""A card made anew: its generated section and front matter are replaced, everything that a person wrote stays."""

from __future__ import annotations

import re
from typing import Any

import yaml

from robustify.errors import UserError
from robustify.front_matter import HUB_DATASETS, TAGS, WRITTEN

BEGIN, END = "<!-- robustify:begin -->", "<!-- robustify:end -->"
YOURS = "<!-- Text outside the two robustify markers is yours: it stays when this card is made anew. -->"


def update(existing: str, new: str, base: str | None = None, name: str = "the card") -> str:
    """Return `existing` with its generated section and front matter as in `new`; everything that a person wrote stays.

    Of the front matter that is the keys that robustify never writes, and tags of their own: what an older model's
    card says of its license, base and data is not true of another. base: of the new card; where the older one is of it
    too, a license and data sets that robustify does not know stay. A text without markers gets the new section at its
    end. name: of the existing card, for people. Raises UserError when one of the two markers is missing or they are out of
    order.
    """
    old_head, old_body = _split(existing, name)
    new_head, new_body = _split(new)
    kept = {key: value for key, value in old_head.items() if key not in WRITTEN}
    if base is not None and BEGIN in existing and made_of(existing, base):
        if "license" not in new_head:
            kept |= {key: old_head[key] for key in ("license", "license_name") if key in old_head}
        if not set(old_head.get("datasets") or ()) <= set(HUB_DATASETS.values()):  # not what an older run wrote
            kept["datasets"] = old_head["datasets"]
    head = {**kept, **new_head}
    if isinstance(old_head.get("tags"), list):
        head["tags"] = list(dict.fromkeys([*new_head["tags"], *(tag for tag in old_head["tags"] if tag not in TAGS)]))
    section = new_body[new_body.index(BEGIN) : new_body.index(END) + len(END)]
    marks = old_body.count(BEGIN), old_body.count(END)
    if marks == (0, 0):
        body = f"{old_body.rstrip()}\n\n{section}\n"
    elif marks == (1, 1) and old_body.index(BEGIN) < old_body.index(END):
        body = old_body[: old_body.index(BEGIN)] + section + old_body[old_body.index(END) + len(END) :]
    else:
        counts = " and ".join(f"{mark} {count} times" for mark, count in zip((BEGIN, END), marks, strict=True))
        message = f"{name} must have robustify's two markers once each, in order; it has {counts}"
        raise UserError(message, f"put {BEGIN} and {END} around the generated text again, or take out both")
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{body}"


def has_own_text(text: str) -> bool:
    """Return whether a person wrote something into the card, outside the generated section."""
    _, body = _split(text)
    return bool(re.sub(f"{BEGIN}.*{END}", "", body, flags=re.DOTALL).replace(YOURS, "").strip())


def made_of(text: str, base: str) -> bool:
    """Return whether the card's generated section is about a model made of this base model; one without it may be."""
    found = re.search(f"{BEGIN}.*{END}", text, flags=re.DOTALL)
    return found is None or f"`{base}`" in found[0]


def _split(text: str, name: str = "the card") -> tuple[dict[str, Any], str]:
    """The front matter, and the text that follows its closing line."""
    found = re.match(r"---\s*\n(.*?)^---\s*\n", text, re.DOTALL | re.MULTILINE)
    if not found:
        return {}, "\n" + text
    try:
        head = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the front matter of {name} is not valid YAML: {error}", "mend it, or move the card") from None
    if not isinstance(head, dict):  # a text between two rules
        return {}, "\n" + text
    return head, "\n" + text[found.end() :].lstrip("\n")
