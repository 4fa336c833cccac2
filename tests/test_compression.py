"""The one-byte quantiser: unbiased, with the variance of its formula; what is said when compression buys nothing."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_net

from robustify import compression
from robustify.compression import LEVELS, GradientHook, compression_note, quantise
from robustify.recipe import TrainSettings


def test_the_quantiser_is_unbiased_and_its_variance_is_the_formulas():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(1, 512, generator=generator, dtype=torch.float64)
    g[0, :4] = torch.tensor([0.0, 5.0, -5.0, 1e-3])
    draws = 4000
    uniform = torch.rand(draws, 512, generator=generator, dtype=torch.float64)
    found = quantise(g.expand(draws, -1), uniform).values()
    unit = g.norm() / LEVELS
    fraction = (g.abs() / unit).frac()
    variance = (unit**2 * fraction * (1 - fraction))[0]
    z = (found.mean(0) - g[0]) / (variance / draws).sqrt().clamp_min(1e-6)
    assert z.abs().max() < 4.5  # of 512 normal deviates
    assert abs(float(z.mean())) < 3 / 512**0.5
    assert float((found.var(0).sum() - variance.sum()).abs()) < 0.02 * float(variance.sum())
    assert float(variance.sum()) < 0.01 * float(g.norm() ** 2)  # what buckets of 512 are for


def test_zeros_stay_zero_and_what_is_not_finite_stays_so():
    g = torch.zeros(3, 512)
    g[1, 0], g[2, 0] = torch.inf, torch.nan
    values = quantise(g, torch.rand(3, 512)).values()
    assert torch.equal(values[0], g[0])
    assert not values[1].isfinite().any()
    assert not values[2].isfinite().any()


def test_it_says_where_compression_buys_nothing():
    assert compression_note(tiny_net(), "none", 2) is None
    assert "one process" in compression_note(tiny_net(), "qsgd", 1)
    assert "buys nothing" in compression_note(tiny_net(), "qsgd", 2)
    assert compression_note(torch.nn.Linear(1000, 1000), "qsgd", 2) is None


@pytest.mark.parametrize(("rule", "rate"), [("none", 0.01), ("linear", 0.08), ("sqrt", 0.01 * 8**0.5)])
def test_the_rate_follows_the_batch(rule, rate):
    assert TrainSettings(batch_size=2048, scale_lr=rule).rate == pytest.approx(rate)


@pytest.mark.parametrize("optimizer", ["lamb", "lars"])
def test_layerwise_optimisers_clip_the_trust_ratio_and_leave_clipping_to_clip_norm(optimizer):
    from robustify.distributed import make_accelerator
    from robustify.methods import Standard
    from robustify.pixels import PixelModel
    from robustify.step import prepare
    from robustify.threat import ThreatModel

    s = TrainSettings(optimizer=optimizer, trust_clip=True, weight_decay=1e-4)
    threat = ThreatModel.parse("Linf:8/255")
    setup = prepare(PixelModel(tiny_net()), Standard(), threat, s, make_accelerator(), "none", 96)
    assert all(group["trust_clip"] for group in setup.optimizer.param_groups)
    weight = setup.model.net[6].weight
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 1e6)
    setup.optimizer.step()
    moved = (weight.detach() - before).norm()
    assert 0 < moved < 0.1 * before.norm()  # the rate times at most the weight's own norm, whatever the gradient's


def test_without_streams_one_bucket_is_exchanged_after_the_other(monkeypatch):
    """torch's power_sgd exchanges from callbacks, which gloo runs on threads: two buckets under way mix up their messages."""
    slow = torch.futures.Future()
    monkeypatch.setattr(compression.powerSGD_hook, "powerSGD_hook", lambda state, bucket: slow)
    hook = GradientHook("power_sgd", 0, False, SimpleNamespace(total_numel_after_compression=0))
    done = threading.Timer(0.2, slow.set_result, [torch.ones(8)])
    done.start()
    future = hook.average(None, SimpleNamespace(buffer=lambda: torch.zeros(8), index=lambda: 0))
    assert future.done()
    assert torch.equal(future.value(), torch.ones(8))
