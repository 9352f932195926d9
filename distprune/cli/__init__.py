"""The command line: thin, every command is a call that the Python API also has. Nothing heavy is imported before a command runs."""

import sys
from typing import Any

import typer

from distprune.cli.commands import app
from distprune.errors import UserError

_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer typer carries in itself


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Errors of the user are one line on stderr and exit code 2."""
    try:
        result = app(arguments, prog_name="distprune", standalone_mode=False)
        return int(result or 0)
    except UserError as error:
        return _complain(str(error))
    except _UsageError as error:
        path = error.ctx.command_path if error.ctx else "distprune"
        return _complain(f"{error.format_message().rstrip('.')}. See '{path} --help'.")
    except (typer.Abort, KeyboardInterrupt):
        return 130


def _complain(message: str) -> int:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    return 2
