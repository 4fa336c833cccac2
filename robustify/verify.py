"""The clean-accuracy gate: is this the model that its publisher measured, behind the right normalisation?"""
from __future__ import annotations

import math

from robustify.errors import UserError
from robustify.sources.checkpoint import Checkpoint

SIGMAS = 2.6  # a correct model fails the gate by bad luck less than once in two hundred times
MARGIN = 0.01  # differences of preprocessing and precision that mean nothing
OTHER_DATA = 0.25  # on data it was not trained for a model may lose this much
CAUSES = (
    "likely causes: the normalisation applied twice or not at all, another order of the classes, the wrong weight file;"
    " --no-verify (verify=False in Python) goes on regardless"
)


def verify(clean_accuracy: float, n: int, checkpoint: Checkpoint, data_name: str, num_classes: int) -> str:
    """Return one line that says what was checked. Raises UserError when the model is not what it claims to be.

    clean_accuracy: the fraction right, in [0,1], of n examples of the data set `data_name` with `num_classes` classes.
    """
    measured = f"clean accuracy {clean_accuracy:.2%} on {n} examples of {data_name}"
    chance = 1 / num_classes
    if not checkpoint.pretrained or checkpoint.num_classes != num_classes:
        return f"{measured}; nothing to compare with, because the classifier is new"
    published = float(checkpoint.published["clean_acc"]) / 100 if checkpoint.published else None
    if published is not None and data_name == checkpoint.dataset:
        allowed = _sampling_error(published, n) + MARGIN
        if clean_accuracy < published - allowed:
            raise UserError(f"{measured}, but {checkpoint.base_id} is published with {published:.2%}", CAUSES)
        return f"{measured}, published {published:.2%} (allowed difference {allowed:.2%})"
    if published is not None and clean_accuracy < published - OTHER_DATA - _sampling_error(published, n):
        there = f"{published:.2%} that {checkpoint.base_id} has on {checkpoint.dataset}"
        raise UserError(f"{measured}, far below the {there}", CAUSES)
    if clean_accuracy <= chance + _sampling_error(chance, n):
        raise UserError(f"{measured} is no better than chance ({chance:.2%})", CAUSES)
    if published is not None:
        return f"{measured}, published {published:.2%} on {checkpoint.dataset}"
    return f"{measured}, better than chance ({chance:.2%}); no published figure to compare with"


def _sampling_error(p: float, n: int) -> float:
    return SIGMAS * math.sqrt(p * (1 - p) / n)
