"""The one exception for a user's mistake."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend. `message` says what and which value; `hint` says what would do, or the command to type.

    The command line prints both without a traceback and exits with code 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message + (f"\n  {hint}" if hint else ""))
        self.message = message
        self.told = False  # whether another process says it
        self.hint = hint

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # so that it travels between processes with its hint


def together(errors: Sequence[UserError]) -> UserError:
    """Return one mistake that tells all of these."""
    if len(errors) == 1:
        return errors[0]
    lines = [f"  - {error.message}" + (f" ({error.hint})" if error.hint else "") for error in errors]
    return UserError(f"{len(errors)} mistakes:\n" + "\n".join(lines))


def nearest(word: str, known: list[str]) -> str:
    """Return ` Did you mean X?` for the closest known word, large letters or small, or an empty string."""
    import difflib

    spelled = {name.lower(): name for name in reversed(known)}
    close = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.6)
    return f" Did you mean {spelled[close[0]]}?" if close else ""


def reason(error: Exception, most: int = 200) -> str:
    """Return the first line of what a library says, or the error's class; a long one ends with a word, outside parentheses."""
    import textwrap

    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    short = textwrap.shorten(said, most, placeholder=" ...")
    if short.endswith(" ...") and short.count("(") > short.count(")"):
        return short[: short.rindex("(")].rstrip() + " ..."
    return short
