"""One run, end to end: load, check, measure, train, measure again, export, card. `finetune` for a recipe, `harden` for a
network in memory."""
from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustify import checkpoints, files, layers
from robustify import data as datasets
from robustify.card import write_card
from robustify.data import Data
from robustify.distributed import World, busy_cores, main_first, make_accelerator
from robustify.errors import UserError
from robustify.evaluation import evaluate
from robustify.events import Event, Exported, Listener, Measured, Note, Planned, Progress
from robustify.export import export
from robustify.modes import borrowed
from robustify.pixels import PixelModel
from robustify.recipe import Recipe, build
from robustify.report import Report, environment, save_pair
from robustify.sources import Checkpoint
from robustify.sources import load as load_source
from robustify.threat import ThreatModel
from robustify.train import Outcome, prepare, take_step, train
from robustify.verify import verify as verify_accuracy

VERIFY_IMAGES = 500  # of the test set; a standard error of 1.6 points at 85 %


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
    recipe: Recipe, out: str | Path, *, resume: str = "auto", force: bool = False, command: str = "", listener: Listener | None = None
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
    checkpoint_at = world.on_main(lambda: _open_folder(folder, recipe, resume, force))
    if recipe.train.tracker:
        simple = {key: v if isinstance(v, (int, float, str, bool)) else str(v) for key, v in _flat(recipe.to_dict()).items()}
        accelerator.init_trackers("robustify", simple)
    tell: Listener = listener if world.is_main else lambda event: None
    with memory_explained(recipe):
        with main_first(world):
            checkpoint, data = _load(recipe, tell)
        result = _run(recipe, checkpoint, data, accelerator, folder, checkpoint_at, command, tell, export_it=True)
    accelerator.end_training()
    return result


def plan(recipe: Recipe, *, listener: Listener | None = None) -> dict[str, Any]:
    """Load everything, check it, run one batch and return the plan: what `--dry-run` prints. Writes nothing."""
    listener = listener or (lambda event: None)
    accelerator = make_accelerator(recipe.train.precision)
    with memory_explained(recipe):
        checkpoint, data = _load(recipe, listener)
        _gate(recipe, checkpoint, data, World(accelerator), listener)
        facts = _plan(recipe, checkpoint, data)
        return facts | _time_one_step(recipe, checkpoint, data, accelerator)


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
    **train_settings: Any,
) -> Result:
    """Harden a network in memory. Returns a Result whose `.model` is of the same class; the one given is left as it is.

    model: maps [0,1] images to logits, or images normalised with `mean` and `std`. train_data (val_data, test_data): a
    Data, a Dataset, or a pair of tensors (images in [0,1] or uint8, labels); what is not given is held out of train_data.
    method: a name, or a mapping of its settings with `name`. threat: `W2-Linf:8/255`, `Linf:8/255`; by default the
    method's. out: run folder to write (None: none is kept). verify: refuse a model no better than chance, which usually
    means a wrong normalisation; False for an untrained one. train_settings: as in the recipe's train section: epochs, lr,
    batch_size, layers, precision, seed... Raises UserError like `finetune`.
    """
    listener = listener or (lambda event: None)
    data = train_data if isinstance(train_data, Data) else datasets.from_tensors(train_data, val_data, test_data)
    values: dict[str, Any] = {
        "model": {"source": type(model).__name__, "verify": verify}, "data": data.name, "method": method, "train": {"epochs": 5, **train_settings},
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
    with memory_explained(recipe):
        if out is None:
            with tempfile.TemporaryDirectory() as scratch:
                result = _run(recipe, checkpoint, data, accelerator, Path(scratch), None, "", listener, export_it=False)
                return replace(result, folder=None)
        at = _open_folder(Path(out), recipe, "auto", force)
        return _run(
            recipe, checkpoint, data, accelerator, Path(out), at, "robustify.harden(...)", listener, export_it=True
        )


def _run(
    recipe: Recipe, checkpoint: Checkpoint, data: Data, accelerator: Any, folder: Path, resume: Path | None, command: str,
    tell: Listener, *, export_it: bool,
) -> Result:
    """The stages of a run, in order."""
    world = World(accelerator)
    model = checkpoint.model.to(accelerator.device)
    data = data.to(accelerator.device)
    _gate(recipe, checkpoint, data, world, tell)
    if (warning := busy_cores()) is not None:
        tell(Note(warning, "warning"))
    tell(Planned(_plan(recipe, checkpoint, data)))
    if world.is_main:
        _write_facts(folder, recipe, command)
    world.wait()

    before_at = folder / "before.json"
    if resume is not None and before_at.exists():
        before = Report.load(before_at)
    else:
        before = _measure(recipe, checkpoint, model, data, world, "before", tell)
        if world.is_main:
            before.save(before_at)
    tell(Measured("before", before))

    classifier = _prepare_weights(recipe, model, data)
    layers.select(model.net, recipe.train.layers, classifier)
    setup = prepare(
        model, recipe.method, recipe.threat, recipe.train, accelerator, _augmentation(recipe, data), len(data.train)
    )
    outcome = follow(train(setup, data, folder, resume=resume, eval_batch=recipe.eval.batch_size), tell)
    model.eval().requires_grad_(True)
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    after = _measure(recipe, checkpoint, model, data, world, "after", tell)
    tell(Measured("after", after))
    if world.is_main:
        save_pair(folder / "report.json", before, after)
        if export_it:
            _export(folder, recipe, checkpoint, model, data, (before, after), outcome, command)
            tell(Exported(folder / "model"))
        for leftover in ("before.json", "before.npz", "best.safetensors"):
            (folder / leftover).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    world.wait()
    return Result(model.net, (before, after), outcome, folder, model, recipe)


def follow(events: Generator[Event, None, Outcome], tell: Listener) -> Outcome:
    """Pass a training's events on and return its outcome."""
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            return stop.value
        tell(event)


def _load(recipe: Recipe, listener: Listener) -> tuple[Checkpoint, Data]:
    m, d = recipe.model, recipe.data
    listener(Progress("loading the model", 0, 1))
    checkpoint = load_source(
        m.source, dataset=m.dataset, threat=m.threat, num_classes=m.num_classes, pretrained=m.pretrained,
        models_dir=Path(m.models_dir) if m.models_dir else None, allow_pickle=m.allow_pickle,
    )
    data = datasets.load(
        d.name, root=Path(d.root) if d.root else None, val_fraction=d.val_fraction, seed=recipe.train.seed,
        input_size=checkpoint.input_size, limit=d.limit,
        progress=lambda done, total: listener(Progress("reading the data", done, total)),
    )
    if data.num_classes != checkpoint.num_classes:
        raise UserError(
            f"{checkpoint.base_id} has {checkpoint.num_classes} classes, {d.name} has {data.num_classes}",
            f"take data of the same classes, or replace a timm model's classifier: --set model.num_classes={data.num_classes}",
        )
    return checkpoint, data


def _gate(recipe: Recipe, checkpoint: Checkpoint, data: Data, world: World, tell: Listener) -> None:
    """The loaded model's clean accuracy against the published one, before anything is spent on it."""
    if not recipe.model.verify or not recipe.model.pretrained:
        tell(Note("the model's clean accuracy is not checked against its published figure", "warning"))
        return
    n = min(VERIFY_IMAGES, len(data.test))
    report = evaluate(
        checkpoint.model, data.test, ["clean"], recipe.threat, n=n, batch_size=min(64, recipe.eval.batch_size), world=world,
        tell=lambda stage, done, total: tell(Progress("checking the model", done, total)),
    )
    tell(Note(verify_accuracy(report.rows[0].accuracy, n, checkpoint, recipe.data.name, data.num_classes)))


def _plan(recipe: Recipe, checkpoint: Checkpoint, data: Data) -> dict[str, Any]:
    net = checkpoint.model.net
    x, _ = data.test.batch([0, 1])
    classifier = layers.find_classifier(net, _normalised(checkpoint.model, x)) if recipe.train.layers == "last" else []
    flags = [(w, w.requires_grad) for w in net.parameters()]
    chosen = layers.select(net, recipe.train.layers, classifier)
    for weight, flag in flags:
        weight.requires_grad_(flag)
    steps = len(data.train) // recipe.train.batch_size
    return {
        "model": checkpoint.base_id, "architecture": checkpoint.arch, "license": checkpoint.license or "unknown",
        "data": f"{data.name}: {len(data.train)} train, {len(data.val)} held out, {len(data.test)} test",
        "threat": recipe.threat.spec, "method": recipe.method.name,
        "trains": f"{recipe.train.layers}: {chosen.trainable:,} of {chosen.total:,} parameters",
        "classifier": ", ".join(classifier) or None,
        "steps": f"{steps} per epoch, {steps * recipe.train.epochs} in {recipe.train.epochs} epochs of batch {recipe.train.batch_size}",
        # a backward pass to the input costs about 1.2 forward passes, one to the weights about 2.6 (docs/speed.md)
        "passes per step": f"{recipe.method.passes(1.2, 2.6):.1f} forward passes of the batch",
    }


def _time_one_step(recipe: Recipe, checkpoint: Checkpoint, data: Data, accelerator: Any) -> dict[str, Any]:
    """Run one real training step on a copy and project the run's time from it.

    On a GPU the whole batch, to see that it fits; on a CPU, where time is proportional to the images, 16 of them.
    """
    model = copy.deepcopy(checkpoint.model).to(accelerator.device)
    layers.select(model.net, recipe.train.layers, _prepare_weights(recipe, model, data))
    batch = min(len(data.train), recipe.train.batch_size)
    n = batch if accelerator.device.type == "cuda" else min(batch, 16)
    settings = recipe.train.model_copy(update={"batch_size": n, "accumulate": 1})
    setup = prepare(model, recipe.method, recipe.threat, settings, accelerator, _augmentation(recipe, data), len(data.train))
    if setup.tracker:
        setup.tracker.measure(torch.ones(2, dtype=torch.float64), 2)
    images = data.train.batch(range(n))
    begin = time.perf_counter()
    losses, _ = take_step(setup, iter([images]), 0)
    took = (time.perf_counter() - begin) * batch / n
    steps = len(data.train) // recipe.train.batch_size * recipe.train.epochs
    return {
        "one step": f"{took:.2f} s for a batch of {batch}, from one of {n}; loss {losses['total']:.4g}",
        "training time": f"about {_duration(took * steps)}, without evaluation",
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _prepare_weights(recipe: Recipe, model: PixelModel, data: Data) -> list[str]:
    """Find the classifier where it is needed, and initialise the weights as the recipe says."""
    t = recipe.train
    classifier: list[str] = []
    if t.layers == "last" or t.init == "reinit":
        x, _ = data.test.batch([0, 1])
        classifier = layers.find_classifier(model.net, _normalised(model, x.to(next(model.parameters()).device)))
    if t.init == "reinit":
        layers.reinitialise(model.net, classifier, t.seed)
    elif t.init == "noise":
        layers.add_weight_noise(model.net, t.init_noise, t.seed)
    return classifier


def _normalised(model: PixelModel, x: Tensor) -> Tensor:
    return (x - model.mean) / model.std


def _augmentation(recipe: Recipe, data: Data) -> str:
    return data.augmentation if recipe.data.augment == "auto" else recipe.data.augment


def _measure(
    recipe: Recipe, checkpoint: Checkpoint, model: PixelModel, data: Data, world: World, when: str, tell: Listener
) -> Report:
    """Evaluate on the test set, in full precision."""
    e = recipe.eval
    return evaluate(
        model, data.test, e.attacks, recipe.threat, n=e.n and min(e.n, len(data.test)), batch_size=e.batch_size,
        seed=e.seed, world=world, tell=lambda stage, done, total: tell(Progress(f"{when}: {stage}", done, total)),
        model_id=checkpoint.base_id if when == "before" else f"{checkpoint.base_id} + {recipe.method.name}",
        data_name=f"{data.name} ({data.digest})",
    )


def _export(
    folder: Path, recipe: Recipe, checkpoint: Checkpoint, model: PixelModel, data: Data, reports: tuple[Report, Report],
    outcome: Outcome, command: str,
) -> None:
    """model/ in timm's layout, with its card; the card comes last, so a folder with one is whole."""
    n = min(64, len(data.test))
    x, _ = data.test.batch(range(n))
    names = data.class_names or ()
    after = reports[1]
    threat = recipe.threat.spec if recipe.method.adversarial else None
    export(
        checkpoint, model, folder / "model",
        robustness={
            "threat": threat, "dataset": data.name, "method": recipe.method.name, "recipe": recipe.digest, "report": after.digest(),
        },
        metadata={"threat": threat, "recipe": recipe.digest}, verify_batch=x, class_names=names, force=True,
    )
    write_card(
        folder / "model", name=folder.resolve().name, checkpoint=checkpoint, recipe=recipe.to_dict(), digest=recipe.digest,
        command=command, before=reports[0], after=after, class_names=names, seconds=outcome.seconds,
    )


def _open_folder(folder: Path, recipe: Recipe, resume: str, force: bool) -> Path | None:
    """Decide between a new run and a continued one. Returns the checkpoint to continue from, or None."""
    if resume not in ("auto", "never"):
        found = checkpoints.latest(Path(resume) / "checkpoints")
        if found is None:
            raise UserError(f"no checkpoint in {resume}", "give the folder of an unfinished run, or --resume never")
        _same_recipe(Path(resume), recipe)
        return found
    unfinished = (folder / "recipe.yaml").exists() and not (folder / "model" / "README.md").exists()
    if resume == "auto" and unfinished and not force:
        _same_recipe(folder, recipe)
        return checkpoints.latest(folder / "checkpoints")
    files.new_folder(folder, force)
    if force and folder.exists():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "best.safetensors").unlink(missing_ok=True)
    return None


def _same_recipe(folder: Path, recipe: Recipe) -> None:
    import yaml

    try:
        there = build(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml") from None
    if there.digest != recipe.digest:
        mine, theirs = _flat(recipe.to_dict()), _flat(there.to_dict())
        changed = [f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in mine if mine.get(key) != theirs.get(key)]
        raise UserError(
            f"{folder} holds an unfinished run of another recipe ({'; '.join(changed[:4])})",
            f"continue it with: robustify finetune {folder / 'recipe.yaml'} -o {folder}; or start anew with -o another folder or --force",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _write_facts(folder: Path, recipe: Recipe, command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "recipe.yaml", (f"# {command}\n" if command else "") + recipe.to_yaml())
    files.write_json(folder / "environment.json", environment("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def memory_explained(recipe: Recipe):
    """Turn running out of memory into advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text or "not enough memory" in text:
            half = max(1, recipe.train.batch_size // 2)
            raise UserError(
                f"not enough memory for batches of {recipe.train.batch_size} (evaluation: {recipe.eval.batch_size}) images",
                f"take --set train.batch_size={half} --set eval.batch_size={max(1, recipe.eval.batch_size // 2)}, "
                f"or --set train.accumulate={recipe.train.accumulate * 2} for the same result in smaller passes",
            ) from None
        raise
