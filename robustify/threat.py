"""The threat model, and the geometry of its ball: norms, steepest ascent, projection, uniform sampling.

All radii are in pixel units, images in [0,1]. Every tensor function works per image: the first dimension is the batch,
and a radius is a float or a tensor with one entry per image.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from robustify.errors import UserError, nearest
from robustify.rng import Draws

Norm = Literal["Linf", "L2", "L1"]
Radius = float | Tensor
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")

# Above these an image of any class can be turned into any other: the number is a slip of the unit, not a threat.
LARGEST_RADIUS = {"Linf": 1.0, "L2": 8.0, "L1": 1000.0}
EXAMPLES = "Linf:8/255, L2:0.5, W2-Linf:8/255 (Wasserstein order 2, ground norm Linf, radius 8/255)"
_SPEC = re.compile(r"^(?:W(?P<p>inf|\d+(?:\.\d+)?)-)?(?P<norm>Linf|L2|L1)[: ](?P<eps>[^\s:]+)$", re.IGNORECASE)


@dataclass(frozen=True)
class ThreatModel:
    """What the adversary may do.

    norm: ground norm of the perturbation, spelled as RobustBench spells it.
    eps:  radius in pixel units; for a distributional threat the Wasserstein radius delta.
    p:    None for the pointwise threat (every image moves by at most eps); a Wasserstein order in (1, inf] for the
          distributional one: the images may move so that E[||x'-x||^p] <= eps^p (arXiv 2306.09844, section 2).
    """

    norm: Norm
    eps: float
    p: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"unknown norm {self.norm!r}", f"norms: {', '.join(NORMS)}; a threat reads like {EXAMPLES}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(
                f"the radius must be a positive number, not {self.eps:g}", f"a threat reads like {EXAMPLES}"
            )
        if self.eps >= LARGEST_RADIUS[self.norm]:
            prefix = self.spec.rsplit(":", 1)[0]
            hint = (
                f"pixels lie in [0,1]: did you mean {prefix}:{self.eps:g}/255?"
                if self.eps <= 255
                else "pixels lie in [0,1]"
            )
            raise UserError(
                f"radius {self.eps:g} is not sane for {self.norm} (largest: {LARGEST_RADIUS[self.norm]:g})", hint
            )
        if self.p is not None and not self.p > 1:
            raise UserError(
                f"the Wasserstein order must be larger than 1, not {self.p:g}", "W2-Linf:8/255 is the usual one"
            )

    @classmethod
    def parse(cls, text: str | ThreatModel) -> ThreatModel:
        """Read `Linf:8/255`, `L2:0.5` or `W2-Linf:8/255`; a ThreatModel passes through. Raises UserError."""
        if isinstance(text, ThreatModel):
            return text
        found = _SPEC.match(str(text).strip())
        if not found:
            meant = f"Linf:{text} names the norm, too; " if isinstance(text, float | int) else ""
            name, colon, radius = str(text).partition(":")
            close = nearest(name, [f"{order}{norm}" for norm in NORMS for order in ("", "W2-")]) if colon else ""
            hint = f"{meant}a threat reads like {EXAMPLES}"
            raise UserError(f"cannot read the threat {text!r}.{close.replace('?', f':{radius}?')}".removesuffix("."), hint)
        norm: Norm = next(n for n in NORMS if n.lower() == found["norm"].lower())
        return cls(norm, read_number(found["eps"]), float(found["p"]) if found["p"] else None)

    @property
    def distributional(self) -> bool:
        return self.p is not None

    @property
    def spec(self) -> str:
        """The text that `parse` reads back, exactly."""
        return f"{_order(self.p)}{self.norm}:{_radius(self.eps)}"

    def pointwise(self) -> ThreatModel:
        """The pointwise threat of the same norm and radius."""
        return ThreatModel(self.norm, self.eps)

    def __str__(self) -> str:
        return self.spec.replace(":", " ")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def read(value: Any) -> ThreatModel:
            try:
                return cls.parse(value)
            except UserError as error:
                raise ValueError(str(error)) from None

        spec = core_schema.plain_serializer_function_ser_schema(lambda threat: threat.spec)
        return core_schema.no_info_plain_validator_function(read, serialization=spec)


def read_number(text: str | float) -> float:
    """Read `8/255` or `0.5`. Raises UserError for anything else."""
    try:
        top, _, bottom = str(text).partition("/")
        return float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"cannot read the number {text!r}", "write 8/255 or 0.031") from None


def _order(p: float | None) -> str:
    return "" if p is None else f"W{'inf' if math.isinf(p) else f'{p:g}'}-"


def _radius(eps: float) -> str:
    steps = round(eps * 255)
    if eps < 1 and steps / 255 == eps:
        return f"{steps}/255"
    return f"{eps:g}" if float(f"{eps:g}") == eps else repr(eps)


@overload
def per_image(values: Tensor, x: Tensor) -> Tensor: ...
@overload
def per_image(values: float, x: Tensor) -> float: ...
def per_image(values: Radius, x: Tensor) -> Radius:
    """Shape one value per image, [N], so that it broadcasts over x, [N, ...]; a float passes through."""
    return values.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(values, Tensor) else values


def norms(d: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each image's perturbation, [N]."""
    flat = d.flatten(1)
    if norm == "Linf":
        return flat.abs().amax(1)
    return flat.norm(dim=1) if norm == "L2" else flat.abs().sum(1)


def dual_norms(g: Tensor, norm: Norm) -> Tensor:
    """Return each gradient's norm dual to `norm`, [N]: the slope of the loss along `steepest`."""
    duals: dict[Norm, Norm] = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
    return norms(g, duals[norm])


def steepest(g: Tensor, norm: Norm) -> Tensor:
    """Return the direction of unit norm in which a linear function with gradient g rises fastest; 0 where g is 0."""
    if norm == "Linf":
        return g.sign()
    if norm == "L2":
        length = g.flatten(1).norm(dim=1)
        return g * per_image(torch.where(length > 0, 1 / length, 0.0), g)
    flat = g.flatten(1)
    top = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign()).view_as(g)


def sparse_steepest(g: Tensor, share: float) -> Tensor:
    """Return the direction of unit L1 norm that moves the largest `share` of the coordinates alike (Tramer and Boneh,
    NeurIPS 2019, arXiv 1904.13000, section 4); at least one."""
    flat = g.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    top = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign() / count).view_as(g)


def project(d: Tensor, norm: Norm, radius: Radius) -> Tensor:
    """Return the Euclidean projection of each perturbation onto the ball of that radius; the inside stays as it is."""
    r = per_image(radius, d)
    if norm == "Linf":
        return torch.minimum(torch.maximum(d, -r), r) if isinstance(r, Tensor) else d.clamp(-r, r)
    if norm == "L2":
        length = per_image(norms(d, "L2"), d)
        return d * torch.where(length > r, r / length.clamp_min(torch.finfo(d.dtype).tiny), 1.0)
    return _project_l1(d, radius)


def _project_l1(d: Tensor, radius: Radius) -> Tensor:
    """Projection onto the L1 ball by sorting (Duchi et al., ICML 2008, figure 1)."""
    flat = d.flatten(1)
    r = radius.reshape(-1, 1) if isinstance(radius, Tensor) else torch.full_like(flat[:, :1], radius)
    size = flat.abs()
    ordered, _ = size.sort(1, descending=True)
    surplus = ordered.cumsum(1) - r
    rank = torch.arange(1, flat.shape[1] + 1, device=d.device, dtype=d.dtype)
    kept = (ordered * rank > surplus).sum(1, keepdim=True).clamp_min(1)
    threshold = (surplus.gather(1, kept - 1) / kept).clamp_min(0)
    inside = size.sum(1, keepdim=True) <= r
    return torch.where(inside, flat, flat.sign() * (size - threshold).clamp_min(0)).view_as(d)


def uniform_in_ball(x: Tensor, norm: Norm, radius: Radius, draws: Draws) -> Tensor:
    """Return a perturbation for each image of x, uniform in the ball of that radius. x gives shape, type and device."""
    dimension = x[0].numel()
    if norm == "Linf":
        return (2 * draws.uniform(x) - 1) * per_image(radius, x)
    if norm == "L2":
        direction = steepest(draws.normal(x), "L2")
    else:  # exponential magnitudes with random signs, divided by their sum, are uniform on the L1 sphere
        u = 2 * draws.uniform(x) - 1
        magnitude = -torch.log1p(-u.abs().clamp_max(1 - 1e-7))
        direction = u.sign() * magnitude / per_image(magnitude.flatten(1).sum(1), x)
    scale = draws.uniform_per_image(x) ** (1 / dimension)
    return direction * per_image(scale * radius, x)
