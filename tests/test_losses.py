from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustify.errors import UserError
from robustify.losses import LOSSES, ce, dlr, kl, margin, redlr

logits_and_labels = st.integers(0, 10_000).map(
    lambda seed: (
        3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(seed + 1)),
    )
)


@settings(max_examples=50, deadline=None)
@given(logits_and_labels)
def test_dlr_is_the_formula(case):
    z, y = case
    ordered = z.sort(dim=1, descending=True).values
    for i in range(len(z)):
        top = ordered[i]
        other = top[1] if z[i].argmax() == y[i] else top[0]
        assert float(dlr(z, y)[i]) == pytest.approx(float(-(z[i, y[i]] - other) / (top[0] - top[2])))


@settings(max_examples=50, deadline=None)
@given(logits_and_labels)
def test_signs_say_who_is_right_and_dlr_forgets_scale(case):
    z, y = case
    wrong = z.argmax(1) != y
    for loss in (margin, dlr):
        assert torch.equal(loss(z, y) > 0, wrong)
    assert torch.allclose(dlr(7 * z + 3, y), dlr(z, y))
    assert torch.equal(redlr(z, y) == 0, wrong)


def test_redlr_has_no_slope_where_the_image_is_wrong():
    z = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]], requires_grad=True)
    (g,) = torch.autograd.grad(redlr(z, torch.tensor([0, 0])).sum(), z)
    assert torch.equal(g[0], torch.zeros(3))
    assert g[1].abs().sum() > 0


def test_losses_are_per_example_and_in_single_precision():
    z = torch.randn(4, 5, dtype=torch.bfloat16)
    for loss in LOSSES.values():
        out = loss(z, torch.arange(4))
        assert out.shape == (4,)
        assert out.dtype == torch.float32


def test_kl_is_zero_at_itself_finite_at_extremes_and_exact():
    p, q = torch.tensor([[500.0, -500.0, 0.0]]), torch.tensor([[-500.0, 500.0, 0.0]])
    assert torch.isfinite(kl(p, q)).all()
    assert float(kl(p, p)) == 0
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)
    assert torch.allclose(kl(a, b), expected)


def test_kl_has_no_slope_at_itself():
    q = torch.randn(2, 3, requires_grad=True)
    (g,) = torch.autograd.grad(kl(q.detach(), q).sum(), q)
    assert torch.allclose(g, torch.zeros(2, 3), atol=1e-7)


def test_cross_entropy_by_hand():
    assert float(ce(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))) == pytest.approx(0.6931472)


def test_dlr_of_two_classes_is_refused():
    with pytest.raises(UserError, match="at least 3 classes"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))
