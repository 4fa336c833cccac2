"""The same network in timm: what was built for RobustBench then loads with timm alone.

Only where it truly is the same: every tensor has the same name and shape, and the logits agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustify.pixels import PixelModel

# torchvision's ResNets, whose tensors timm names alike: blocks per stage, expansion, groups, width
RESNETS: dict[tuple[Any, ...], str] = {
    ((2, 2, 2, 2), 1, 1, 64): "resnet18",
    ((3, 4, 6, 3), 1, 1, 64): "resnet34",
    ((3, 4, 6, 3), 4, 1, 64): "resnet50",
    ((3, 4, 23, 3), 4, 1, 64): "resnet101",
    ((3, 8, 36, 3), 4, 1, 64): "resnet152",
    ((3, 4, 6, 3), 4, 1, 128): "wide_resnet50_2",
    ((3, 4, 23, 3), 4, 1, 128): "wide_resnet101_2",
    ((3, 4, 6, 3), 4, 32, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), 4, 32, 8): "resnext101_32x8d",
}
# what RobustBench registers with timm under names of its own: timm's name for the same network, and its arguments
REGISTERED: dict[str, tuple[str, dict[str, Any]]] = {
    "debenedetti2022light_xcit_s12_imagenet_linf": ("xcit_small_12_p16_224", {}),
    "debenedetti2022light_xcit_m12_imagenet_linf": ("xcit_small_12_p16_224", {"embed_dim": 512}),
    "debenedetti2022light_xcit_l12_imagenet_linf": ("xcit_small_12_p16_224", {"embed_dim": 768, "num_heads": 16}),
    "tian2022deeper_deit_s_imagenet_corruptions": ("deit_small_patch16_224", {}),
    "tian2022deeper_deit_b_imagenet_corruptions": ("deit_base_patch16_224", {}),
}
OURS = ("robustbench_", "robustify_")  # architectures that need `import robustify`
CLOSE = 1e-5  # of the largest logit: what another order of the same sums changes


@dataclass(frozen=True)
class Equivalent:
    """model: what `timm.create_model(arch, num_classes=..., **arch_args)` builds, behind the same normalisation."""

    arch: str
    arch_args: dict[str, Any]
    model: PixelModel


@torch.no_grad()
def in_timm(model: PixelModel, x: Tensor) -> Equivalent | None:
    """Return timm's network with the same weights and logits as `model`, or None when timm has none.

    model: on the CPU, in eval mode. x: images in [0,1], [N, C, H, W], on which the logits are compared.
    """
    import timm

    net, mean, std = _inside(model)
    logits = model(x)
    state = net.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    if (name := _name(net)) is None:
        return None
    arch, arguments = name
    built = timm.create_model(arch, num_classes=logits.shape[1], **arguments)
    if {name: value.shape for name, value in built.state_dict().items()} != shapes:
        return None
    built.load_state_dict(state)
    found = PixelModel(built, mean, std).eval()
    gap = (found(x) - logits).abs().max()
    return Equivalent(arch, arguments, found) if gap <= CLOSE * logits.abs().max() else None


def _inside(model: PixelModel) -> tuple[nn.Module, list[float], list[float]]:
    """The network behind RobustBench's normalisation layer, and mean and std; else the network, mean and std it has."""
    children = dict(model.net.named_children())
    layer: Any = children.get("normalize")
    if not model.normalises and isinstance(model.net, nn.Sequential) and list(children) == ["normalize", "model"]:
        return children["model"], _numbers(layer.mean), _numbers(layer.std)
    return model.net, _numbers(model.mean), _numbers(model.std)


def _numbers(values: Tensor) -> list[float]:
    return values.flatten().tolist()


def _name(net: Any) -> tuple[str, dict[str, Any]] | None:
    """Timm's architecture, with its arguments, that this network must be if it is one of timm's."""
    import timm

    module = type(net).__module__
    if module == "torchvision.models.resnet":
        stages = (net.layer1, net.layer2, net.layer3, net.layer4)
        kind = tuple(map(len, stages)), net.layer1[0].expansion, net.groups, net.base_width
        return (RESNETS[kind], {}) if kind in RESNETS else None
    if not module.startswith("timm.models."):
        return None
    name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture", "")
    found = REGISTERED.get(name, (name, {}))
    return found if timm.is_model(found[0]) and not found[0].startswith(OURS) else None
