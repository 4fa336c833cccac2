"""torchvision's classifiers. timm builds them too, by names such as torchvision_resnet50, once robustify is imported."""

from __future__ import annotations

from typing import Any

from torch import nn

from robustify import layers
from robustify.errors import UserError, nearest
from robustify.pixels import PixelModel
from robustify.sources import hub, weights
from robustify.sources.checkpoint import Checkpoint
from robustify.sources.options import Options

PREFIX = "torchvision_"
CLASSES, SIZE = 1000, (3, 224, 224)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of all its weights
AUXILIARY = ("inception_v3", "googlenet")  # with extra heads for training, which change what forward returns


def names() -> list[str]:
    """Return the names of the architectures. Imports torchvision."""
    from torchvision import models

    return models.list_models(module=models)


def build(name: str, num_classes: int = CLASSES, in_chans: int = 3, **args: Any) -> nn.Module:
    """Return the architecture with random weights. Raises UserError."""
    from torchvision import models

    if in_chans != 3:
        raise UserError(f"torchvision's {name} cannot be built for {in_chans} channels", f"timm may have it: timm:{name}")
    auxiliary: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in AUXILIARY else {}
    try:
        return models.get_model(name, weights=None, num_classes=num_classes, **auxiliary, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"torchvision cannot build {name} with {args}: {error}", "leave out what it does not take") from error


def load(name: str, options: Options) -> Checkpoint:
    """Return torchvision's NAME or NAME.WEIGHTS, such as resnet50.IMAGENET1K_V1. Raises UserError."""
    arch, _, tag = name.partition(".")
    if arch not in names():
        message = f"torchvision has no classifier {arch!r}.{nearest(arch, names())}"
        raise UserError(message, "robustify ls models torchvision: lists them")
    chosen = _weights(arch, tag)
    args = dict(options.args)
    if options.pretrained and arch in AUXILIARY:
        args.setdefault("transform_input", True)  # these weights were trained behind another normalisation
    side = int(chosen.transforms.keywords["crop_size"])
    size = options.input_size((3, side, side))
    net = build(arch, CLASSES, size[0], **args)
    if options.pretrained:
        path = hub.url_file(f"torchvision's {name}", chosen.url)
        state = {n: w for n, w in weights.read(path, options.allow_pickle).items() if not n.startswith(("aux", "AuxLogits"))}
        weights.fill(net, weights.named_for(net, state), path, arch)
    classes = options.num_classes or CLASSES
    if classes != CLASSES:
        layers.replace_classifier(net, size, classes)
    accuracy = chosen.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return Checkpoint(
        model=PixelModel(net, MEAN, STD).eval(), arch=PREFIX + arch, arch_args=args, num_classes=classes,
        input_size=size, base_id=f"torchvision:{arch}.{chosen.name}",
        published={"clean_acc": str(accuracy)} if options.pretrained and classes == CLASSES else None,
        dataset="imagenet" if options.pretrained else None, pretrained=options.pretrained and classes == CLASSES,
        replaced=CLASSES if classes != CLASSES else None,
    )  # fmt: skip


def _weights(arch: str, tag: str) -> Any:
    """Return torchvision's record of the weights that `tag` names, its default ones without a tag. Raises UserError."""
    from torchvision import models

    every = models.get_model_weights(arch)
    if not tag:
        return every["DEFAULT"]  # pyright: ignore[reportIndexIssue]
    known = {weights.name: weights for weights in every}  # pyright: ignore[reportGeneralTypeIssues]
    if tag not in known:
        raise UserError(f"torchvision has no weights {tag!r} for {arch}", f"it has: {', '.join(known)}")
    return known[tag]
