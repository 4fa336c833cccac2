"""One run, end to end: load, check, measure, train, measure again, export, card. `finetune` for a recipe, `harden` for a
network in memory."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustify import data as datasets
from robustify import files, layers
from robustify.blend import Weights, between, choose, curve, in_words
from robustify.card_figures import Gallery, draw
from robustify.data import Data
from robustify.distributed import World, busy_cores, main_first, make_accelerator
from robustify.errors import UserError
from robustify.evaluation import evaluate, model_digest
from robustify.events import Event, Exported, Listener, Measured, Note, Planned, Progress
from robustify.export import export
from robustify.faults import Termination, peers_watched, same_everywhere, sigterm_noted
from robustify.inputs import augmentation, gate, load_inputs, prepare_weights
from robustify.memory import memory_explained
from robustify.methods import withstood
from robustify.model_folder import write_card
from robustify.modes import borrowed
from robustify.order import Pool
from robustify.pixels import PixelModel
from robustify.plan import check_run, passes_per_image, planned
from robustify.recipe import Recipe, build
from robustify.report import Report, save_pair
from robustify.runs import begin_run, clear_state, flat, open_run
from robustify.sharding import check_sharded
from robustify.sources import Checkpoint
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import Outcome, follow, train
from robustify.unlabelled import pseudo_labelled, read_pool

BLEND_IMAGES = 1000  # held-out images on which the point of the line is chosen


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    model: the hardened network, of the same class as the one that went in; report: (before, after);
    folder: the run folder, or None; pixel_model: the network behind its normalisation.
    """

    model: nn.Module
    report: tuple[Report, Report]
    outcome: Outcome
    folder: Path | None
    pixel_model: PixelModel
    recipe: Recipe


def finetune(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: str = "auto",
    force: bool = False,
    command: str = "",
    listener: Listener | None = None,
) -> Result:
    """Run a recipe and return its Result; the run folder holds the recipe, metrics, reports, environment and model/.

    out: the run folder. resume: `auto` continues an unfinished run of the same recipe there, `never` starts anew, a path
    continues that run and fails when it has no checkpoint. force: replace what the folder holds. Raises UserError for
    every mistake a user can mend; the folder then is as it was, or resumes.
    """
    listener = listener or (lambda event: None)
    accelerator = make_accelerator(recipe.train.precision, recipe.train.tracker, str(out))
    world = World(accelerator)
    folder = Path(out if resume in ("auto", "never") else resume)
    # an elastic launcher that starts the processes again means the run to go on
    force = force and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    checkpoint_at = world.on_main(lambda: open_run(folder, recipe, resume, force))
    if recipe.train.tracker:
        simple = {
            key: v if isinstance(v, (int, float, str, bool)) else str(v) for key, v in flat(recipe.to_dict()).items()
        }
        accelerator.init_trackers("robustify", simple)
    tell: Listener = listener if world.is_main else lambda event: None
    with peers_watched(world), sigterm_noted() as termination, memory_explained(recipe):
        with main_first(world):
            checkpoint, data = load_inputs(recipe, tell)
        result = _run(
            recipe, checkpoint, data, accelerator, folder, checkpoint_at, command, tell, termination, export_it=True
        )
    accelerator.end_training()
    return result


def harden(
    model: nn.Module,
    train_data: Any,
    *,
    method: str | dict[str, Any] = "wasserstein",
    threat: str | ThreatModel | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    val_data: Any = None,
    test_data: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener | None = None,
    attacks: Sequence[str] = ("clean", "fgsm", "pgd", "w-pgd"),
    n: int | None = 1000,
    verify: bool = True,
    augment: str = "auto",
    **train_settings: Any,
) -> Result:
    """Harden a network in memory. Returns a Result whose `.model` is of the same class; the one given is left as it is.

    model: maps [0,1] images to logits, or images normalised with `mean` and `std`. train_data (val_data, test_data): a
    Data, a Dataset, or a pair of tensors (images in [0,1] or uint8, labels); what is not given is held out of train_data.
    method: a name, or a mapping of its settings with `name`. threat: `W2-Linf:8/255`, `Linf:8/255`; by default the
    method's. augment: auto, none, flip, crop-flip or shift. out: run folder to write (None: none is kept). verify: refuse
    a model no better than chance, which usually means a wrong normalisation; False for an untrained one.
    train_settings: as in the recipe's train section: epochs, lr,
    batch_size, layers, precision, seed... Raises UserError like `finetune`.
    """
    listener = listener or _warn
    data = train_data if isinstance(train_data, Data) else datasets.from_tensors(train_data, val_data, test_data)
    values: dict[str, Any] = {
        "model": {"source": type(model).__name__, "verify": verify},
        "data": {"name": data.name, "augment": augment},
        "method": method,
        "train": {"epochs": 5, **train_settings},
        "eval": {"attacks": list(attacks), "n": n and min(n, len(data.test))},
    }
    if threat is not None:
        values["threat"] = ThreatModel.parse(threat)
    recipe = build(values)
    pixel_model = PixelModel(copy.deepcopy(model), mean, std)
    with borrowed(pixel_model), torch.no_grad():
        x, _ = data.test.batch([0])
        try:
            logits = pixel_model(x.to(next(pixel_model.parameters()).device))
        except RuntimeError as error:
            raise UserError(f"the model does not take images of shape {tuple(x.shape[1:])}: {error}") from None
    checkpoint = Checkpoint(
        pixel_model, "custom", {}, logits.shape[1], data.input_size, type(model).__name__, None, None, None, None
    )
    accelerator = make_accelerator(recipe.train.precision)
    with sigterm_noted() as ends, memory_explained(recipe):
        if out is None:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                result = _run(recipe, checkpoint, data, accelerator, place, None, "", listener, ends, export_it=False)
                return replace(result, folder=None)
        at, said = open_run(Path(out), recipe, "never", force), "robustify.harden(...)"
        return _run(recipe, checkpoint, data, accelerator, Path(out), at, said, listener, ends, export_it=True)


def _warn(event: Event) -> None:
    """What a caller in Python who listens to nothing must still hear."""
    if isinstance(event, Note) and event.level == "warning":
        warnings.warn(event.text, stacklevel=5)


def _run(
    recipe: Recipe,
    checkpoint: Checkpoint,
    data: Data,
    accelerator: Any,
    folder: Path,
    resume: Path | None,
    command: str,
    tell: Listener,
    termination: Termination,
    *,
    export_it: bool,
) -> Result:
    """The stages of a run, in order."""
    world = World(accelerator)
    model = checkpoint.model.to(accelerator.device)
    data = data.to(accelerator.device)
    if world.sharded:
        world.on_main(lambda: check_sharded(recipe))
    world.on_main(lambda: check_run(recipe, model, data, world.size))
    same_everywhere(world, _facts(recipe, model, data))
    gate(recipe, checkpoint, data, world, tell)
    pool = read_pool(recipe, data) if recipe.data.unlabelled else None
    if pool is not None and recipe.data.unlabelled_as == "pseudo":
        pool = pseudo_labelled(recipe, model, pool, data.num_classes, world, accelerator.device, tell)
    gallery = Gallery.begin(model, data) if export_it and world.is_main else None
    if (warning := busy_cores()) is not None:
        tell(Note(warning, "warning"))
    tell(Planned(planned(recipe, checkpoint, data)))
    before = world.on_main(lambda: _begin(folder, recipe, command, resume, data))
    if before is None:
        before = measure_test(recipe, checkpoint, model, data, world, "before", tell)
        if world.is_main:
            before.save(folder / "before.json")
    tell(Measured("before", before))

    start = _weights(model) if recipe.train.max_clean_drop is not None else {}
    classifier = prepare_weights(recipe, model, data)
    layers.select(model.net, recipe.train.layers, classifier)
    setup = prepare(
        model, recipe.method, recipe.threat, recipe.train, accelerator, augmentation(recipe, data), len(data.train)
    )
    run = train(
        setup,
        data,
        folder,
        resume=resume,
        eval_batch=recipe.eval.batch_size,
        workers=recipe.data.workers,
        pool=None if pool is None else Pool(pool, recipe.data.unlabelled_share),
        termination=termination,
    )
    outcome = follow(run, tell)
    model.eval().requires_grad_(True)
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    went_back = None
    if recipe.train.max_clean_drop is not None:
        if outcome.best_epoch:
            went_back = _go_back(recipe, model, start, data, folder, world, tell)
        else:
            tell(Note("the start's weights are kept, so max_clean_drop has nothing to go back from", "warning"))

    after = measure_test(recipe, checkpoint, model, data, world, "after", tell)
    tell(Measured("after", after))
    # what was said when it happened, for the report and the card
    if went_back:
        after.notes.append(went_back)
    if outcome.best_epoch == 0:
        after.notes.append(
            "no epoch of the training beat the start on the held-out images: these are the start's weights"
        )
    if outcome.remedies:
        after.notes.append(f"robustness collapsed while training, which then went on with {', then '.join(outcome.remedies)}")
    if world.is_main:
        save_pair(folder / "report.json", before, after)
        if export_it:
            _export(folder, recipe, checkpoint, model, data, (before, after), outcome, gallery)
            tell(Exported(folder / "model"))
        clear_state(folder)
    world.wait()
    return Result(model.net, (before, after), outcome, folder, model, recipe)


def _facts(recipe: Recipe, model: PixelModel, data: Data) -> dict[str, Any]:
    """What must be the same on every machine: settings, weights and images, wherever each has its files."""
    places = ("model.source", "model.models_dir", "data.name", "data.root", "data.unlabelled", "data.workers")
    settings = {name: value for name, value in flat(recipe.to_dict()).items() if name not in places}
    return settings | {"weights": model_digest(model), "data": data.digest}


def _weights(model: PixelModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.net.state_dict().items()}


def _go_back(
    recipe: Recipe, model: PixelModel, start: Weights, data: Data, folder: Path, world: World, tell: Listener
) -> str:
    """Leave the model at the most robust point of the line that keeps the clean accuracy asked for. Returns what was done."""
    n, end = min(BLEND_IMAGES, len(data.val)), _weights(model)
    points = curve(
        model,
        start,
        end,
        data.val,
        withstood(recipe.method, recipe.threat),
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
    said = in_words(chosen, len(points), n, "the loaded", "the trained ones", recipe.train.max_clean_drop)
    tell(Note(said))
    return said


def _begin(folder: Path, recipe: Recipe, command: str, resume: Path | None, data: Data) -> Report | None:
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


def _export(
    folder: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    model: PixelModel,
    data: Data,
    reports: tuple[Report, Report],
    outcome: Outcome,
    gallery: Gallery | None,
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


def _cost(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """What the training spent."""
    forward, image, weights = passes_per_image(recipe)
    passes = {"forward": forward, "backward to the image": image, "backward to the weights": weights}
    steps = {"steps": outcome.steps, "batch_size": recipe.train.batch_size, "best_epoch": outcome.best_epoch}
    return {"seconds": round(outcome.seconds, 1), **steps, "passes_per_image": passes}
