"""How a command ends: with its own exit code, and with a line on how it goes on when it was ended from outside."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from robustify import console


@contextmanager
def explained(saved: str, goes_on: Callable[[], str]) -> Iterator[None]:
    """Turn an interruption, SIGTERM and a lost process into a line and the exit code of each.

    saved: what a lost process cannot have spoilt. goes_on: the sentence with the command to type, "" without one.
    """
    from robustify.faults import PEER_LOST, PREEMPTED, PeerLost, Preempted

    try:
        yield
    except (KeyboardInterrupt, Preempted) as ended:
        console.note("; ".join(part for part in (str(ended) or "interrupted", goes_on()) if part))
        raise typer.Exit(PREEMPTED if isinstance(ended, Preempted) else 130) from None
    except PeerLost as lost:
        again = goes_on()
        console.mistake(lost.message, f"{saved}; {again}" if again else "")
        raise typer.Exit(PEER_LOST) from None


@contextmanager
def code_kept() -> Iterator[None]:
    """Let one of several processes end with the block's exit code.

    A thread of gloo's that frees its last tensor while the interpreter shuts down aborts the process, and such threads may
    outlive destroy_process_group. So a process of several ends after the exit handlers registered within the block, without
    that shutdown.
    """
    code = 1  # of a bug, whose traceback is printed before the exit handlers run

    def leave() -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            console.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(leave)  # before those of the libraries, so that it is called after them
    try:
        yield
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
