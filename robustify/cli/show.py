"""robustify show: the text of a recipe."""
from __future__ import annotations

from typing import Annotated

import typer

from robustify import console, shelf


def run(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name of `robustify ls recipes`, or a file.")]) -> None:
    """Print a recipe.

    \b
    robustify show quickstart
    """
    console.result(shelf.text(recipe).rstrip("\n"))
