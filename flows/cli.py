"""The command ``lrpq``.

    lrpq plan MODEL --gpus 8
    lrpq compress MODEL --budget 3.25 --output DIR
    lrpq reallocate RUN --budget 4.25 --output DIR
    lrpq evaluate DIR --reference MODEL --evaluation SOURCE
    lrpq compare MODEL --budgets 3.25,4.25 --methods lrpq,control
    lrpq runs
    lrpq status RUN
    lrpq gc STORE
    lrpq submit CONFIG --address http://HEAD:8265
    lrpq serve --config CONFIG --cron '0 3 * * *'

Torch, Ray and Prefect are imported by the commands that need them, when they need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from flows.boundary import EXIT_INTERRUPTED, EXIT_USER, Failure, describe, one_line
from flows.commands.compare import compare
from flows.commands.compress import compress
from flows.commands.evaluate import evaluate
from flows.commands.gc import gc
from flows.commands.plan import plan
from flows.commands.reallocate import reallocate
from flows.commands.runs import runs, status
from flows.commands.serve import serve
from flows.commands.submit import submit
from flows.leaving import leave
from lrpq import __version__

app = typer.Typer(
    name="lrpq",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=False,
)


@app.callback(invoke_without_command=True)
def lrpq(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Compress language models to a hard size budget, with the bits where they are relevant."""
    if version:
        typer.echo(f"lrpq {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USER)


COMMANDS = (plan, compress, reallocate, evaluate, compare, runs, status, gc, submit, serve)
for _command in COMMANDS:
    app.command()(_command)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; see ``flows.boundary`` for the exit codes."""
    leave(run(list(sys.argv[1:] if argv is None else argv)))


def run(arguments: list[str]) -> int:
    """Run a command; failures become one line on stderr and, with ``--json``, a document on stdout."""
    try:
        code = get_command(app)(args=arguments, prog_name="lrpq", standalone_mode=False)
    except TyperException as error:
        failure = Failure(kind="UsageError", message=_usage(error, arguments), exit_code=EXIT_USER)
    except Exception as error:
        if os.environ.get("LRPQ_DEBUG") == "1":
            raise
        failure = describe(error, argv=arguments)
    else:
        if code != EXIT_INTERRUPTED:
            return code if isinstance(code, int) else 0
        failure = Failure(kind="Interrupted", message="interrupted", exit_code=EXIT_INTERRUPTED)
    typer.echo(failure.message if failure.exit_code == EXIT_INTERRUPTED else f"error: {failure.message}", err=True)
    if "--json" in arguments:
        from flows.output import write_document

        write_document(failure.document())
    return failure.exit_code


def _usage(error: TyperException, arguments: Sequence[str]) -> str:
    known = {command.__name__ for command in COMMANDS}
    command = next((f"lrpq {part}" for part in arguments if part in known), "lrpq")
    return one_line(f"{error.format_message().rstrip('.')}; see {command} --help")


if __name__ == "__main__":
    main()
