"""Running out of memory, turned into advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from robustify.errors import UserError
from robustify.recipe import Recipe


def memory_explained(recipe: Recipe) -> AbstractContextManager[None]:
    """Raise UserError, with the batch sizes that would do, when the block runs out of memory: of a run."""
    t, e = recipe.train, recipe.eval
    return _explained(
        f"batches of {t.batch_size} (evaluation: {e.batch_size}) images",
        f"take --set train.batch_size={max(1, t.batch_size // 2)} --set eval.batch_size={max(1, e.batch_size // 2)}, "
        f"or --set train.accumulate={t.accumulate * 2} for nearly the same in smaller passes "
        "(BatchNorm sees smaller batches); in robustify.harden: batch_size, n and accumulate",
    )


def batches_explained(batch_size: int) -> AbstractContextManager[None]:
    """The same of a measurement alone."""
    return _explained(f"batches of {batch_size} images", f"take --batch-size {max(1, batch_size // 2)}")


@contextmanager
def _explained(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if (
            isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in text
            or "not enough memory" in text
        ):
            raise UserError(f"not enough memory for {what}", hint) from None
        raise
