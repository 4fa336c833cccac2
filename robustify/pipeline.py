"""One run, end to end: load, check, measure, train, measure again, export, card. `finetune` for a recipe, `harden` for a
network in memory."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustify import checkpoints, layers
from robustify import data as datasets
from robustify.card_figures import Gallery
from robustify.data import Data
from robustify.distributed import World, busy_cores, main_first, make_accelerator
from robustify.errors import UserError, together
from robustify.events import Event, Listener, Measured, Note, Planned, said
from robustify.faults import Preempted, Termination, peers_watched, same_everywhere, sigterm_noted
from robustify.inputs import augmentation, gate, load_inputs, prepare_weights, unknown_names
from robustify.memory import memory_explained
from robustify.modes import borrowed
from robustify.order import Pool
from robustify.pixels import PixelModel
from robustify.plan import check_run, planned
from robustify.recipe import Recipe, build
from robustify.report import Report, save_pair
from robustify.runs import clear_state, flat, open_run
from robustify.sharding import check_sharded
from robustify.sources import Checkpoint
from robustify.stages import begin, export_hardened, facts, go_back, measure_test, weights_of
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import Outcome, follow, saved, train
from robustify.unlabelled import pseudo_labelled, read_pool


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

    def __str__(self) -> str:
        """The two reports: what was measured before and after."""
        before, after = self.report
        return f"before\n{before}\n\nafter\n{after}"

    @property
    def hardened(self) -> bool:
        """Whether the weights are others than those that were loaded: the start is kept when nothing beat it."""
        before, after = (report.facts.get("model") for report in self.report)
        return before != after


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
    continues that run and fails when it has no checkpoint. force: replace what the folder holds. listener: hears every
    event (robustify.events); by default a line an epoch and a measurement goes to stderr, and `lambda event: None` is
    silent. Raises UserError for every mistake a user can mend; the folder then is as it was, or resumes.
    """
    accelerator = make_accelerator(recipe.train.precision, recipe.train.tracker, str(out))
    world = World(accelerator)
    folder = Path(out if resume in ("auto", "never") else resume)
    # an elastic launcher that starts the processes again means the run to go on
    force = force and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    checkpoint_at = world.on_main(lambda: _open(folder, recipe, resume, force))
    if recipe.train.tracker:
        simple = {
            key: v if isinstance(v, (int, float, str, bool)) else str(v) for key, v in flat(recipe.to_dict()).items()
        }
        accelerator.init_trackers("robustify", simple)
    tell = heard(listener, world)
    with peers_watched(world), sigterm_noted() as termination, memory_explained(recipe):
        if checkpoint_at is not None:
            termination.saved = saved(checkpoints.step_of(checkpoint_at))
        with main_first(world):
            checkpoint, data = load_inputs(recipe, tell)
        result = _run(
            recipe, checkpoint, data, accelerator, folder, checkpoint_at, command, tell, termination, export_it=True
        )
    accelerator.end_training()
    return result


def _open(folder: Path, recipe: Recipe, resume: str, force: bool) -> Path | None:
    """open_run; a folder that it refuses hides no other mistake."""
    try:
        return open_run(folder, recipe, resume, force)
    except UserError as refused:
        raise together([refused, *unknown_names(recipe)]) from None


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
    Data, a Dataset, or a pair of tensors or arrays (images NCHW, NHWC or NHW in [0,1] or uint8, labels); what is not given
    is held out of train_data.
    method: a name, or a mapping of its settings with `name`. threat: `W2-Linf:8/255`, `Linf:8/255`; by default the
    method's. augment: auto, none, flip, crop-flip or shift. out: run folder to write (None: none is kept). verify: refuse
    a model no better than chance, which usually means a wrong normalisation; False for an untrained one.
    listener: as for `finetune`: a line an epoch and a measurement on stderr; `lambda event: None` is silent.
    train_settings: as in the recipe's train section: epochs, lr,
    batch_size, layers, precision, seed... Raises UserError like `finetune`.
    """
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
    recipe = build(values, unnamed=("train", "eval", "data"))
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
    tell = heard(listener, World(accelerator))
    with sigterm_noted() as ends, memory_explained(recipe):
        if out is None:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                try:
                    result = _run(recipe, checkpoint, data, accelerator, place, None, "", tell, ends, export_it=False)
                except Preempted:  # what it says is saved goes with the folder
                    raise Preempted("nothing is kept without a run folder (out)") from None
                return replace(result, folder=None)
        at, call = open_run(Path(out), recipe, "never", force), "robustify.harden(...)"
        return _run(recipe, checkpoint, data, accelerator, Path(out), at, call, tell, ends, export_it=True)


def heard(listener: Listener | None, world: World) -> Listener:
    """Return who hears the events in this process: of several processes only the main one's listener does.

    Without a listener the lines of `events.said` go to stderr, and warnings are Python's.
    """
    return (listener or _tell) if world.is_main else lambda event: None


def _tell(event: Event) -> None:
    if isinstance(event, Note) and event.level == "warning":
        warnings.warn(event.text, stacklevel=5)
        return
    for line in said(event):
        print(line, file=sys.stderr, flush=True)


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
    pool = read_pool(recipe, data) if recipe.data.unlabelled else None
    same_everywhere(world, facts(recipe, model, data, pool))
    gate(recipe, checkpoint, data, world, tell)
    if pool is not None and recipe.data.unlabelled_as == "pseudo":
        pool = pseudo_labelled(recipe, model, pool, data.num_classes, world, accelerator.device, tell)
    gallery = Gallery.begin(model, data) if export_it and world.is_main else None
    if (warning := busy_cores()) is not None:
        tell(Note(warning, "warning"))
    tell(Planned(planned(recipe, checkpoint, data)))
    before = world.on_main(lambda: begin(folder, recipe, command, resume, data))
    if before is None:
        before = measure_test(recipe, checkpoint, model, data, world, "before", tell)
        if world.is_main:
            before.save(folder / "before.json")
    tell(Measured("before", before))

    start = weights_of(model) if recipe.train.max_clean_drop is not None else {}
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
            went_back = go_back(recipe, model, start, data, folder, world, tell)
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
    termination.hold()  # a run that is as good as ended ends well
    if world.is_main:
        save_pair(folder / "report.json", before, after)
        if export_it:
            export_hardened(folder, recipe, checkpoint, model, data, (before, after), outcome, gallery, tell)
        clear_state(folder)
    world.wait()
    return Result(model.net, (before, after), outcome, folder, model, recipe)
