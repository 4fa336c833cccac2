"""Which parameters train: the last layer, all of them, or those whose name matches; and where the classifier is."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustify.errors import UserError, nearest
from robustify.modes import borrowed
from robustify.rng import mix

_HEADS = 8  # EfficientViM with distillation has so many


@dataclass(frozen=True)
class Selection:
    """names: the parameters that train. trainable, total: how many numbers they hold, and the whole network."""

    names: list[str]
    trainable: int
    total: int


def find_classifier(net: nn.Module, x: Tensor) -> list[str]:
    """Return the module names of the last layer(s), found by structure: whose output is the logits.

    x: a batch of images as the network takes them. Looks for the linear layer or convolution whose output
    equals the logits, perhaps averaged over positions; then for the fewest last heads of which the logits are a weighted
    sum (two that distillation averages, EfficientViM's four); then for those of which every output moves the logit of its
    class and no other (VOLO's two heads, a BatchNorm behind; between two classes that says little, and the last one is
    taken); then for the last whose outputs rank the classes as the logits do (a softmax or a LayerNorm behind). Raises
    UserError when there is no such layer.
    """
    with borrowed(net), torch.no_grad():
        logits, candidates = _outputs(net, x)
        exact = [name for name, out in candidates if _close(out, logits)]
        if exact:
            return exact[-1:]
        for count in range(1, min(len(candidates), _HEADS, logits.numel() // 2) + 1):
            if _are_summed([out for _, out in candidates[-count:]], logits):
                return [name for name, _ in candidates[-count:]]
        last = dict.fromkeys(name for name, _ in candidates[-_HEADS:])
        if last and not logits.isfinite().all():  # of a network gone wrong nothing more can be asked
            return list(last)[-1:]
        if own := [name for name in last if _moves_its_class_alone(net, x, logits, name)]:
            return own if logits.shape[1] > 2 else own[-1:]
        if ranking := [name for name, out in candidates if _ranks_alike(out, logits)]:
            return ranking[-1:]
    raise UserError(
        f"{type(net).__name__} has no linear or convolutional layer with {logits.shape[1]} outputs at its end",
        "name the layers to train, for instance --layers 'head*', or take --layers full (layers=... in Python)",
    )


def _outputs(net: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The logits, and by module name the linear layers' and convolutions' outputs with as many channels, in their order."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str):
        return lambda _, __, out: seen.append((name, out))

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    ]
    try:
        logits = net(x)
    finally:
        for hook in hooks:
            hook.remove()
    pooled = [(name, _pooled(out, logits.shape[1])) for name, out in seen if len(out) == len(logits)]
    return logits, [(name, out) for name, out in pooled if out is not None]


@torch.no_grad()
def replace_classifier(net: nn.Module, input_size: Sequence[int], num_classes: int) -> None:
    """Put a new, random last layer for `num_classes` in, found by structure, and leave the network in eval mode.

    input_size: (channels, height, width) of images the network takes. timm's networks do it themselves. Raises UserError
    where it cannot be done.
    """
    reset = getattr(net, "reset_classifier", None)
    if reset is not None:
        reset(num_classes)
        return
    x = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    for name in find_classifier(net, x):
        old = net.get_submodule(name)
        bias = old.bias is not None
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, num_classes, bias=bias)
        elif isinstance(old, nn.Conv1d | nn.Conv2d) and old.groups == 1:
            same = (old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, old.dilation)  # pyright: ignore
            new = type(old)(*same, bias=bias)  # pyright: ignore[reportArgumentType]
        else:
            raise UserError(f"the last layer of {type(net).__name__}, {name}, cannot be replaced", "take data of its classes")
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, new.to(old.weight.device))  # pyright: ignore[reportArgumentType]
    refused = f"{type(net).__name__} cannot be given {num_classes} classes"
    hint = "take data of its classes, or another model"
    try:
        shape = tuple(net.eval()(x).shape)
    except RuntimeError as error:
        raise UserError(f"{refused}: something after its last layer counts on their number: {error}", hint) from error
    if shape != (len(x), num_classes):
        raise UserError(f"{refused}: its logits have {shape[1:]}", hint)


def _pooled(out: Tensor, classes: int) -> Tensor | None:
    """A layer's output as one row per image, averaged over positions or tokens; None when it has not `classes` channels."""
    if out.ndim == 3 and out.shape[2] == classes:  # tokens
        return out.mean(1)
    return (
        out.flatten(2).mean(2)
        if out.ndim > 2 and out.shape[1] == classes
        else out
        if out.shape[1:] == (classes,)
        else None
    )


def _are_summed(outputs: list[Tensor], logits: Tensor) -> bool:
    """Whether the logits are a sum of the outputs, each times one number, the same for all images and classes."""
    if not all(values.isfinite().all() for values in (*outputs, logits)):
        return False
    heads = torch.stack([out.flatten() for out in outputs], 1).double().cpu()
    wanted = logits.flatten().double().cpu()
    return _close(heads @ torch.linalg.lstsq(heads, wanted.unsqueeze(1)).solution.squeeze(1), wanted)


def _moves_its_class_alone(net: nn.Module, x: Tensor, logits: Tensor, name: str) -> bool:
    """Whether more of one output of this layer moves the logit of its class against all others, which keep their distances.

    The first and the last class are tried.
    """
    classes = logits.shape[1]
    for k in {0, classes - 1}:

        def more(_: nn.Module, __: object, out: Tensor, k: int = k) -> Tensor:
            added = torch.zeros(classes, device=out.device, dtype=out.dtype)
            added[k] = out.std() + 1
            axis = 2 if out.ndim == 3 and out.shape[2] == classes else 1  # tokens, else channels
            return out + added.view([classes if i == axis else 1 for i in range(out.ndim)])

        hook = net.get_submodule(name).register_forward_hook(more)
        try:
            change = net(x) - logits
        finally:
            hook.remove()
        others = torch.cat((change[:, :k], change[:, k + 1 :]), 1)
        if classes > 1 and not _close(others, others[:, :1].expand_as(others)):
            return False
        if _close(change[:, k], others[:, 0] if classes > 1 else torch.zeros_like(change[:, k])):
            return False
    return True


def _ranks_alike(out: Tensor, logits: Tensor) -> bool:
    """Whether the logits never fall where the layer's outputs rise from class to class; and not by being all alike."""
    ranked = logits.gather(1, out.argsort(1))
    return bool((ranked.diff(dim=1) >= 0).all()) and not _close(ranked[:, 0], ranked[:, -1])


def _close(a: Tensor, b: Tensor) -> bool:
    rounding = torch.finfo(a.dtype).eps / torch.finfo(torch.float32).eps  # of half precision 8,192 times as large
    return torch.allclose(a, b, rtol=min(1e-4 * rounding, 0.05), atol=min(1e-5 * rounding, 0.05))


def select(net: nn.Module, layers: str, classifier: list[str]) -> Selection:
    """Set requires_grad: `last` (the classifier), `full`, or a pattern on parameter names such as 'layer4*,fc*'.

    Raises UserError when a pattern matches nothing.
    """
    wanted = (
        [f"{name}.*" if name else "*" for name in classifier]
        if layers == "last"
        else ["*"]
        if layers == "full"
        else layers.split(",")
    )
    every = dict(net.named_parameters())
    for pattern in wanted:
        if not fnmatch.filter(every, pattern.strip()):
            raise UserError(
                f"the pattern of layers {pattern!r} matches no parameter.{nearest(pattern, list(every))}",
                f"names look like {', '.join(list(every)[:2] + list(every)[-2:])}; or take last or full",
            )
    names = [name for name in every if any(fnmatch.fnmatch(name, pattern.strip()) for pattern in wanted)]
    for name, weight in every.items():
        weight.requires_grad_(name in names)
    return Selection(names, sum(every[name].numel() for name in names), sum(w.numel() for w in every.values()))


@torch.no_grad()
def reinitialise(net: nn.Module, classifier: list[str], seed: int) -> None:
    """Re-draw the classifier's weights as torch initialises them, from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 1))
        for name in classifier:
            layer = net.get_submodule(name)
            fresh = layer.reset_parameters
            fresh()  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def add_weight_noise(net: nn.Module, sigma: float, seed: int) -> None:
    """w += sigma * std(w) * N(0,1) for every parameter of the network, tensor by tensor, from `seed`."""
    generator = torch.Generator().manual_seed(mix(seed, 2))
    for weight in net.parameters():
        if weight.numel() > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(sigma * weight.std() * noise)
