"""METHODS names every training method; each is one file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from robustify.methods.base import Method, OwnStep
from robustify.methods.fast_at import FastAt
from robustify.methods.free_at import FreeAt
from robustify.methods.gaat import Gaat
from robustify.methods.mart import Mart
from robustify.methods.multi_norm import MultiNorm
from robustify.methods.pgd_at import PgdAt
from robustify.methods.standard import Standard
from robustify.methods.trades import Trades
from robustify.methods.wasserstein import Wasserstein
from robustify.threat import ThreatModel

AnyMethod = Annotated[
    Wasserstein | Trades | Mart | PgdAt | FastAt | FreeAt | Gaat | MultiNorm | Standard,
    Field(discriminator="name")
]
METHODS = {
    cls.model_fields["name"].default: cls
    for cls in (Wasserstein, Trades, Mart, PgdAt, FastAt, FreeAt, Gaat, MultiNorm, Standard)
}


def has_consistency(method: Method | OwnStep) -> bool:
    """Whether the method's loss has a term that asks for no label, KL(f(x) || f(x'))."""
    return isinstance(method, (Trades, Wasserstein))


def withstood(method: Method | OwnStep, threat: ThreatModel) -> tuple[ThreatModel, ...]:
    """The threats that a run's model is trained to withstand and measured under: the run's, and multi-norm's own."""
    return method.threats if isinstance(method, MultiNorm) else (threat,)
