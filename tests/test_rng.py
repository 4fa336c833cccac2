from __future__ import annotations

import torch

from robustify.rng import Draws, mix


def test_every_process_draws_its_own_rows_of_the_same_batch():
    whole = Draws(5, total=6).normal(torch.zeros(6, 2, 3))
    first = Draws(5, total=6, start=0).normal(torch.zeros(4, 2, 3))
    second = Draws(5, total=6, start=4).normal(torch.zeros(2, 2, 3))
    assert torch.equal(whole, torch.cat([first, second]))


def test_a_stream_goes_on_and_seeds_differ():
    draws = Draws(5)
    a, b = draws.uniform(torch.zeros(3)), draws.uniform(torch.zeros(3))
    assert not torch.equal(a, b)
    assert not torch.equal(a, Draws(6).uniform(torch.zeros(3)))
    assert torch.equal(a, Draws(5).uniform(torch.zeros(3)))


def test_mix_spreads_neighbours():
    seeds = {mix(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
