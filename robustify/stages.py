"""What the stages of a run do: its facts, its measurements, the way back along the line of weights, its export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from robustify import files
from robustify.blend import Weights, between, choose, curve, few, in_words, price, quick
from robustify.card_figures import Gallery, draw
from robustify.data import Data, Split, digest
from robustify.distributed import World
from robustify.errors import UserError
from robustify.evaluation import evaluate, model_digest
from robustify.events import Exported, Listener, Note, Progress
from robustify.export import buffers_not_held, export
from robustify.methods import withstood
from robustify.model_folder import write_card
from robustify.pixels import PixelModel
from robustify.plan import passes_per_image
from robustify.recipe import Recipe
from robustify.report import Report
from robustify.runs import begin_run, flat
from robustify.sources import Checkpoint
from robustify.train import Outcome

BLEND_IMAGES = 1000  # held-out images on which the point of the line is chosen


def facts(recipe: Recipe, model: PixelModel, data: Data, pool: Split | None) -> dict[str, Any]:
    """What must be the same on every machine: settings, weights and images, wherever each has its files."""
    places = ("model.source", "model.models_dir", "data.name", "data.root", "data.unlabelled", "data.workers")
    settings = {name: value for name, value in flat(recipe.to_dict()).items() if name not in places}
    return settings | {"weights": model_digest(model), "data": data.digest, "unlabelled": pool and digest(pool)}


def weights_of(model: PixelModel) -> dict[str, Tensor]:
    """Return a copy of the network's state."""
    return {name: value.detach().clone() for name, value in model.net.state_dict().items()}


def go_back(
    recipe: Recipe, model: PixelModel, start: Weights, data: Data, folder: Path, world: World, tell: Listener
) -> str:
    """Leave the model at the most robust point of the line that keeps the clean accuracy asked for. Returns what was done."""
    n, end = min(BLEND_IMAGES, len(data.val)), weights_of(model)
    if (warning := few(n)) is not None:
        tell(Note(f"{warning}; hold out more (data.val_fraction; val_data in robustify.harden)", "warning"))
    threats = withstood(recipe.method, recipe.threat)
    points = curve(
        model,
        start,
        end,
        data.val,
        threats,
        n=n,
        seed=recipe.train.seed,
        batch_size=recipe.eval.batch_size,
        world=world,
        tell=lambda done, total: tell(Progress("blending with the loaded weights", done, total)),
    )
    chosen = choose(points, recipe.train.max_clean_drop)
    model.net.load_state_dict(between(start, end, chosen.alpha))
    if world.is_main:
        files.write_json(folder / "blend.json", {"n": n, "points": [asdict(point) for point in points], **asdict(chosen)})
    measured = f"{quick(threats)} at {' and '.join(map(str, threats))}"
    said = in_words(chosen, len(points), n, "the loaded", "the trained ones", measured, recipe.train.max_clean_drop)
    tell(Note(said))
    if chosen.alpha == 0:
        cost = price(points)
        beta = " or beta (method.beta)" if hasattr(recipe.method, "beta") else ""
        tell(
            Note(
                "max_clean_drop went all the way back to the loaded weights: "
                + ("no point of the line is" if cost is None else f"from max_clean_drop {cost:g} on a point of the line is")
                + f" more robust; a smaller radius (threat) or learning rate (train.lr){beta} costs less clean accuracy",
                "warning",
            )
        )
    return said


def begin(folder: Path, recipe: Recipe, command: str, resume: Path | None, data: Data) -> Report | None:
    """Write the run's facts. Returns the first measurement of a run that continues, None when it is still to be made."""
    begin_run(folder, recipe, command, anew=resume is None)
    if resume is None or not (folder / "before.json").exists():
        return None
    before = Report.load(folder / "before.json")
    if before.data != named(data):
        raise UserError(
            f"the run in {folder} began on the data {before.data}, this is {named(data)}",
            "start anew with --force (force=True in Python)",
        )
    return before


def named(data: Data) -> str:
    """The data as reports name it."""
    return f"{data.name} ({data.digest})"


def measure_test(
    recipe: Recipe, checkpoint: Checkpoint, model: PixelModel, data: Data, world: World, when: str, tell: Listener
) -> Report:
    """Evaluate on the test set as the recipe says, in full precision. when: before or after."""
    e = recipe.eval
    return evaluate(
        model,
        data.test,
        e.attacks,
        withstood(recipe.method, recipe.threat),
        n=e.n and min(e.n, len(data.test)),
        batch_size=e.batch_size,
        seed=e.seed,
        world=world,
        tell=lambda stage, done, total: tell(Progress(f"{when}: {stage}", done, total)),
        model_id=checkpoint.base_id if when == "before" else f"{checkpoint.base_id} + {recipe.method.name}",
        data_name=named(data),
        split_name=data.test_name,
        check=True,
    )


def export_hardened(
    folder: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    model: PixelModel,
    data: Data,
    reports: tuple[Report, Report],
    outcome: Outcome,
    gallery: Gallery | None,
    tell: Listener,
) -> None:
    """model/ in timm's layout, with its card; it appears as a whole."""
    x, _ = data.test.batch(range(min(64, len(data.test))))
    threat = recipe.threat if recipe.method.adversarial else None

    def finish(stage: Path) -> None:
        draw(stage, *reports, folder / "metrics.jsonl", gallery, model)
        write_card(stage, place=folder.resolve() / "model")

    export(
        checkpoint,
        model,
        folder / "model",
        robustness={
            "threat": threat and threat.spec,
            "dataset": data.name,
            "method": recipe.method.name,
            "pretrained": recipe.model.pretrained,
            "replaced": checkpoint.replaced,
            "recipe": recipe.digest,
            "report": reports[1].digest(),
            "training": _cost(recipe, outcome),
        },
        metadata={"threat": threat, "recipe": recipe.digest},
        verify_batch=x,
        class_names=data.class_names or (),
        finish=finish,
        force=True,
    )
    if (missing := buffers_not_held(checkpoint, model)) is not None:
        tell(Note(missing))
    tell(Exported(folder / "model"))


def _cost(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """What the training spent."""
    forward, image, weights = passes_per_image(recipe)
    passes = {"forward": forward, "backward to the image": image, "backward to the weights": weights}
    steps = {"steps": outcome.steps, "batch_size": recipe.train.batch_size}
    epochs = {"epochs": outcome.epochs, "best_epoch": outcome.best_epoch}
    return {"seconds": round(outcome.seconds, 1), **steps, **epochs, "passes_per_image": passes}
