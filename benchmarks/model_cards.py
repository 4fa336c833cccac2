"""Make an entry of model_cards/ anew: harden by its recipe, measure, export with card, recipe and report.

    OMP_NUM_THREADS=1 python benchmarks/model_cards.py digits-cnn

An interrupted run goes on, a finished one in runs/ is exported as it is. What a person wrote into the card stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from robustify.api import export
from robustify.console import Watch
from robustify.model_folder import CARD, RECIPE
from robustify.pipeline import finetune
from robustify.resolve import resolve

RECIPES = {"digits-cnn": "digits-standard", "cifar10-resnet2b2": "cifar10-resnet2b2"}
CARDS = Path(__file__).parents[1] / "model_cards"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args().name
    recipe = resolve(RECIPES[name]).recipe
    run = Path("runs") / name
    finished = (run / "model" / CARD).is_file() and resolve(str(run / RECIPE)).recipe == recipe
    with Watch() as watch:
        if not finished:
            finetune(recipe, run, command=f"python benchmarks/model_cards.py {name}", listener=watch)
        print(export(run, CARDS / name, force=True, listener=watch))
