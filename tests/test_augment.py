"""Augmentation: what each kind may do to an image, and that processes agree."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustify.augment import KINDS, augment
from robustify.errors import UserError
from robustify.rng import Draws


def images(n: int = 64, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1


def moved(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Every window of the black-framed image, [windows, C, H, W]: the slow, obvious way."""
    _, height, width = x.shape
    framed = torch.zeros(x.shape[0], height + 2 * down, width + 2 * right)
    framed[:, down:down + height, right:right + width] = x
    return torch.stack([framed[:, t:t + height, left:left + width]
                        for t in range(2 * down + 1) for left in range(2 * right + 1)])


@pytest.mark.parametrize(("kind", "down", "right", "flips"), [("shift", 1, 1, False), ("crop-flip", 2, 3, True)])
def test_each_image_becomes_one_window_and_all_windows_occur(kind, down, right, flips) -> None:
    x = images(400, 1, 16, 24)
    seen = set()
    for before, after in zip(x, augment(x, kind, Draws(1)), strict=True):
        allowed = moved(before, down, right)
        allowed = torch.cat([allowed, allowed.flip(3)]) if flips else allowed
        hits = (allowed == after).flatten(1).all(1).nonzero()
        assert len(hits) == 1
        seen.add(int(hits))
    assert len(seen) == (2 * down + 1) * (2 * right + 1) * (1 + flips)


def test_flip_mirrors_about_half() -> None:
    x = images(400)
    y = augment(x, "flip", Draws(0))
    same, mirrored = (x == y).flatten(1).all(1), (x.flip(3) == y).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250


def test_none_is_the_image_itself() -> None:
    x = images(4)
    assert augment(x, "none", Draws(0)) is x


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 99), cut=st.integers(1, 23), side=st.sampled_from([8, 9, 32]))
def test_two_processes_give_what_one_gives(kind: str, seed: int, cut: int, side: int) -> None:
    x = images(24, 3, side, side)
    original = x.clone()
    whole = augment(x, kind, Draws(seed))
    parts = [augment(x[:cut], kind, Draws(seed, total=24)), augment(x[cut:], kind, Draws(seed, total=24, start=cut))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(x, original)
    assert whole.shape == x.shape
    assert whole.dtype == x.dtype
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    augment(images(4), "crop-flip", Draws(0))
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown augmentation 'cropflip'") as caught:
        augment(images(2), "cropflip", Draws(0))
    assert "Did you mean crop-flip?" in caught.value.hint


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = images().cuda()
    y = augment(x, "crop-flip", Draws(0, "cuda"))
    assert y.device == x.device
    assert torch.equal(y, augment(x, "crop-flip", Draws(0, "cuda")))
