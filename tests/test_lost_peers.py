"""What a process says when another one is lost: the other's last words, or what its silence means."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from robustify import faults
from robustify.errors import UserError
from robustify.faults import PeerLost, Preempted, peers_watched

TWO = SimpleNamespace(size=2, rank=1)
BROKEN = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:41641")
SILENT = RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:133] Timed out waiting 25000ms for recv operation to complete")


class Store(dict):
    """As the processes' common store."""

    def set(self, key, text):
        self[key] = text.encode()

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(faults, "_store", lambda: found)
    return found


def watched(error):
    with peers_watched(TWO):
        raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("the loss is not a number", "try another rate"), "the loss is not a number"),
        (Preempted("the state after step 3 is saved"), "ended by SIGTERM; the state after step 3 is saved"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    ],
)
def test_the_last_words_of_one_are_what_the_other_says(store, error, said):
    with pytest.raises(type(error)):
        watched(error)
    with pytest.raises(PeerLost) as lost:
        watched(BROKEN)
    assert lost.value.message == f"process 1 of 2 has ended: {said}"


def test_words_that_cannot_be_left_hide_nothing(monkeypatch):
    def lost(key, text):
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(faults, "_store", lambda: SimpleNamespace(set=lost))
    with pytest.raises(Preempted, match="after step 3"):
        watched(Preempted("the state after step 3 is saved"))
    with pytest.raises(UserError, match="not a number"):
        watched(UserError("the loss is not a number"))


def test_one_that_was_killed_left_no_word(store):
    with pytest.raises(PeerLost, match="has ended without a word"):
        watched(BROKEN)


def test_in_silence_the_store_is_not_asked(monkeypatch):
    """It may be on the machine that is gone, and would be waited for without end."""
    monkeypatch.setattr(faults, "_store", lambda: pytest.fail("the store was asked"))
    with pytest.raises(PeerLost, match="does not answer"):
        watched(SILENT)


def test_a_process_alone_watches_nobody():
    with pytest.raises(RuntimeError, match="Connection closed"), peers_watched(SimpleNamespace(size=1)):
        raise BROKEN
