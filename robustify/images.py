"""What counts as an image: layout, range, size. All leave here channels first, as uint8 or as float32 in [0,1]."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustify.errors import UserError

Size = tuple[int, int]

# Larger pictures lose their border on the way to a network that takes more than this side, as on ImageNet: resized to
# 256, the middle 224 kept. Smaller pictures are read into memory.
SMALL_SIDE = 64
KEPT_MIDDLE = 0.875
ROUNDING = 1e-4  # resizing and decoding overshoot [0,1] by this much at most; more is another unit
GREY_MODES = ("1", "L", "LA")


def nchw(images: Any, what: str) -> Tensor:
    """Return images [N,C,H,W], uint8 or float32 in [0,1], from an array or tensor NHW, NHWC or NCHW.

    Where the second and the last place of the shape could both be channels, the second is. what: how messages call the
    images. Raises UserError for another shape, type or range.
    """
    x = torch.as_tensor(_tensor(images, what))
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        shape = "x".join(map(str, images.shape))
        raise UserError(f"{what}: cannot read images of shape {shape}", "give NCHW, NHWC or NHW, with 1 or 3 channels")
    return _unit_range(x, what).contiguous()


def chw(image: Any, what: str) -> Tensor:
    """Return one image [C,H,W], uint8 or float32 in [0,1], of a tensor, an array or a PIL picture. Raises UserError."""
    if hasattr(image, "convert"):  # a PIL picture, without importing PIL
        image = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return nchw(_tensor(image, what)[None], what)[0]


def _tensor(images: Any, what: str) -> Tensor:
    if isinstance(images, Tensor):
        return images.detach()
    if isinstance(images, np.ndarray) and images.dtype.kind in "uifb":
        return torch.from_numpy(np.ascontiguousarray(images))
    kind = f"an array of {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
    raise UserError(f"{what}: images are needed, not {kind}", "give a tensor or array: uint8, or float in [0,1]")


def _unit_range(x: Tensor, what: str) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise UserError(f"{what}: images of type {str(x.dtype)[6:]}", "give uint8 in 0..255, or float in [0,1]")
    x = x.float()
    if not x.numel():
        return x
    low, high = (float(value) for value in torch.aminmax(x))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{what}: some pixels are NaN or infinite", "mend or drop these images")
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return x.clamp(0, 1)
    cause = "they look like 0..255: give uint8, or divide by 255" if low >= 0 and 1 < high <= 255 else \
        "they look normalised already: give the pixels before mean and std are taken; the model normalises by itself"
    raise UserError(f"{what}: pixels must lie in [0,1], these lie in [{low:g}, {high:g}]", cause)


def with_channels(x: Tensor, channels: int, what: str) -> Tensor:
    """Return x [N,C,H,W] with that many channels: grey becomes colour, without a copy; UserError for the reverse."""
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1 and channels == 3:
        return x.expand(-1, 3, -1, -1)
    raise no_colour(what, channels)


def no_colour(what: str, channels: int) -> UserError:
    """The refusal of colour pictures by a model that takes grey ones."""
    return UserError(f"{what}: colour pictures, but the model takes {channels} channel{'s' * (channels != 1)}",
                     "convert the pictures yourself, or take a model for colour")


def _plan(height: int, width: int, size: Size) -> tuple[Size, Size]:
    """Return the size to resize to, which covers `size`, and the (top, left) corner of the middle."""
    scale = max(size[0] / height, size[1] / width)
    if scale < 1 and max(size) > SMALL_SIDE:
        scale /= KEPT_MIDDLE
    new = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return new, ((new[0] - size[0]) // 2, (new[1] - size[1]) // 2)


def stored_size(native: Size | None, size: Size) -> Size:
    """Return the size to keep pictures at that a model takes at `size`; native: theirs, None if they differ.

    Small pictures stay as they are: resized on the device, batch by batch, they cost less to read and to keep.
    """
    if native and max(native) <= SMALL_SIDE and native[0] * native[1] <= size[0] * size[1]:
        return native
    return size


def fit(x: Tensor, size: Size) -> Tensor:
    """Resize float images [N,C,h,w] so that they cover size = (H, W), keep the middle: [N,C,H,W], still in [0,1]."""
    height, width = x.shape[2:]
    if (height, width) == size:
        return x
    new, (top, left) = _plan(height, width, size)
    if new != (height, width):
        x = F.interpolate(x, new, mode="bilinear", antialias=True).clamp(0, 1)
    return x[:, :, top:top + size[0], left:left + size[1]].contiguous()


def fit_picture(picture: Any, size: Size) -> Any:
    """The same for a PIL picture."""
    from PIL import Image

    if (picture.height, picture.width) == size:
        return picture
    new, (top, left) = _plan(picture.height, picture.width, size)
    picture = picture.resize((new[1], new[0]), Image.Resampling.BILINEAR)
    return picture.crop((left, top, left + size[1], top + size[0]))
