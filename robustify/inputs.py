"""What a run starts from: the model, checked against its published accuracy, its data, and its first weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from robustify import data as datasets
from robustify import layers
from robustify.arrays import counted_from_one
from robustify.data import Data
from robustify.distributed import World
from robustify.errors import UserError, together
from robustify.evaluation import evaluate, sample
from robustify.events import Listener, Note, Progress
from robustify.modes import borrowed
from robustify.pixels import PixelModel
from robustify.readings import others
from robustify.recipe import Recipe
from robustify.rng import mix
from robustify.sources import Checkpoint
from robustify.sources import check as check_source
from robustify.sources import load as load_source
from robustify.sources.checkpoint import agreed_license
from robustify.unlabelled import REST
from robustify.verify import verify

_WEIGHTS = 14  # first word of the seed, as in train.py
VERIFY_IMAGES = 500  # of the test set; a standard error of 1.6 points at 85 %
READ_IMAGES = 64  # that are looked at with other normalisations


def load_inputs(recipe: Recipe, listener: Listener) -> tuple[Checkpoint, Data]:
    """Return the recipe's model and data. Raises UserError when their classes do not agree."""
    m, d = recipe.model, recipe.data
    if mistakes := unknown_names(recipe):
        raise together(mistakes)
    listener(Progress("loading the model", 0, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(recipe.train.seed, _WEIGHTS))  # new classifiers and untrained networks are repeatable
        checkpoint = load_source(
            m.source,
            dataset=m.dataset,
            threat=m.threat,
            num_classes=m.num_classes,
            pretrained=m.pretrained,
            models_dir=Path(m.models_dir) if m.models_dir else None,
            allow_pickle=m.allow_pickle,
        )
    license = agreed_license(checkpoint.license, m.license, checkpoint.base_id)
    checkpoint = replace(checkpoint, license=license)
    data = datasets.load(
        d.name,
        root=Path(d.root) if d.root else None,
        val_fraction=d.val_fraction,
        seed=recipe.train.seed,
        input_size=checkpoint.input_size,
        limit=d.limit,
        progress=lambda done, total: listener(Progress("reading the data", done, total)),
    )
    if m.num_classes and data.num_classes != m.num_classes:
        message = f"--num-classes {m.num_classes}, but {d.name} has {data.num_classes} classes"
        raise UserError(message, f"--num-classes {data.num_classes}, or leave it out where the model has as many")
    if data.num_classes != checkpoint.num_classes:
        raise counted_from_one(data.train.labels, checkpoint.num_classes) or UserError(
            f"{checkpoint.base_id} has {checkpoint.num_classes} classes, {d.name} has {data.num_classes}",
            f"take data of the same classes, or put a new classifier in: --num-classes {data.num_classes}",
        )
    return checkpoint, data


def unknown_names(recipe: Recipe) -> list[UserError]:
    """Return what is wrong with the names of the model and the data, as far as it is known before anything is loaded."""
    m, d = recipe.model, recipe.data
    names = [name for name in (d.name, d.unlabelled) if name not in (None, REST)]
    found: list[UserError] = []
    for check in (partial(check_source, m.source, m.dataset, m.threat), *(partial(datasets.check_name, n) for n in names)):
        try:
            check()
        except UserError as error:
            found.append(error)
    return found


def gate(recipe: Recipe, checkpoint: Checkpoint, data: Data, world: World, tell: Listener) -> None:
    """The loaded model's clean accuracy against the published one, before anything is spent on it."""
    if not recipe.model.verify or not recipe.model.pretrained:
        why = "the weights are random" if not recipe.model.pretrained else "verify is off"
        tell(Note(f"{why}: the model's clean accuracy is not checked"))
        return
    n = min(VERIFY_IMAGES, len(data.test))
    report = evaluate(
        checkpoint.model,
        data.test,
        ["clean"],
        recipe.threat,
        n=n,
        batch_size=min(64, recipe.eval.batch_size),
        world=world,
        tell=lambda stage, done, total: tell(Progress("checking the model", done, total)),
    )
    known = checkpoint.published is not None and recipe.data.name == checkpoint.dataset

    def misread() -> str | None:
        return world.on_main(lambda: _misread(checkpoint, data, n, min(64, recipe.eval.batch_size)))

    try:
        said = verify(report.rows[0].accuracy, n, checkpoint, recipe.data.name, data.num_classes)
    except UserError as refused:
        misread()  # it may know why
        if data.class_names:
            order = ", ".join(data.class_names[:8]) + (", ..." if len(data.class_names) > 8 else "")
            raise UserError(refused.message, f"{refused.hint}; the order of the classes here: {order}") from None
        raise
    # a network that holds its published figure sees what it should
    if not known and checkpoint.replaced is None and (doubt := misread()) is not None:
        tell(Note(doubt, "warning"))
    tell(Note(said))


@torch.no_grad()
def _misread(checkpoint: Checkpoint, data: Data, n: int, batch_size: int) -> str | None:
    """Return what to say when the model would be right more often behind another normalisation; None otherwise.

    Raises UserError when it would be right more than twice as often: then it hardly sees what it was trained on.
    """
    model = checkpoint.model
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in data.test.batch(sample(len(data.test), min(n, READ_IMAGES), 0)))
    with borrowed(model):
        right = torch.cat([model(part).argmax(1) for part in x.split(batch_size)]) == y
        _, better = others(model, x, y, right, batch_size)
    if better is None:
        return None
    own = float(right.double().mean())
    doubt = (
        f"clean accuracy {own:.2%} on {len(x)} examples of {data.name}, but {better.accuracy:.2%} with the "
        f"normalisation {better} ({better.name}): {checkpoint.base_id} seems to expect that, or these images are unlike those "
        "it was trained on"
    )
    if own > better.accuracy / 2:
        return doubt
    raise UserError(
        doubt,
        f"say it behind the model's name: {better} (mean=, std= in robustify.harden); --no-verify (verify=False in Python) "
        "goes on regardless",
    )


def prepare_weights(recipe: Recipe, model: PixelModel, data: Data) -> list[str]:
    """Find the classifier where it is needed, and initialise the weights as the recipe says."""
    t = recipe.train
    classifier: list[str] = []
    if t.layers == "last" or t.init == "reinit":
        x, _ = data.test.batch([0, 1])
        classifier = layers.find_classifier(model.net, normalised(model, x.to(next(model.parameters()).device)))
    if t.init == "reinit":
        layers.reinitialise(model.net, classifier, t.seed)
    elif t.init == "noise":
        layers.add_weight_noise(model.net, t.init_noise, t.seed)
    return classifier


def normalised(model: PixelModel, x: Tensor) -> Tensor:
    """Images as the network behind the normalisation takes them."""
    return (x - model.mean) / model.std


def augmentation(recipe: Recipe, data: Data) -> str:
    """The recipe's kind of augmentation, or the one that suits the data."""
    return data.augmentation if recipe.data.augment == "auto" else recipe.data.augment
