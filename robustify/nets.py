"""Small networks that timm does not have: one for digits, one for CIFAR-10."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Three convolutions, a global average, one linear layer: digits [N, 1, 8, 8] in [0,1] to logits [N, classes].

    56 thousand weights. It speaks the part of timm's interface that training and export use.
    """

    num_features = head_hidden_size = 64

    def __init__(self, num_classes: int = 10, in_chans: int = 1, global_pool: str = "avg") -> None:
        super().__init__()
        if global_pool != "avg":
            raise ValueError(f"DigitsCNN averages over the picture; global_pool={global_pool!r} is not known")
        self.num_classes = num_classes
        self.default_cfg: dict[str, Any] = default_cfg
        self.features = nn.Sequential(
            *_block(in_chans, 32, stride=1), *_block(32, 64, stride=2), *_block(64, self.num_features, stride=1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random last layer for `num_classes` in place."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes).to(self.fc.weight.device)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature maps, [N, 64, 4, 4]."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, [N, classes], or with `pre_logits` the averaged features, [N, 64]."""
        x = self.pool(x).flatten(1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


# timm's description of a model. It takes [0,1] as it is, so mean 0 and standard deviation 1.
default_cfg: dict[str, Any] = {
    "input_size": (1, 8, 8), "num_classes": 10, "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0,
    "interpolation": "bilinear", "pool_size": (4, 4), "first_conv": "features.0", "classifier": "fc",
}


class ResNet2B2(nn.Sequential):
    """resnet_2b2 of Ferrari et al. (MN-BaB, ICLR 2022): two residual blocks, two linear layers; [N, 3, 32, 32] to logits.

    176 thousand weights. The tensors are named as in github.com/eth-sri/mn-bab, whose networks load into it.
    """

    num_features = head_hidden_size = 100

    def __init__(self, num_classes: int = 10, in_chans: int = 3, global_pool: str | None = None) -> None:
        stem = nn.Conv2d(in_chans, 16, 3, stride=2, padding=1, bias=False)
        blocks = [nn.Sequential(_Residual(16, 32), nn.ReLU()), nn.Sequential(_Residual(32, 64), nn.ReLU())]
        head = [nn.Flatten(), nn.Linear(64 * 4 * 4, self.num_features), nn.ReLU(), nn.Linear(self.num_features, num_classes)]
        super().__init__(stem, nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)
        self.num_classes = num_classes
        self.default_cfg: dict[str, Any] = resnet2b2_cfg

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self[8]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random last layer for `num_classes` in place."""
        self.num_classes = num_classes
        self[8] = nn.Linear(self.num_features, num_classes).to(next(self.parameters()).device)


class _Residual(nn.Module):
    """The sum of a strided 1x1 convolution and two 3x3 convolutions, each with BatchNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        short = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        last = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.path_a = nn.Sequential(nn.Identity(), short, nn.BatchNorm2d(outputs))
        self.path_b = nn.Sequential(*_block(inputs, outputs, stride=2), last, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.path_a(x) + self.path_b(x)


resnet2b2_cfg: dict[str, Any] = {
    "input_size": (3, 32, 32), "num_classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616),
    "crop_pct": 1.0, "interpolation": "bilinear", "first_conv": "0", "classifier": "8",
}
