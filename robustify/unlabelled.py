"""Images without labels, the two ways of DAT (arXiv 2206.06257): pseudo-labels from the loaded network, or the consistency
term alone, KL(f(x) || f(x')), which asks for no label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robustify import data as datasets
from robustify.data import Data, Split, batches, subset
from robustify.distributed import World
from robustify.errors import UserError
from robustify.events import Listener, Note, Progress
from robustify.modes import borrowed
from robustify.recipe import Recipe

NONE = -1  # the label of an image without one
REST = "rest"


def read_pool(recipe: Recipe, data: Data) -> Split:
    """Return the recipe's unlabelled images, each with the label NONE. Raises UserError when there are none."""
    d = recipe.data
    assert d.unlabelled is not None
    if d.unlabelled == REST:
        if data.rest is None or not len(data.rest):
            raise UserError(
                f"unlabelled: rest are the training images that data.limit leaves out, and it leaves none of {d.name} out",
                "--set data.limit=1000, or name other data",
            )
        pool = data.rest
    elif d.unlabelled == d.name:
        raise UserError(
            f"the unlabelled images would be those of {d.name} again, its held-out ones among them",
            "take --unlabelled rest",
        )
    else:
        pool = datasets.images_of(d.unlabelled, Path(d.root) if d.root else None, data.input_size)
    return replace(pool, labels=torch.full_like(pool.labels, NONE))


def pseudo_labelled(
    recipe: Recipe,
    model: nn.Module,
    pool: Split,
    num_classes: int,
    world: World,
    device: torch.device,
    tell: Listener,
) -> Split:
    """Return the images whose most probable class the network gives at least the recipe's confidence, with that label.

    Sharded over the processes, in full precision. Raises UserError when no image is left.
    """
    least, size = recipe.data.unlabelled_confidence, recipe.eval.batch_size
    mine = range(len(pool))[world.rows(len(pool))]
    lists = [mine[i : i + size] for i in range(0, len(mine), size)]
    found = [torch.zeros(0, 2, dtype=torch.float64)]
    with borrowed(model), torch.no_grad():
        for done, (x, _) in enumerate(batches(pool, lists, device, recipe.data.workers)):
            tell(Progress("labelling the unlabelled", done, len(lists)))
            confidence, label = model(x).double().softmax(1).max(1)
            found.append(torch.stack([confidence, label.double()], 1).cpu())
    confidence, label = world.gather(torch.cat(found)).unbind(1)
    kept = (confidence >= least).nonzero()[:, 0]
    if not len(kept):
        raise UserError(
            f"the network is not {least:g} sure of any of the {len(pool)} unlabelled images (at most {confidence.max():.3f})",
            "lower --set data.unlabelled_confidence, or take --set data.unlabelled_as=consistency",
        )
    counts = torch.bincount(label[kept].long(), minlength=num_classes).tolist()
    tell(
        Note(
            f"{len(kept)} of {len(pool)} unlabelled images have a pseudo-label of confidence {least:g} or more, "
            f"{min(counts)} to {max(counts)} a class"
        )
    )
    return replace(subset(pool, kept), labels=label[kept].long())


def with_predictions(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return y, [N], with the network's own answer where there is no label: what an attack on such an image starts from.

    One forward pass of these images, and only in batches that have some.
    """
    blank = y == NONE
    if not bool(blank.any()):
        return y
    with torch.no_grad():
        return y.masked_scatter(blank, model(x[blank]).argmax(1))
