from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustify.errors import UserError
from robustify.rng import Draws
from robustify.threat import (
    NORMS,
    ThreatModel,
    dual_norms,
    norms,
    project,
    read_number,
    steepest,
    uniform_in_ball,
)

SPECS = ["Linf:8/255", "L2:0.5", "L1:12", "W2-Linf:8/255", "W1.5-L2:0.25", "Winf-L2:0.5", "Linf:0.031"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_read_back_exactly(spec):
    threat = ThreatModel.parse(spec)
    assert threat.spec == spec
    assert ThreatModel.parse(json.loads(json.dumps(threat.spec))) == threat


def test_it_prints_as_in_the_literature():
    assert str(ThreatModel.parse("linf:8/255")) == "Linf 8/255"
    assert str(ThreatModel("Linf", 8 / 255, 2)) == "W2-Linf 8/255"
    assert ThreatModel.parse("Linf 8/255") == ThreatModel("Linf", 8 / 255)
    assert ThreatModel.parse("W2-Linf:4/255").pointwise().spec == "Linf:4/255"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Linf:8", "did you mean Linf:8/255?"),
        ("W2-Linf:8", "did you mean W2-Linf:8/255?"),
        ("L2:128", "did you mean L2:128/255?"), ("L2:8", "did you mean L2:8/255?"),
        ("Linf:-1/255", "positive"),
        ("Linf:0", "positive"),
        ("L3:0.5", "cannot read the threat 'L3:0.5'\n"),
        ("Linff:0.1", "cannot read the threat 'Linff:0.1'. Did you mean Linf:0.1"),
        ("W2-Lin:0.5", "Did you mean W2-Linf:0.5"),
        ("8/255", "Linf:8/255"),
        ("W1-L2:0.5", "larger than 1"),
        ("Linf:8/0", "cannot read the number"),
        ("Linf:nan", "positive"),
        ("", "cannot read"),
    ],
)
def test_a_wrong_threat_gets_the_correction(text, said):
    with pytest.raises(UserError) as error:
        ThreatModel.parse(text)
    assert said in str(error.value)


def test_numbers():
    assert read_number("8/255") == 8 / 255
    assert read_number("0.5") == 0.5


tensors = st.integers(0, 10_000).map(
    lambda seed: torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
)


@settings(max_examples=40, deadline=None)
@given(tensors, st.sampled_from(NORMS), st.floats(0.01, 3))
def test_projection_lands_in_the_ball_and_leaves_the_inside_alone(d, norm, radius):
    projected = project(d, norm, radius)
    assert (norms(projected, norm) <= radius * (1 + 1e-9)).all()
    inside = norms(d, norm) <= radius
    assert torch.equal(projected[inside], d[inside])
    assert torch.allclose(project(projected, norm, radius), projected, atol=1e-12)
    per_image = project(d, norm, torch.full((5,), radius, dtype=torch.float64))
    assert torch.allclose(per_image, projected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(tensors, st.sampled_from(NORMS), st.floats(0.05, 2), st.integers(0, 1000))
def test_projection_is_the_nearest_point_of_the_ball(d, norm, radius, seed):
    other = uniform_in_ball(d, norm, radius, Draws(seed))
    assert (norms(project(d, norm, radius) - d, "L2") <= norms(other - d, "L2") + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(tensors, st.sampled_from(NORMS), st.integers(0, 1000))
def test_steepest_reaches_the_dual_norm_and_nothing_in_the_ball_beats_it(g, norm, seed):
    h = steepest(g, norm)
    assert torch.allclose(norms(h, norm), torch.ones(5, dtype=torch.float64))
    gain = (h * g).flatten(1).sum(1)
    assert torch.allclose(gain, dual_norms(g, norm))
    other = uniform_in_ball(g, norm, 1.0, Draws(seed))
    assert ((other * g).flatten(1).sum(1) <= gain + 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_has_no_direction(norm):
    assert torch.equal(steepest(torch.zeros(2, 3, 4), norm), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_in_ball_fills_the_ball(norm):
    x = torch.zeros(20_000, 1, 1, 2, dtype=torch.float64)
    radius = torch.linspace(0.5, 2, 20_000, dtype=torch.float64)
    size = norms(uniform_in_ball(x, norm, radius, Draws(3)), norm) / radius
    assert size.max() <= 1 + 1e-9
    # in two dimensions the share within r is r^2, whatever the norm
    for r in (0.3, 0.5, 0.8):
        assert abs(float((size <= r).double().mean()) - r**2) < 0.015
