"""robustify push: a hardened model, published on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from robustify import console
from robustify.cli import options


def run(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one that robustify export wrote.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to, on the hub.")],
    private: Annotated[bool, Option("--private", help="Only you can see it.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only show what would be sent.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Publish a hardened model with its card on the Hugging Face hub.

    Nothing else of robustify sends anything anywhere. Log in first: hf auth login. An upload that was interrupted goes
    on with the same command.

    \b
    robustify push runs/digits-wasserstein OWNER/NAME --dry-run
    """
    with console.status("loading torch"):
        from robustify.push import check_license, pack, push
    parcel = pack(source, repo)
    sizes = {name: len(part) if isinstance(part, bytes) else part.stat().st_size for name, part in parcel.items()}
    if dry_run and not as_json:
        console.table([{"file": name, "bytes": f"{size:,}"} for name, size in sizes.items()])
    check_license(parcel, source)
    url = None
    if not dry_run:
        url, private = push(parcel, repo, private=private)
    if as_json:
        console.result_json({"repo": repo, "private": private, "sent": not dry_run, "url": url, "files": sizes})
        return
    if dry_run:
        console.note(f"nothing was sent; without --dry-run these go to {repo}" + (", private" if private else ""))
        return
    console.result(f"published: {url}")
