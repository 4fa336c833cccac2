"""A point of the line between two networks, exported with a card: measured on the test images as the run at its end was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from robustify import files
from robustify.card import without_home
from robustify.card_figures import draw
from robustify.data import Data
from robustify.distributed import World, make_accelerator
from robustify.evaluation import model_digest
from robustify.events import Listener
from robustify.export import export
from robustify.model_folder import CARD, LICENSE, RECIPE, REPORT, belongings, read_config, robustness_of, write_card
from robustify.pixels import PixelModel
from robustify.recipe import Recipe
from robustify.report import load_pair, save_pair
from robustify.sources import Checkpoint
from robustify.stages import measure_test, named


def begins(run: Path, start: PixelModel) -> bool:
    """Return whether a run began from this network: what the run knows of its base model is true of the line only then."""
    kept = belongings(run)
    return REPORT in kept and load_pair(kept[REPORT])[0].facts.get("model") == model_digest(start)


def export_blended(
    checkpoint: Checkpoint,
    start: PixelModel,
    run: Path,
    recipe: Recipe,
    data: Data,
    said: str,
    command: str,
    folder: str | Path,
    *,
    force: bool = False,
    listener: Listener,
) -> Path:
    """Write the chosen point into `folder` with recipe, report, pictures and card; return the folder's absolute path.

    checkpoint: with the chosen weights. start: the network where the line begins, which `begins` the run; what the run
    measured of it is not measured again, unless the images are others. run: the folder with the config.json of the run
    where the line ends; recipe: that run's. said: which point this is, for the card, where the run's remarks, license and
    own text go along. command: what was typed. Raises UserError like `export`.
    """
    target = files.new_folder(folder, force)
    config, kept = read_config(run), belongings(run)
    world = World(make_accelerator())
    checkpoint = dataclasses.replace(checkpoint, base_id=config["robustness"]["base_model"])
    before, end = load_pair(kept[REPORT])
    if before.data != named(data):
        before = measure_test(recipe, checkpoint, start, data, world, "before", listener)
    after = measure_test(recipe, checkpoint, checkpoint.model, data, world, "after", listener)
    after.notes.append(without_home(said))
    after.notes.extend([f"Of the run at the line's end: {note}" for note in end.notes if note not in after.notes])
    origin = robustness_of(config)
    recipe_text = f"# {command}\n{kept[RECIPE].read_text(encoding='utf8')}"

    def finish(stage: Path) -> None:
        save_pair(stage / REPORT, before, after)
        files.write_text(stage / RECIPE, recipe_text)
        for name in {CARD, LICENSE} & kept.keys():
            files.write_bytes(stage / name, kept[name].read_bytes())
        draw(stage, before, after, kept[RECIPE].with_name("metrics.jsonl"), None, checkpoint.model)
        write_card(stage, place=target)

    x, _ = data.test.batch(range(min(64, len(data.test))))
    return export(
        checkpoint,
        checkpoint.model,
        folder,
        robustness={**origin, "report": after.digest()},
        metadata={"threat": recipe.threat, "recipe": origin.get("recipe")},
        verify_batch=x,
        class_names=config.get("label_names") or (),
        finish=finish,
        force=force,
    )
