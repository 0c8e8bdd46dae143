"""Knows which command lies in which module, and how each is started. Knows what no command does.

The umbrella imports a command's module when the command is called, or when help lists them all.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import compactor
from compactor import console
from compactor.cli.failures import exit_code_of

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
COMMANDS = {
    "compact": "compactor.cli.compact:compact_command",
    "query": "compactor.cli.query:query_command",
    "batch": "compactor.cli.batch:batch_command",
    "recompact": "compactor.cli.recompact:recompact_command",
    "budget": "compactor.cli.budget:budget_command",
    "eval": "compactor.cli.eval:eval_command",
    "bench": "compactor.cli.bench:app",
    "inspect": "compactor.cli.inspect:inspect_command",
    "models": "compactor.cli.models:app",
    "doctor": "compactor.cli.doctor:doctor",
    "demo": "compactor.cli.demo:demo_command",
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; None when there is no such command."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None


def load_command(name: str) -> Any:
    """Import a command's module; return its function or Typer app as a command called ``name``."""
    module, attribute = COMMANDS[name].split(":")
    found = getattr(import_module(module), attribute)
    if isinstance(found, typer.Typer):
        command: Any = typer.main.get_command(found)
        command.context_settings = {**CONTEXT_SETTINGS, **command.context_settings}
        command.rich_markup_mode = None
        command.name = name
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name, context_settings=CONTEXT_SETTINGS)(found)
        command = typer.main.get_command(single)
    command.short_help = first_sentence(command.help)
    return command


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a help text, on one line."""
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".") + "."


def umbrella() -> Any:
    """Return the command ``compactor`` with all the others below it."""
    app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, context_settings=CONTEXT_SETTINGS)
    app.callback(invoke_without_command=True)(_umbrella)
    return typer.main.get_command(app)


def _umbrella(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn long documents into small KV caches, and ask them questions."""
    if version:
        console.answer(f"kv-compactor {compactor.__version__}")
    elif ctx.invoked_subcommand is None:
        console.answer(ctx.get_help())
    else:
        return
    raise typer.Exit


def run(name: str, load: Callable[[], Any], arguments: list[str] | None = None) -> NoReturn:
    """Load a command, run it with ``arguments`` (by default the process's own), leave with its exit code."""

    if arguments is None:
        stop_like_ctrl_c()

    def invoke() -> None:
        given = sys.argv[1:] if arguments is None else list(arguments)
        command = load()
        with command.make_context(name, given) as context:
            command.invoke(context)

    sys.exit(exit_code_of(invoke))


def stop_like_ctrl_c() -> None:
    """Let SIGTERM and a closed terminal stop the process as Ctrl-C does: temporary files are removed."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, signal.default_int_handler)


def main() -> NoReturn:
    """Start ``compactor``."""
    run("compactor", umbrella)


def compact_main() -> NoReturn:
    """Start ``compact``."""
    run("compact", lambda: load_command("compact"))


def query_main() -> NoReturn:
    """Start ``query``."""
    run("query", lambda: load_command("query"))


def batch_main() -> NoReturn:
    """Start ``batch-compact``."""
    run("batch-compact", lambda: load_command("batch"))
