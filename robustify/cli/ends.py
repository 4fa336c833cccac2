"""How a command that was ended from outside goes on, said by finetune and evaluate alike."""

from __future__ import annotations

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
