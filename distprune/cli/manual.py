"""The pages of the manual that are generated: `python -m distprune.cli.manual` writes them, and a test compares."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import distprune
from distprune.cli.commands import app
from distprune.report import framework, methods, reference, taxonomy
from distprune.report.prose import table, text

COMMANDS = "docs/commands.md"
_HEAD = """# Commands

`distprune COMMAND --help` says the same. Exit codes: 0 for success, 1 for a comparison that failed, 2 for what was written wrong, with one
line that says what to write; 130 after Ctrl-C. Under `uv run`, write `uv run distprune`."""


def pages() -> dict[str, str]:
    """Path from the root of the repository -> text, of every generated page."""
    return {
        framework.PAGE: framework.page(),
        taxonomy.PICTURE: taxonomy.picture(),
        reference.PAGE: reference.page(),
        COMMANDS: _commands(),
        **methods.pages(),
    }


def _commands() -> str:
    blocks = [_HEAD]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        blocks += [f"## {name}", *_command(name, command)]
    return "\n\n".join(blocks) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option" and parameter.name != "help"]
    usage = [word.name.upper() if word.required else f"[{word.name.upper()}]" for word in arguments]
    yield f"```text\ndistprune {' '.join([name, *usage, *['[OPTIONS]'] * bool(options)])}\n```"
    yield text(command.help or "")
    rows = [[f"`{word.name.upper()}`", "", text(word.help or "")] for word in arguments]
    for option in options:
        flags = " / ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
        rows.append([flags, "required" if option.required else _default(option.default), text(option.help or "")])
    if rows:
        yield table(["", "default", ""], rows)


def _default(value: Any) -> str:
    return "" if value in (None, False) else "yes" if value is True else f"`{value}`"


if __name__ == "__main__":
    root = Path(distprune.__file__).parent.parent
    for path, content in pages().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
