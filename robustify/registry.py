"""Architectures that timm does not have, registered with it: RobustBench's, torchvision's, the digits network.

After `import robustify`, `timm.create_model("robustbench_cifar10_linf_...")` works, and so does
`timm.create_model("local-dir:...")` of an exported folder. Neither timm nor RobustBench is imported for that: timm
takes seconds, which `--help` must not cost, so the registration waits until somebody imports it.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds too
    from torch import nn

DIGITS, RESNET2B2 = "robustify_digits_cnn", "robustify_resnet2b2"
# timm looks up a registered function's description in this variable of the function's module
default_cfgs: dict[str, dict[str, Any]] = {}


def install() -> None:
    """Register with timm now if it is imported, otherwise right after it will be. Does nothing the second time."""
    if hasattr(sys.modules.get("timm"), "create_model"):
        register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


def register() -> None:
    """Register our own networks, RobustBench's architectures with published weights, and those of other libraries."""
    from robustify.nets import DigitsCNN, ResNet2B2, default_cfg, resnet2b2_cfg
    from robustify.sources import published

    _add(DIGITS, DigitsCNN, default_cfg)
    _add(RESNET2B2, ResNet2B2, resnet2b2_cfg)
    register_robustbench(published.rows())
    _register_torchvision()
    _register_transformers()


def register_robustbench(rows: Iterable[dict[str, Any]]) -> None:
    """Register the architectures of these rows (id, dataset, threat), built by RobustBench when they are asked for."""
    from robustify.sources import published

    for row in rows:
        if row.get("weights", True):
            classes, size = published.CLASSES[row["dataset"]], published.input_size(row)
            cfg = {"input_size": size, "num_classes": classes, "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
            _add(published.arch_name(row), _builder(row, classes), cfg)


def _register_torchvision() -> None:
    from robustify.sources import torchvision

    cfg = {"input_size": torchvision.SIZE, "num_classes": torchvision.CLASSES, "crop_pct": 0.875}
    cfg |= {"mean": torchvision.MEAN, "std": torchvision.STD}
    for name in torchvision.names():  # timm has imported torchvision, so this costs nothing

        def build(global_pool: str | None = None, name: str = name, **args: Any) -> nn.Module:
            return torchvision.build(name, **args)

        _add(torchvision.PREFIX + name, build, cfg)


def _register_transformers() -> None:
    from robustify.sources import transformers

    def build(config: dict[str, Any], global_pool: str | None = None, **args: Any) -> nn.Module:
        return transformers.build(config, **args)

    _add(transformers.ARCH, build, {"input_size": (3, 224, 224), "num_classes": 1000})


def _builder(row: dict[str, Any], classes: int) -> Callable[..., nn.Module]:
    # timm passes on what its configuration says; global_pool and img_size have no meaning here
    def build(
        num_classes: int = classes, in_chans: int = 3, global_pool: str | None = None, img_size: object = None
    ) -> nn.Module:
        from robustify.sources import robustbench

        return robustbench.build(row, num_classes, in_chans)

    return build


def _add(name: str, build: Callable[..., nn.Module], cfg: dict[str, Any]) -> None:
    """Register `build` with timm as the architecture `name`, described by `cfg`."""
    from timm.models import build_model_with_cfg, is_model, register_model

    if is_model(name):
        return

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(build, name, pretrained, **kwargs)  # pyright: ignore[reportArgumentType]

    entry.__name__ = entry.__qualname__ = name
    default_cfgs[name] = {"first_conv": None, "classifier": None, **cfg}
    register_model(entry)


class _AfterTimm(MetaPathFinder):
    """Lets the ordinary finders find timm, and has `register` run when its import is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register
        return spec
