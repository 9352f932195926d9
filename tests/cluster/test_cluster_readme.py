"""Every command of `cluster/README.md` is one: it exists, with these options, and the files that it names are there."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from distprune.cli.commands import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster" / "README.md").read_text()
SCRIPT = "cluster/local_two_nodes.sh"


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of all code blocks in words; those that one is to run elsewhere are commands, too."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            yield words
            if words[:2] == [SCRIPT, "on"]:
                yield words[3:]
            if words[:2] == ["ray", "exec"]:
                yield shlex.split(words[3])


def _check(words: Sequence[str]) -> None:
    """Raise, or exit, unless these are words that their program understands."""
    if words[0] == "distprune":
        _parse(typer.main.get_command(app), words[1:])
    elif words[0] == "ray":
        from ray.scripts.scripts import cli

        _parse(cli, words[1:])
    elif words[0] == SCRIPT:
        known = re.findall(r"^#   local_two_nodes.sh (\w+)", (ROOT / SCRIPT).read_text(), re.MULTILINE)
        assert words[1] in known, words
    for word in words:
        if re.match(r"(cluster|configs)/", word):
            assert (ROOT / word).exists(), word


def _parse(command: Any, words: Sequence[str]) -> None:
    if hasattr(command, "commands"):
        assert words[0] in command.commands, words
        _parse(command.commands[words[0]], words[1:])
    else:
        command.make_context(command.name, list(words))


COMMANDS = list(_commands(TEXT))


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)[:80]) for words in COMMANDS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_are_understood(words: list[str]) -> None:
    _check(words)


@pytest.mark.parametrize(
    "line",
    [
        "distprune submt configs/digits.yaml --address http://127.0.0.1:8265",
        "distprune submit configs/digits.yaml --adress http://127.0.0.1:8265",
        "distprune submit --address http://127.0.0.1:8265",
        "ray start --head --dashbord-host=127.0.0.1",
        "ray job stopp digits",
        "cluster/local_two_nodes.sh onn head ray status",
        "cluster/local_two_nodes.sh on head distprune nothing",
        "ray up cluster/azure.yaml",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_commands_are_refused(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        for words in _commands(f"```bash\n{line}\n```\n"):
            _check(words)


def test_all_that_a_user_does_is_there() -> None:
    said = {tuple(words[:2]) for words in COMMANDS if words[0] == "distprune"}
    assert {("distprune", name) for name in ("submit", "status", "logs", "stop", "fetch", "resume")} <= said
    files = {str(path.relative_to(ROOT / "cluster")) for path in (ROOT / "cluster").rglob("*") if path.is_file()}
    linked = set(re.findall(r"\]\(([^)#]+)\)", TEXT))
    assert linked <= files, "links lead to files"
    assert files - linked <= {"README.md", "Dockerfile.dockerignore"}, "every file is explained"
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_the_token_comes_first() -> None:
    """No command that talks to a cluster stands before the one that asks for a token."""
    first = next(index for index, words in enumerate(COMMANDS) if words[0] == "ray" or words[:2] == ["distprune", "submit"])
    assert ["export", "RAY_AUTH_MODE=token"] in COMMANDS[:first]
