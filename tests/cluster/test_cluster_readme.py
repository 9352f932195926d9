"""What `cluster/README.md` has to say is there, in its order; `tests/docs` holds that its commands are understood."""

import re
from pathlib import Path

import pages

PAGE = "cluster/README.md"
TEXT = pages.read(PAGE)
COMMANDS = list(pages.commands(PAGE))
FOLDER = Path(__file__).parents[2] / "cluster"


def test_all_that_a_user_does_is_there() -> None:
    said = {tuple(words[:2]) for words in COMMANDS if words[0] == "distprune"}
    assert {("distprune", name) for name in ("submit", "status", "logs", "stop", "fetch", "resume")} <= said
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    linked = set(re.findall(r"\]\(([^)#]+)\)", TEXT))
    assert linked <= files, "links lead to files"
    assert files - linked <= {"README.md", "Dockerfile.dockerignore"}, "every file is explained"


def test_the_token_comes_first() -> None:
    """No command that talks to a cluster stands before the one that asks for a token."""
    first = next(index for index, words in enumerate(COMMANDS) if words[0] == "ray" or words[:2] == ["distprune", "submit"])
    assert ["export", "RAY_AUTH_MODE=token"] in COMMANDS[:first]
