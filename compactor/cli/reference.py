"""Writes docs/cli.md from the commands themselves, and checks that it is current.

python -m compactor.cli.reference docs/cli.md            # write
python -m compactor.cli.reference --check docs/cli.md    # exit code 1 when it is not current
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compactor import console, errors
from compactor.cli.app import COMMANDS, first_sentence, load_command, umbrella
from compactor.cli.failures import BROKEN_PIPE_EXIT_CODE, DEBUG_VARIABLE

SHORT_NAMES = {"compact": "compact", "query": "query", "batch": "batch-compact"}
OPENING = f"""# Commands

Written by `make docs` from the commands; do not edit.

Every command is `compactor NAME`, also as `python -m compactor NAME`; the three of daily use are commands of
their own. Answers go to standard output, everything else to standard error; there are no colours and no bars
without a terminal, and no colours where `NO_COLOR` is set. A failure is one line that says what happened and
what to do; `{DEBUG_VARIABLE}=1` adds the traceback.
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    parts = [OPENING, *_command("compactor", umbrella(), listed=True)]
    for name in COMMANDS:
        parts += _command(f"compactor {name}", load_command(name), short=SHORT_NAMES.get(name))
    return "\n".join([*parts, exit_codes()])


def exit_codes() -> str:
    """Return the table of exit codes, made from errors.py."""
    rows = [
        (0, "success", "The command did what it was asked to do."),
        (1, "internal error", "A bug; please report it."),
    ]
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.CompactorError) and kind is not errors.CompactorError:
            rows.append((kind.exit_code, name, _one_line(kind.__doc__)))
    rows += [
        (errors.INTERRUPTED_EXIT_CODE, "interrupted", "Ctrl-C, or SIGTERM; no half-written file is left."),
        (BROKEN_PIPE_EXIT_CODE, "closed pipe", "Whoever read the output stopped reading."),
    ]
    table = [f"| {code} | {name} | {what} |" for code, name, what in sorted(rows)]
    return "\n".join(["## Exit codes\n", "| code | failure | when |", "| --- | --- | --- |", *table, ""])


def _command(path: str, command: Any, *, short: str | None = None, listed: bool = False) -> Iterator[str]:
    """Yield the section of a command, then those of its subcommands unless they are only ``listed``."""
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    below = _below(command)
    yield f"## {short or path}\n"
    yield f"`{_usage(short or path, parameters, bool(below))}`" + (f" or `{path}`\n" if short else "\n")
    yield inspect.cleandoc(command.help or "").replace("\b\n", "") + "\n"
    if parameters:
        rows = ["| option | what | default |", "| --- | --- | --- |", *map(_row, parameters), ""]
        yield "\n".join(rows)
    if listed:
        yield ("\n".join(f"- `{path} {name}`: {first_sentence(child.help)}" for name, child in below.items()) + "\n")
    else:
        for name, child in below.items():
            yield from _command(f"{path} {name}", child)


def _below(command: Any) -> dict[str, Any]:
    if not hasattr(command, "list_commands"):
        return {}
    context = command.make_context(command.name or "", [], resilient_parsing=True)
    return {name: command.get_command(context, name) for name in command.list_commands(context)}


def _usage(path: str, parameters: list[Any], has_commands: bool) -> str:
    words = [path, "[OPTIONS]"]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            name = _metavar(parameter) + ("..." if parameter.nargs != 1 else "")
            words.append(name if parameter.required else f"[{name}]")
    return " ".join(words + ["COMMAND ..."] * has_commands)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = _metavar(parameter)
    else:
        switches = [", ".join(parameter.opts), *parameter.secondary_opts]
        names = f"{' / '.join(switches)} {_metavar(parameter)}".rstrip()
    what, default = parameter.help or "", _default(parameter)
    if "[default: " in what:  # a default that config.py fills in later
        what, _, default = what.removesuffix("]").partition(" [default: ")
    if parameter.envvar:
        what += f" Environment: `{parameter.envvar}`."
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{names}`", what, default)) + " |"


def _metavar(parameter: Any) -> str:
    if parameter.param_type_name == "option" and isinstance(parameter.default, bool):
        return ""
    return parameter.metavar or str(parameter.name).upper()


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    return "" if value is None or isinstance(value, bool) or value == () else str(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def main(arguments: list[str]) -> int:
    """Write or check the file; return the exit code."""
    check = arguments[:1] == ["--check"]
    path = Path(arguments[-1])
    text = reference()
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    console.error(f"{path} is not current; run `make docs`.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
