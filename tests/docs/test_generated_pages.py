"""Pages that say what is registered are the tables as they are, and leave nothing out."""

import importlib
import inspect

import pytest
from toys import REPOSITORY

import distprune as dp
from distprune.cli.manual import pages
from distprune.core import registry
from distprune.report.framework import PLURALS, tables
from distprune.report.prose import parts, text

# Tables of methods, whose entries are mathematics; the others are networks, data, and what surrounds them.
METHODS = ("paradigm", "criterion", "allocator", "granularity", "regularizer", "optimizer", "decay", "task", "cost")


def test_generated_pages_are_what_the_generator_gives() -> None:
    for path, content in pages().items():
        assert (REPOSITORY / path).read_text() == content, f"{path}: run python -m distprune.cli.manual"


@pytest.mark.parametrize("name", tables())
def test_every_entry_is_on_its_page_with_options_paper_and_file(name: str) -> None:
    page = (REPOSITORY / f"docs/methods/{PLURALS[name]}.md").read_text()
    for entry in tables()[name]:
        level = "###" if name == "decay" else "##"
        section = page.partition(f"\n{level} {entry.name}\n")[2].partition(f"\n{level} ")[0]
        assert text(entry.summary) in section and text(entry.paper) in section and entry.file.name in section
        for option in entry.options:
            assert f"| `{option}` |" in section, (entry.name, option)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_formula(name: str) -> None:
    page = (REPOSITORY / f"docs/methods/{PLURALS[name]}.md").read_text()
    for entry in tables()[name]:
        _, formula, _ = parts(entry.function)
        assert formula and f"```text\n{formula}\n```" in page, entry.name


def test_every_paradigm_is_in_the_picture_and_in_the_table_of_the_framework() -> None:
    drawn, page = (REPOSITORY / "docs/figures/taxonomy.svg").read_text(), (REPOSITORY / "docs/framework.md").read_text()
    for entry in registry.paradigm:
        assert f"[`{entry.name}`](methods/paradigms.md#{entry.name}) |" in page
        assert entry.name == "dense" or entry.name in drawn


def test_every_public_name_is_on_the_page_of_the_api_with_its_parameters() -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    for name in dp.__all__:
        section = page.partition(f"\n### dp.{name}\n")[2].partition("\n### ")[0]
        thing = getattr(importlib.import_module(dp._WHERE[name]), name)  # a room has the name of a function
        assert text((inspect.getdoc(thing) or "?").splitlines()[0]) in section, name
        if inspect.isfunction(thing):
            assert all(parameter in section for parameter in inspect.signature(thing).parameters), name
