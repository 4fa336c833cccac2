"""Catastrophic overfitting, provoked: found, rolled back, and healed by a remedy."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import toy_data
from torch import nn

from robustify import layers, probe
from robustify.data import from_tensors
from robustify.distributed import make_accelerator
from robustify.evaluation import evaluate
from robustify.events import Collapsed, EpochEnd
from robustify.methods import FreeAt, Gaat
from robustify.methods.remedies import is_hopeless
from robustify.pixels import PixelModel
from robustify.recipe import TrainSettings
from robustify.step import prepare
from robustify.threat import ThreatModel
from robustify.train import follow, train

THREAT = ThreatModel("Linf", 0.2)


class Waves(nn.Module):
    """A linear classifier of the pixels and of waves of them. A single step of eps is three quarters of a period, so where it
    follows the slope uphill it lands in a trough: the waves learn to make one-step attacks look harmless, and fall to
    those of several steps. They count for a quarter, so that the pixels are learned first."""

    def __init__(self, share: float = 0.25) -> None:
        super().__init__()
        self.share = share
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.pixels, self.waves = nn.Linear(192, 4), nn.Linear(192, 4, bias=False)
        nn.init.zeros_(self.waves.weight)

    def forward(self, x):
        x = x.flatten(1)
        return self.pixels(x) + self.share * self.waves(torch.sin(1.5 * math.pi / THREAT.eps * x))


def fitted(folder, on_collapse, share=0.25, method=None):
    model = PixelModel(Waves(share))
    plain = {"lr": 0.03, "weight_decay": 0, "schedule": "constant", "init": "reinit"}
    settings = TrainSettings(epochs=4, batch_size=32, probe_images=128, on_collapse=on_collapse, **plain)
    layers.select(model.net, "full", [])
    data = from_tensors(toy_data(256), toy_data(128, seed=1), toy_data(64, seed=2))
    setup = prepare(model, method or Gaat(h=1), THREAT, settings, make_accelerator(), "none", 256)
    events = []
    folder.mkdir()
    outcome = follow(train(setup, data, folder), events.append)
    attack = "pgd:steps=50,restarts=2"
    robust = evaluate(model, data.test, ["clean", attack], THREAT).rows[1].accuracy
    return outcome, [e for e in events if isinstance(e, Collapsed)], [e for e in events if isinstance(e, EpochEnd)], robust


def test_one_step_training_collapses_is_found_and_a_remedy_heals_it(tmp_path):
    """FGSM without a random start against large eps. Without a remedy the run ends, with the best epoch's weights; with PGD-2
    it goes on from them and ends more robust than it ever was."""
    ended, (collapse,), epochs, left = fitted(tmp_path / "stop", "stop")
    assert ended.collapsed
    assert collapse.overfitted
    assert collapse.remedy == "stop"
    assert len(epochs) - 1 == collapse.epoch == 3
    assert epochs[3].robust < 0.25 < 0.4 < epochs[1].robust == ended.best
    assert epochs[3].clean > 0.95  # nothing but the attack shows it
    assert epochs[3].extra["gradient_alignment"] < 0.1
    healed, (collapse,), epochs, robust = fitted(tmp_path / "pgd-2", None)
    assert (collapse.epoch, collapse.best_epoch, collapse.remedy, healed.remedies) == (3, 1, "pgd-2", ("pgd-2",))
    assert not healed.collapsed
    assert healed.best_epoch == 4
    assert healed.best > 0.75
    assert robust > left + 0.2
    assert epochs[4].extra["gradient_alignment"] > 0.2


def test_one_step_that_never_works_is_found_in_the_second_epoch(tmp_path):
    """Waves that count in full are learned at once, so robustness has nothing to fall from."""
    ended, (collapse,), epochs, _ = fitted(tmp_path / "stop", "stop", share=1)
    assert ended.collapsed
    assert (collapse.epoch, collapse.overfitted) == (2, True)
    assert all(epoch.robust < epoch.clean / 10 and epoch.extra["gradient_alignment"] < 0.5 for epoch in epochs[1:])


def test_a_method_without_a_remedy_is_not_stopped_for_a_start_that_may_be_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "is_hopeless", lambda clean, robust, alignment: True)
    ended, collapses, epochs, _ = fitted(tmp_path / "free-at", None, method=FreeAt(replays=2))
    assert (ended.collapsed, collapses, len(epochs) - 1) == (False, [], 4)


@pytest.mark.parametrize(
    ("clean", "robust", "alignment", "said"),
    [(0.5, 0.04, 0.3, True), (0.5, 0.06, 0.3, False), (0.5, 0.04, 0.6, False), (0.5, 0.0, None, False)],
)
def test_hopeless_is_robustness_lost_with_gradients_not_aligned(clean, robust, alignment, said):
    assert is_hopeless(clean, robust, alignment) == said
