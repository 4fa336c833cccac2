"""The command line: one verb, one file. A verb parses, calls the library and shows what came back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from robustify import console, files
from robustify.cli import (
    blend,
    card,
    compare,
    copy,
    ends,
    env,
    evaluate,
    export,
    finetune,
    ls,
    options,
    push,
    sensitivity,
    show,
)
from robustify.errors import UserError


class Verbs(TyperGroup):
    """Turns a user's mistake and an interruption into a line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in (ctx.obj or {}).get("arguments", sys.argv)
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _told(error, as_json) from None
        except (PermissionError, FileNotFoundError, NotADirectoryError, UnicodeDecodeError) as error:
            named = getattr(error, "filename", None) or "a file"
            reason = getattr(error, "strerror", None) or error
            console.mistake(f"{named}: {reason}", "choose a path that can be read or written")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            console.note("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if full := files.no_room(error, None):
                raise _told(full, as_json) from None
            if meant := options.meant(error):
                error.message = f"{error.message}: {meant}"  # pyright: ignore[reportAttributeAccessIssue]
                error.possibilities = []  # pyright: ignore[reportAttributeAccessIssue]
            if as_json and not hasattr(error, "exit_code"):  # typer's own have one
                console.result_json({"error": f"{type(error).__name__}: {error}", "hint": ""})
            raise


def _told(error: UserError, as_json: bool) -> typer.Exit:
    """Tell a user's mistake and return the exit that it ends in."""
    if as_json:
        console.result_json({"error": error.message, "hint": error.hint})
    if not error.told:
        console.mistake(error.message, error.hint)
    return typer.Exit(2)


app = typer.Typer(
    cls=Verbs,
    name="robustify",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb, run in {
    "finetune": finetune.run,
    "evaluate": evaluate.run,
    "compare": compare.run,
    "blend": blend.run,
    "sensitivity": sensitivity.run,
    "export": export.run,
    "card": card.run,
    "push": push.run,
    "ls": ls.run,
    "show": show.run,
    "copy": copy.run,
    "env": env.run,
}.items():
    app.command(verb)(run)


def _version(asked: bool) -> None:
    if asked:
        from robustify.environment import version_of

        console.result(version_of("robustify"))
        raise typer.Exit


@app.callback()
def robustify(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Harden a pretrained image classifier against adversarial perturbations, measure it, publish it.

    \b
    robustify finetune quickstart                harden a small network
    robustify evaluate runs/digits-wasserstein   what does it hold against?
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when all went well, 2 for a user's mistake, 130 when interrupted."""
    console.quiet_libraries()
    given = list(sys.argv[1:] if arguments is None else arguments)
    with ends.code_kept():
        try:
            app(args=given, prog_name="robustify", obj={"arguments": given})
        finally:
            console.flush()
