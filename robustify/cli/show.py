"""robustify show: the text of a recipe."""

from __future__ import annotations

from typing import Annotated

from robustify import console, shelf
from robustify.cli import options


def run(recipe: Annotated[str, options.Recipe]) -> None:
    """Print a recipe.

    \b
    robustify show quickstart
    """
    console.result(shelf.text(recipe).rstrip("\n"))
