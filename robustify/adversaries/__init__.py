"""ADVERSARIES names every distributional adversary of the training; each is one file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from robustify.adversaries.batch import Batch
from robustify.adversaries.budget import Budget
from robustify.adversaries.dual import Dual
from robustify.adversaries.knapsack import Knapsack
from robustify.adversaries.random_radius import RandomRadius

ADVERSARIES = {cls.model_fields["name"].default: cls for cls in (Budget, Batch, Dual, Knapsack, RandomRadius)}
AnyAdversary = Annotated[Budget | Batch | Dual | Knapsack | RandomRadius, Field(discriminator="name")]
