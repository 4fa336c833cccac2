"""What every training method is: a frozen description with two pure steps, and the two ways to need more than that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from robustify.modes import Nets
from robustify.rng import Draws
from robustify.threat import Norm, ThreatModel


class State(Protocol):
    """What a method remembers from step to step. Saved with every checkpoint.

    gather: concatenates a tensor over the processes; the loop sets it.
    """

    gather: Callable[[Tensor], Tensor]

    def update(self) -> None:
        """Exchange with the other processes what the attack has noted; called after it, on every process."""
        ...

    def summary(self) -> dict[str, float]:
        """What to log of an epoch that has ended."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Described(Protocol):
    """What is known of every method before it runs.

    adversarial: it trains against an adversary; the best epoch is then the most robust one, else the most accurate.
    distributional: it trains against a Wasserstein threat. one_step: its adversary is a single step, so catastrophic
    overfitting is watched. passes(bins, bws): cost of one step in forward passes, given the cost of a backward pass to the
    input and to the weights.
    """

    @property
    def name(self) -> str: ...

    summary: ClassVar[str]
    paper: ClassVar[str]
    adversarial: ClassVar[bool]
    distributional: ClassVar[bool]
    one_step: ClassVar[bool]
    norms: ClassVar[tuple[Norm, ...]]

    def tracker(self, threat: ThreatModel, population: int) -> State | None:
        """The state that the method keeps from step to step, or None."""
        ...

    def passes(self, bins: float, bws: float) -> float: ...


class Method(Described, Protocol):
    """The loop owns forwards, precision, accumulation and processes; a method says what to attack with and what to minimise.

    needs_clean: the loss wants the logits of the unperturbed images too (a second training forward).
    """

    needs_clean: ClassVar[bool]

    def perturb(self, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any) -> Tensor:
        """Return the images to train on, [N, ...] in [0,1]. The nets are borrowed: eval mode, frozen weights."""
        ...

    def loss(self, logits: Tensor | None, logits_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the scalar to minimise, its named parts for the log)."""
        ...


@runtime_checkable
class Penalised(Protocol):
    """A Method whose loss has a term with forward passes of its own, such as one on input gradients."""

    def penalty(
        self, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws
    ) -> dict[str, Tensor]:
        """Return named scalars to add to the loss; none when the term is switched off. forward: the training forward."""
        ...


@dataclass(frozen=True)
class Passes:
    """The passes that a method with its own step may spend.

    forward: the training forward. backward: adds the weights' gradients of a scalar, and those of images that ask for
    them. nets: for a search; borrow nets.exact around it. step: number of the optimiser step, from 0.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], None]
    nets: Nets
    step: int


@runtime_checkable
class OwnStep(Described, Protocol):
    """A method that neither perturb nor loss can express: its backward passes serve attack and training at once.

    replays: optimiser steps in a row on the same batch.
    """

    @property
    def replays(self) -> int: ...

    def step(
        self, passes: Passes, x: Tensor, y: Tensor, threat: ThreatModel, draws: Draws, tracker: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Spend the passes. Returns (the loss whose gradient now lies in the weights, its named parts), for the log."""
        ...


def replays(method: Method | OwnStep) -> int:
    """How many optimiser steps in a row the method takes on every batch."""
    return method.replays if isinstance(method, OwnStep) else 1
