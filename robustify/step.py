"""One optimiser step, for every method: attack, forwards, backwards, update.

Here live precision, accumulation and the processes; a method only says what to attack with and what to minimise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robustify.augment import augment
from robustify.awp import same_statistics, uphill
from robustify.batchnorm import Synchronised
from robustify.compression import GradientHook
from robustify.distributed import World
from robustify.errors import UserError
from robustify.methods import Gaat
from robustify.methods.base import Method, OwnStep, Passes, Penalised, State, replays
from robustify.modes import Nets, Shadow, borrowed
from robustify.pixels import PixelModel, own_memory
from robustify.recipe import TrainSettings
from robustify.rng import Draws, mix
from robustify.sharding import Shards, SplitForward, split_explained
from robustify.threat import ThreatModel
from robustify.unlabelled import with_predictions

_STEP, _DROPOUT = 12, 17  # first words of the seeds, as in train.py
OPTIMIZERS = {"sgd": "momentum", "adamw": "adamw", "lamb": "lamb", "lars": "lars"}  # timm's "sgd" is Nesterov's


@dataclass
class Setup:
    """All that a training step needs. forward: what DDP, or FSDP2, and autocast wrap; model: the bare network, for the attack.
    shards: of a training that is split by FSDP2, whose forward is a split copy of the model."""

    model: PixelModel
    forward: nn.Module
    optimizer: Any
    accelerator: Accelerator
    world: World
    method: Method | OwnStep
    threat: ThreatModel
    settings: TrainSettings
    augmentation: str
    tracker: State | None
    shadow: Shadow | None
    ema: Any | None
    shards: Shards | None
    hook: GradientHook | None = None
    exchanges: int = 0  # backward passes so far that ended in an exchange of gradients


class _Forward(nn.Module):
    """What accelerate may wrap and patch: the bare model under it stays as it is, for the attack in full precision."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def prepare(
    model: PixelModel,
    method: Method | OwnStep,
    threat: ThreatModel,
    settings: TrainSettings,
    accelerator: Accelerator,
    augmentation: str,
    images: int,
) -> Setup:
    """Build optimiser, shadow, average and Upsilon's state around a model whose requires_grad flags are set.

    images: size of the training set.
    """
    from timm.optim import create_optimizer_v2

    world = World(accelerator)
    model.to(accelerator.device)
    own_memory(model)
    reduced = settings.precision != "no"
    if reduced:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    layout = torch.channels_last if reduced else torch.contiguous_format
    forward = SplitForward(model, accelerator.autocast, layout) if world.sharded else _Forward(model)
    optimizer = create_optimizer_v2(
        forward.model,
        OPTIMIZERS[settings.optimizer],
        lr=settings.rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        **_layerwise(settings),
    )
    with split_explained() if world.sharded else nullcontext():
        forward, optimizer = accelerator.prepare(forward, optimizer)
    tracker = method.tracker(threat, images)
    if tracker is not None:
        tracker.gather = world.gather
    ema = None
    if settings.ema is not None:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=settings.ema)
    return Setup(
        model,
        forward,
        optimizer,
        accelerator,
        world,
        method,
        threat,
        settings,
        augmentation,
        tracker,
        Shadow(model) if reduced else None,
        ema,
        Shards(model, forward, optimizer) if world.sharded else None,
    )


def check_derivatives(method: Method | OwnStep, settings: TrainSettings, model: nn.Module) -> None:
    """Raise UserError when the method differentiates the model more often than torch can."""
    third = isinstance(method, Gaat) and method.second_derivatives and method.order == 2
    live = settings.batchnorm != "frozen" and settings.layers != "last"
    if third and live and _normalised_by_batch(model):
        raise UserError(
            "gaat with gradient exact and order 2 needs third derivatives, which torch's batch norm has not while it trains",
            "take --set method.gradient=hessian-free, --set method.order=1 or --set train.batchnorm=frozen "
            '(method={"name": "gaat", "order": 1} or batchnorm="frozen" in Python)',
        )


def _layerwise(settings: TrainSettings) -> dict[str, Any]:
    """What only the layer-wise optimisers take. clip_norm is the one limit on gradients, so LAMB's own is switched off."""
    if settings.optimizer not in ("lamb", "lars"):
        return {}
    return {"trust_clip": settings.trust_clip, **({"max_grad_norm": math.inf} if settings.optimizer == "lamb" else {})}


def set_train_mode(setup: Setup) -> None:
    """Training mode, but for BatchNorm whose statistics are to stay: with only the last layer training they must."""
    setup.forward.train()
    if setup.settings.batchnorm == "frozen" or setup.settings.layers == "last":
        for module in _normalised_by_batch(setup.forward):
            module.eval()


def share_statistics(setup: Setup) -> None:
    """BatchNorm's statistics drift apart between processes; when an epoch ends all take their mean."""
    for model in filter(None, (setup.model, setup.ema and setup.ema.module)):
        setup.world.average_buffers(model)


def _normalised_by_batch(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def take_step(setup: Setup, micro_batches: Iterator[tuple[Tensor, Tensor]], step: int) -> tuple[dict[str, float], int]:
    """One optimiser step from `accumulate` micro-batches. Returns (its losses, over all processes; images seen here).

    The losses include `total`. Does not update when the total is not finite; the caller stops the run.
    """
    s, world = setup.settings, setup.world
    torch.manual_seed(mix(s.seed, _DROPOUT, step, world.rank))  # of dropout and drop-path, drawn by each process
    nets = Nets(setup.model, setup.shadow.model if setup.shadow else setup.model)
    if setup.hook:
        setup.hook.begin(step)
    parts = [_attacked(setup, nets, *next(micro_batches), step, k) for k in range(s.accumulate)]
    if s.awp is None:
        sums = _backward(setup, nets, parts, step)
    else:
        with same_statistics(setup.model):
            _backward(setup, nets, parts, step)
        with uphill(setup.forward, s.awp):
            sums = _backward(setup, nets, parts, step)
    means = world.sum(torch.stack(list(sums.values()))) / world.size
    losses = dict(zip(sums, means.tolist(), strict=True))
    if math.isfinite(losses["total"]):
        if s.clip_norm is not None:
            setup.accelerator.clip_grad_norm_(setup.forward.parameters(), s.clip_norm)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        if setup.shards:
            setup.shards.gather()
        if setup.shadow:
            setup.shadow.refresh()
        if setup.ema:
            setup.ema.update(setup.model)
    return losses, sum(len(part.y) for part in parts)


@dataclass(frozen=True)
class _Part:
    """A micro-batch, ready to train on. x_adv: None where the method attacks within its own step."""

    x: Tensor
    x_adv: Tensor | None
    y: Tensor
    draws: Draws


def _attacked(setup: Setup, nets: Nets, x: Tensor, y: Tensor, step: int, k: int) -> _Part:
    """Augment and attack the k-th micro-batch of a step."""
    s, method = setup.settings, setup.method
    whole = s.batch_size // s.accumulate
    seed = mix(s.seed, _STEP, step // replays(method), k)
    draws = Draws(seed, x.device, whole, setup.world.rows(whole).start)
    x = augment(x, setup.augmentation, draws)
    if isinstance(method, OwnStep):
        return _Part(x, None, y, draws)
    with setup.world.working(), borrowed(setup.model):
        x_adv = method.perturb(nets, x, with_predictions(nets.exact, x, y), setup.threat, draws, setup.tracker)
    if setup.tracker:
        setup.tracker.update()
    return _Part(x, x_adv, y, draws)


def _backward(setup: Setup, nets: Nets, parts: list[_Part], step: int) -> dict[str, Tensor]:
    """Put the gradient of the micro-batches' mean loss into the weights. Returns the loss and its parts, by name."""
    count, method = len(parts), setup.method
    sums: dict[str, Tensor] = {}

    def backward(loss: Tensor) -> None:
        setup.exchanges += exchange
        setup.accelerator.backward(loss / count)

    statistics = Synchronised() if setup.settings.batchnorm == "sync" and setup.world.size > 1 else nullcontext()
    for k, part in enumerate(parts):
        x, y = part.x, part.y
        exchange = k + 1 == count or setup.shards is not None  # until then gradients lie whole on every process
        with statistics, nullcontext() if exchange else setup.accelerator.no_sync(setup.forward):
            if isinstance(method, OwnStep):
                passes = Passes(setup.forward, backward, nets, step)
                total, named = method.step(passes, x, y, setup.threat, part.draws, setup.tracker)
                if setup.tracker:
                    setup.tracker.update()
            else:
                assert part.x_adv is not None
                logits = setup.forward(x) if method.needs_clean else None
                logits_adv = setup.forward(part.x_adv)
                total, named = method.loss(logits, logits_adv, y)
                if isinstance(method, Penalised):
                    terms = method.penalty(setup.forward, x, y, setup.threat, part.draws)
                    total, named = sum(terms.values(), total), named | terms
                backward(total)
        for name, value in {"total": total, **named}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() / count
    return sums
