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
from robustify.report import Report, load_pair, save_pair
from robustify.sources import Checkpoint
from robustify.stages import measure_test, named


def lacking(end: str, run: Path | None, recipe: Recipe | None, start: PixelModel) -> str | None:
    """Return what is missing for a card of the line's points, None when nothing is.

    end: what the user calls the network at the line's end; run, recipe: the folder and the recipe that it was made in. What
    they know of their base model is true of the line only if it begins there, at `start`.
    """
    if run is None:
        return f"{end} is neither a run's folder nor one that robustify export wrote"
    kept = belongings(run)
    if absent := [name for name in (RECIPE, REPORT) if name not in kept]:
        return f"{end} has no {' and no '.join(absent)}"
    if recipe is None:
        return f"the recipe of {end} cannot be followed"
    if load_pair(kept[REPORT])[0].facts.get("model") != model_digest(start):
        return f"the line does not begin at the network that {end} was made from"
    return None


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
) -> tuple[Report, Report]:
    """Write the chosen point into `folder` with recipe, report, pictures and card; return its reports on the test images,
    of the start and of the point.

    checkpoint: with the chosen weights. start: the network where the line begins, and the run, see `lacking`; what the run
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
    export(
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
    return before, after
