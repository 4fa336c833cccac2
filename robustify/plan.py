"""The plan of a run: everything loaded and checked, one step timed, nothing written."""

from __future__ import annotations

import copy
import time
from typing import Any

from robustify import layers
from robustify.data import Data
from robustify.distributed import World, make_accelerator
from robustify.durations import duration
from robustify.evaluation import rows_of
from robustify.events import Listener
from robustify.gradients import gradient_norms
from robustify.inputs import augmentation, gate, load_inputs, normalised, prepare_weights
from robustify.memory import memory_explained
from robustify.methods import withstood
from robustify.methods.base import replays
from robustify.order import check_batch, epoch_lists, labelled_of
from robustify.pixels import PixelModel
from robustify.recipe import Recipe
from robustify.sensitivity import UpsilonTracker
from robustify.sources import Checkpoint
from robustify.splits import resized
from robustify.step import check_derivatives, prepare, set_train_mode, take_step
from robustify.train import check_held_out
from robustify.unlabelled import read_pool


def plan(recipe: Recipe, *, processes: int = 1, listener: Listener | None = None) -> dict[str, Any]:
    """Load everything, check it, run one batch and return the plan: what `--dry-run` prints. Writes nothing.

    processes: that the run is to have; the batch is run on this one.
    """
    listener = listener or (lambda event: None)
    accelerator = make_accelerator(recipe.train.precision)
    with memory_explained(recipe):
        checkpoint, data = load_inputs(recipe, listener)
        check_run(recipe, checkpoint.model, data, max(processes, World(accelerator).size))
        pool = read_pool(recipe, data) if recipe.data.unlabelled else None
        gate(recipe, checkpoint, data, World(accelerator), listener)
        facts = planned(recipe, checkpoint, data)
        if pool is not None:
            facts["unlabelled"] = f"{len(pool)} images; with pseudo-labels those that the network is sure of"
        return facts | _time_one_step(recipe, checkpoint, data, accelerator)


def check_run(recipe: Recipe, model: PixelModel, data: Data, processes: int) -> None:
    """Raise UserError, before anything is measured, when such a run cannot be measured or trained."""
    rows_of(recipe.eval.attacks, withstood(recipe.method, recipe.threat), data.test.shape[1:])
    check_held_out(recipe.train, data.val)
    check_batch(recipe, len(data.train), processes)
    check_derivatives(recipe.method, recipe.train, model)


def planned(recipe: Recipe, checkpoint: Checkpoint, data: Data) -> dict[str, Any]:
    """The facts of a run before it starts: what trains, on what, at what cost in passes."""
    net = checkpoint.model.net
    x, _ = data.test.batch([0, 1])
    classifier = layers.find_classifier(net, normalised(checkpoint.model, x)) if recipe.train.layers == "last" else []
    flags = [(w, w.requires_grad) for w in net.parameters()]
    chosen = layers.select(net, recipe.train.layers, classifier)
    for weight, flag in flags:
        weight.requires_grad_(flag)
    steps, epochs = len(data.train) // labelled_of(recipe) * replays(recipe.method), recipe.train.epochs
    forward, image, weights = passes_per_image(recipe)
    return {
        "model": checkpoint.base_id,
        "architecture": checkpoint.arch,
        "images": _images(checkpoint),
        "new classifier": f"for {checkpoint.num_classes} classes, random; it had {checkpoint.replaced}"
        if checkpoint.replaced
        else None,
        "license": checkpoint.license or "unknown",
        "data": f"{data.name}: {len(data.train)} train, {len(data.val)} held out, {len(data.test)} {data.test_name}"
        + (f"; {other}" if (other := resized(data.test)) else ""),
        "threat": recipe.threat.spec,
        "method": recipe.method.name,
        "trains": f"{recipe.train.layers}: {chosen.trainable:,} of {chosen.total:,} parameters",
        "classifier": ", ".join(classifier) or None,
        "steps": f"{steps} per epoch, {steps * epochs} in {epochs} epochs of batch {recipe.train.batch_size}",
        # a backward pass to the input costs about 1.2 forward passes, one to the weights about 2.6 (docs/speed.md)
        "passes per step": f"{forward + 1.2 * image + 2.6 * weights:.1f} forward passes of the batch",
    }


def passes_per_image(recipe: Recipe) -> tuple[float, float, float]:
    """Forward passes, backward passes to the input and backward passes to the weights that a step spends on each image.

    A method's cost is linear in them, so each kind is found by pricing it alone. Adversarial weight perturbation takes
    the passes that train, a forward and a backward one, twice.
    """
    cost = recipe.method.passes
    forward = cost(0, 0)
    image, weights = cost(1, 0) - forward, cost(0, 1) - forward
    again = weights if recipe.train.awp else 0.0
    return forward + again, image, weights + again


def _images(checkpoint: Checkpoint) -> str:
    """What goes into the network: the size of its images and their normalisation."""
    model = checkpoint.model
    size = " x ".join(map(str, checkpoint.input_size))
    if not model.normalises:
        return f"{size}, [0,1] as it is"
    mean, std = (", ".join(f"{v:.4g}" for v in values.flatten().tolist()) for values in (model.mean, model.std))
    return f"{size}, normalised with mean {mean} and standard deviation {std}"


def _time_one_step(recipe: Recipe, checkpoint: Checkpoint, data: Data, accelerator: Any) -> dict[str, Any]:
    """Run one real training step on a copy and project the run's time from it.

    On a GPU the whole batch, to see that it fits; on a CPU, where time is proportional to the images, 16 of them.
    """
    model = copy.deepcopy(checkpoint.model).to(accelerator.device)
    layers.select(model.net, recipe.train.layers, prepare_weights(recipe, model, data))
    batch = min(len(data.train), recipe.train.batch_size)
    n = batch if accelerator.device.type == "cuda" else min(batch, 16)
    settings = recipe.train.model_copy(update={"batch_size": n, "accumulate": 1})
    setup = prepare(
        model, recipe.method, recipe.threat, settings, accelerator, augmentation(recipe, data), len(data.train)
    )
    set_train_mode(setup)
    first = epoch_lists(len(data.train), 0, settings, World(), n, 1)[0]
    x, y = (part.to(accelerator.device) for part in data.train.batch(first))
    if isinstance(setup.tracker, UpsilonTracker):  # the run measures it on more images
        objective = recipe.method.adversary.objective  # pyright: ignore[reportAttributeAccessIssue]
        setup.tracker.measure(gradient_norms(model, [(x, y)], objective, recipe.threat.norm), n)
    begin = time.perf_counter()
    losses, _ = take_step(setup, iter([(x, y)]), 0)
    took = (time.perf_counter() - begin) * batch / n
    steps = len(data.train) // labelled_of(recipe) * replays(recipe.method) * recipe.train.epochs
    return {
        "one step": f"{took:.2f} s for a batch of {batch}, from its first {n}; loss {losses['total']:.4g} on them",
        "training time": f"about {duration(took * steps)} on one process, without evaluation",
        "not included": "what several processes exchange, and the speed that they bring",
    }
