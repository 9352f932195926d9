"""Every command that a page shows is one: it exists, with these options, and the files that it names are there."""

import pages
import pytest
import typer

from distprune.cli.commands import app

COMMANDS = [(page, words) for page in pages.pages() for words in pages.commands(page)]


@pytest.mark.parametrize("words", [pytest.param(words, id=f"{page}: {' '.join(words)[:80]}") for page, words in COMMANDS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_are_understood(words: list[str]) -> None:
    pages.check(words)


@pytest.mark.parametrize("page", pages.pages())
def test_commands_in_running_text_have_known_names_and_options(page: str) -> None:
    for text in pages.mentions(page):
        pages.check_mention(text)


@pytest.mark.parametrize(
    "line",
    [
        "distprune submt configs/digits.yaml --address http://127.0.0.1:8265",
        "distprune submit configs/digits.yaml --adress http://127.0.0.1:8265",
        "distprune submit --address http://127.0.0.1:8265",
        "uv run distprune search",
        "uv run --extra clusters distprune list",
        "python -m distprune exprt runs/digits --to exported/digits",
        "distprune check configs/digit.yaml",
        'pip install "distprune[onyx]"',
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
        for words in pages.commands("a page", f"```bash\n{line}\n```\n"):
            pages.check(words)


@pytest.mark.parametrize("text", ["exprt RUN", "export RUN --formts onnx"])
def test_wrong_mentions_are_refused(text: str) -> None:
    with pytest.raises(AssertionError):
        pages.check_mention(text)


def test_every_command_is_shown_somewhere_with_what_it_needs() -> None:
    shown = {words[words.index("distprune") + 1] for _, words in COMMANDS if "distprune" in words[:5] and words[-1] != "distprune"}
    assert set(typer.main.get_command(app).commands) <= shown  # type: ignore[attr-defined]
