"""Learning rates: each rule against a table or the library whose schedule it is."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from robustify.schedules import BY_SCORE, Accelat, accelat, make_schedule, one_cycle


def optimiser(lr: float = 0.2) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(kind, epochs, per_epoch, scores=(), warmup=0, **more):
    """The rate of every step of a run whose epochs end with these scores."""
    optimizer = optimiser()
    schedule = make_schedule(optimizer, kind, epochs, per_epoch, warmup, **more)
    found = []
    for step in range(epochs * per_epoch):
        schedule.set(step)
        found.append(optimizer.param_groups[0]["lr"])
        if scores and (step + 1) % per_epoch == 0:
            schedule.tell(scores[step // per_epoch])
    return found


def test_the_cyclic_schedule_is_a_triangle():
    assert rates("cyclic", 2, 5) == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2, 0.16, 0.12, 0.08, 0.04, 0.0])


@pytest.mark.parametrize("total", [3, 10, 97])
def test_one_cycle_is_torchs(total):
    optimizer = optimiser()
    theirs = OneCycleLR(optimizer, max_lr=0.2, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert 0.2 * one_cycle(step, total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        if step + 1 < total:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs.step()


@pytest.mark.parametrize(
    ("scores", "rule", "cuts"),
    [
        # a flat curve: more than 5 means from epoch 6 on, then a cut every sixth epoch (more than 5 since the last)
        ([0.4] * 20, Accelat(), [6, 12, 18]),
        # the mean rises by 0.02 an epoch: never
        ([0.02 * t for t in range(1, 21)], Accelat(), []),
        # it rises by exactly the threshold: spared; by a little less: cut
        ([0.125 * t for t in range(1, 9)], Accelat(threshold=0.125), []),
        ([0.124 * t for t in range(1, 9)], Accelat(threshold=0.125), [6]),
        # the mean of five hides a single bad epoch while it rises fast enough
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.55, 0.8], Accelat(), []),
        # the means 0.30, 0.40, 0.46, 0.48, 0.46: the first fall of the mean, not of the score, is the cut
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.4, 0.3], Accelat(), [9]),
        # other sizes: window 2, no cooldown: every epoch from the third on without a rise
        ([0.3, 0.3, 0.3, 0.3, 0.5, 0.5], Accelat(window=2, cooldown=0), [3, 4]),
        ([0.3] * 6, Accelat(window=1, cooldown=1), [2, 4, 6]),
        ([], Accelat(), []),
    ],
)
def test_accelat_cuts_in_these_epochs(scores, rule, cuts):
    found = [t for t in range(1, len(scores) + 1) if accelat(1.0, scores[:t], rule) < accelat(1.0, scores[: t - 1], rule)]
    assert found == cuts
    assert accelat(1.0, scores, rule) == pytest.approx(0.8 ** len(cuts))


def test_accelat_never_falls_below_its_lowest_rate():
    assert accelat(1e-3, [0.4] * 300, Accelat(lowest=1e-4)) == 1e-4


def test_accelat_holds_within_an_epoch_and_cuts_the_next():
    found = rates("accelat", 8, 3, [0.4] * 8)
    assert found[: 6 * 3] == [0.2] * 18
    assert found[6 * 3 :] == pytest.approx([0.16] * 6)


def test_plateau_takes_a_tenth_after_more_than_five_epochs_without_a_new_best():
    found = rates("plateau", 9, 1, [0.1, 0.4, 0.3, 0.4, 0.2, 0.4, 0.3, 0.4, 0.4])
    assert found == pytest.approx([0.2] * 8 + [0.02])


@pytest.mark.parametrize("kind", BY_SCORE)
def test_what_a_schedule_knows_is_saved(kind):
    first, second = optimiser(), optimiser()
    one, two = (make_schedule(optimizer, kind, 20, 1) for optimizer in (first, second))
    for score in [0.4] * 5:
        one.tell(score)
    two.load_state_dict(one.state_dict())
    for step in range(5):
        for schedule in (one, two):
            schedule.tell(0.4)
            schedule.set(step)
        assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]
    assert first.param_groups[0]["lr"] < 0.2


def test_timms_cosine_and_step_with_warm_up():
    found = rates("cosine", 4, 5, warmup=1)
    assert found[:5] == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])
    assert found[10] == pytest.approx(0.1 * (1 + math.cos(math.pi * 10 / 20)))
    assert rates("constant", 4, 5) == [0.2] * 20
    assert rates("step", 3, 2) == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
