"""What ends a run from outside: the machine is taken away (SIGTERM), or another of its processes is lost.

Both leave the last checkpoint whole, and the same command continues from it, on as many processes as there are then.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from robustify.distributed import World
from robustify.environment import version_of
from robustify.errors import UserError

PREEMPTED, PEER_LOST = 128 + signal.SIGTERM, 3  # exit codes
_WHY = "robustify/why"  # in the processes' common store: the last words of the one that ended first
_BROKEN = re.compile(r"gloo|NCCL|by peer|Broken pipe|socket|[Tt]imed out waiting")


class Preempted(BaseException):
    """SIGTERM came, as clusters send it before they take a machine away. saved: what is on disk.

    Like KeyboardInterrupt it comes anywhere, and no `except Exception` may take it for a mistake of what ran there.
    """

    def __init__(self, saved: str) -> None:
        super().__init__(f"ended by SIGTERM; {saved}")


class PeerLost(UserError):
    """Another process of this run has ended, or does not answer."""


@dataclass
class Termination:
    """What SIGTERM does: it raises Preempted where it meets the program, or is only noted while a step is `held`.

    asked: whether it has come; saved: what is on disk, in words.
    """

    asked: bool = False
    held: bool = False
    saved: str = "nothing is saved yet"

    def come(self) -> None:
        self.asked = True
        if not self.held:
            raise Preempted(self.saved)

    def hold(self) -> None:
        """From here on work is done that must be saved first, by all processes together."""
        self.held = True

    def release(self) -> None:
        """From here on nothing is lost that is not on disk. Raises Preempted when it has come meanwhile."""
        self.held = False
        if self.asked:
            raise Preempted(self.saved)


@contextmanager
def sigterm_noted() -> Iterator[Termination]:
    """Have SIGTERM end the block in order: within a batch's time, or once the step is saved."""
    noted = Termination()
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield noted
        return

    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.come())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def peers_watched(world: World) -> Iterator[None]:
    """Leave this process's last words to the others, and turn a broken collective into PeerLost with theirs."""
    if world.size == 1:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        if not _broken(error):
            _leave_word(world, error)
            raise
        raise PeerLost(_why(error)) from None
    except BaseException as error:
        _leave_word(world, error)
        raise


def same_everywhere(world: World, facts: Mapping[str, Any]) -> None:
    """Raise UserError on every process when one has other facts (settings, digests) or versions than the main one."""
    mine = {**{name: version_of(name) for name in ("robustify", "torch", "timm")}, **facts}
    found = world.gather_on_main((socket.gethostname(), mine))
    world.on_main(lambda: _check_same(found or []))


def _check_same(found: list[tuple[str, dict[str, Any]]]) -> None:
    _, main = found[0]
    for rank, (host, facts) in enumerate(found):
        other = [f"{what} {facts.get(what)} instead of {main[what]}" for what in main if facts.get(what) != main[what]]
        if other:
            raise UserError(
                f"process {rank} on {host} differs from the main one: {'; '.join(other[:4])}",
                "give every machine the same command, the same files and the same environment",
            )


def _broken(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _BROKEN.search(str(error)) is not None


def _why(error: RuntimeError) -> str:
    text = str(error)
    if "imed out" in text or "imeout" in text:  # then the store may not answer either
        return "another process does not answer: it hangs, or its machine is gone"
    unexplained = "another process has ended without a word: killed, perhaps for want of memory, or its machine is gone"
    return _last_words() or unexplained


def _leave_word(world: World, error: BaseException) -> None:
    store = _store()
    if store is not None:
        known = isinstance(error, UserError | Preempted)
        text = str(error).splitlines()[0] if known else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store's machine may be gone, and what ended this process is what counts
            store.set(_WHY, f"process {world.rank} of {world.size} has ended: {text}")


def _last_words() -> str | None:
    store = _store()
    try:
        return store.get(_WHY).decode() if store is not None and store.check([_WHY]) else None
    except RuntimeError:  # the store's machine is the one that is gone
        return None


def _store() -> Any:
    # the store that init_process_group has made; torch has no public name for it
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
