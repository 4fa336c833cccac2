"""Running out of memory, turned into advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustify.errors import UserError
from robustify.recipe import Recipe


@contextmanager
def memory_explained(recipe: Recipe) -> Iterator[None]:
    """Raise UserError, with the batch sizes that would do, when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if (
            isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in text
            or "not enough memory" in text
        ):
            half = max(1, recipe.train.batch_size // 2)
            raise UserError(
                f"not enough memory for batches of {recipe.train.batch_size} (evaluation: {recipe.eval.batch_size}) images",
                f"take --set train.batch_size={half} --set eval.batch_size={max(1, recipe.eval.batch_size // 2)}, "
                f"or --set train.accumulate={recipe.train.accumulate * 2} for nearly the same in smaller passes "
                "(BatchNorm sees smaller batches)",
            ) from None
        raise
