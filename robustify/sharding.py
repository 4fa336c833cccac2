"""FSDP2: a training whose weights, gradients and optimiser state are split over the processes.

The split copy takes the passes that train. Beside it stands the bare network, whole on every process but without gradients
and optimiser state: attacks, probes, Upsilon and evaluation run on it, at each process's own pace, and everything that reads
or writes weights (averages, checkpoints, export) knows it alone. It is gathered from the pieces once an optimiser step,
where attacks on the pieces themselves would gather them in every forward and every backward pass.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from robustify.errors import UserError
from robustify.pixels import PixelModel
from robustify.recipe import Recipe

ROWS = (nn.Sequential, nn.ModuleList)


def check_sharded(recipe: Recipe) -> None:
    """Raise UserError with all that a recipe asks for and FSDP2 does not do, or has no use of."""
    t = recipe.train
    refused = {
        "train.layers last: the gradients of one layer are all there is to split": t.layers == "last",
        f"train.compress {t.compress}: a hook of DDP": t.compress != "none",
        "train.optimizer lamb, as timm has it: take lars, sgd or adamw": t.optimizer == "lamb",
        "train.precision fp16: take bf16": t.precision == "fp16",
        f"second derivatives (method {recipe.method.name})": getattr(recipe.method, "second_derivatives", False),
    }
    found = [what for what, asked in refused.items() if asked]
    if found:
        raise UserError(
            "FSDP2 splits weights, gradients and optimiser state over the processes, which does not go together with\n"
            + "\n".join(f"  - {what}" for what in found),
            "change that, or keep a whole copy of the training on every process: --processes N, or a config with "
            "distributed_type MULTI_GPU",
        )


def blocks(net: nn.Module) -> list[str]:
    """Names of the classes of a network's blocks: modules with parts that stand in a row, or else beside one of their class."""
    in_rows, beside = set(), set()
    for parent in net.modules():
        kinds = Counter(map(type, parent.children()))
        for child in parent.children():
            matrices = any(weight.ndim > 1 for weight in child.parameters())  # not BatchNorm with its activation
            if matrices and list(child.children()) and not isinstance(child, (*ROWS, nn.ModuleDict)):
                if isinstance(parent, ROWS):
                    in_rows.add(type(child).__name__)
                if kinds[type(child)] > 1:
                    beside.add(type(child).__name__)
    return sorted(in_rows or beside)


class SplitForward(nn.Module):
    """What is split: a copy of the model whose buffers (BatchNorm's statistics) are the model's own.

    autocast: for the passes, as accelerate gives it to what it does not split. layout: of images; FSDP2 wants the weights
    contiguous, and either sets that of the passes.
    """

    def __init__(
        self, model: PixelModel, autocast: Callable[..., AbstractContextManager[Any]], layout: torch.memory_format
    ) -> None:
        super().__init__()
        self._no_split_modules = blocks(model.net)  # accelerate's name for what is gathered as one
        self.model: PixelModel = copy.deepcopy(model, {id(buffer): buffer for buffer in model.buffers()})
        for weight in self.model.parameters():
            weight.data = weight.data.contiguous()
        self.autocast, self.layout = autocast, layout

    def forward(self, x: Tensor) -> Tensor:
        try:
            with self.autocast():
                return self.model(x.to(memory_format=self.layout))
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" in str(error):  # a part whose weights another one reads
                raise _cannot_split(error) from None
            raise


@contextmanager
def split_explained() -> Iterator[None]:
    """Raise UserError when the accelerate config splits a network where that cannot be done."""
    try:
        yield
    except ValueError as error:
        raise _cannot_split(error) from None


def _cannot_split(error: Exception) -> UserError:
    return UserError(
        f"FSDP2 cannot split this network as the accelerate config says: {str(error).splitlines()[0]}",
        "leave fsdp_auto_wrap_policy and what belongs to it out: then its blocks are split, one by one",
    )


class Shards:
    """The pieces of the weights and of the optimiser's state, as a whole and back. All processes call each method together."""

    def __init__(self, whole: PixelModel, split: nn.Module, optimizer: Any) -> None:
        """split: what accelerate made of a SplitForward. optimizer: of its weights."""
        self.optimizer = optimizer
        self._pairs: list[tuple[Tensor, Any]] = list(zip(whole.parameters(), split.parameters(), strict=True))

    @torch.no_grad()
    def gather(self) -> None:
        """Give the whole network the weights that a step has left in the pieces."""
        for whole, piece in self._pairs:
            if piece.requires_grad:
                whole.copy_(piece.full_tensor())

    @torch.no_grad()
    def scatter(self) -> None:
        """Give the pieces the weights that were put into the whole network."""
        for whole, piece in self._pairs:
            piece.copy_(_piece_of(whole, piece))

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state as one process would have it, on the CPU; so a run goes on however its weights lie then."""
        state = self.optimizer.state_dict()
        whole = {
            index: {name: _whole(value) for name, value in values.items()} for index, values in state["state"].items()
        }
        return {**state, "state": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict`, or the optimiser of a training that is not split, gave."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        split = {
            index: {
                name: _piece_of(value.to(weights[index].device), weights[index])
                if isinstance(value, Tensor) and value.shape == weights[index].shape
                else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": split})


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _piece_of(whole: Tensor, like: DTensor) -> DTensor:
    """The same values, split like another tensor; nothing is sent, as every process has them all."""
    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(whole.detach(), like.device_mesh, everywhere).redistribute(placements=like.placements)
