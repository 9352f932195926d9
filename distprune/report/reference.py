"""The page docs/api.md: every public name of the package, as its signature and docstring say."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import distprune
from distprune.report.prose import markdown, table

PAGE = "docs/api.md"
_WIDTH = 110
_HEAD = """# Python API

Everything that the command line does, and what needs no cluster besides. `import distprune as dp` imports nothing heavy: torch, Ray and
Optuna are loaded by the first name that needs them, and `dp.prune` never needs the latter two.

What the caller writes wrong raises `dp.UserError`, whose text says the rule, the value and the way out in one line."""
# What public functions return, where it has no public name.
_RETURNED = {
    "Outcome": "distprune.api",
    "TrialResult": "distprune.result",
    "Sanity": "distprune.report.sanity",
    "Replay": "distprune.search.replay",
    "Applied": "distprune.export.applied",
    "Bench": "distprune.export.bench",
    "Match": "distprune.core.masks",
    "Held": "distprune.core.prune",
}


def page() -> str:
    """The page docs/api.md."""
    public = {name: getattr(importlib.import_module(distprune._WHERE[name]), name) for name in distprune.__all__}
    functions = {name: thing for name, thing in public.items() if not inspect.isclass(thing)}
    classes = {name: thing for name, thing in public.items() if inspect.isclass(thing)}
    returned = {name: getattr(importlib.import_module(where), name) for name, where in _RETURNED.items()}
    blocks = [_HEAD, "## Functions"]
    for name, function in functions.items():
        blocks += [f"### dp.{name}", _signature(function), *markdown(function)]
    blocks.append("## Classes")
    for name, kind in classes.items():
        blocks += [f"### dp.{name}", *_class(kind)]
    blocks += ["## What functions return"]
    for name, kind in returned.items():
        blocks += [f"### {name}", *_class(kind)]
    return "\n\n".join(blocks) + "\n"


def _class(kind: type) -> Iterator[str]:
    tree = _tree(kind)
    assert isinstance(tree, ast.ClassDef)
    yield from markdown(kind)
    if dataclasses.is_dataclass(kind):
        yield f"```text\n{_fields(kind, tree)}\n```"
    elif "__init__" in vars(kind):
        yield _signature(vars(kind)["__init__"], tree.name)
    properties, methods = [], []
    for name, member in vars(kind).items():
        inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
            continue
        if isinstance(member, property):
            node = _tree(inner)
            assert isinstance(node, ast.FunctionDef) and node.returns is not None
            properties.append([f"`{name}`", f"`{_plain(node.returns)}`", " ".join(markdown(inner))])
        else:
            methods += [f"#### {kind.__name__}.{name}", _signature(inner), *markdown(inner)]
    if properties:
        yield table(["property", "type", ""], properties)
    yield from methods


def _fields(kind: type, tree: ast.ClassDef) -> str:
    """The fields of a dataclass as they are written, with their comments."""
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_")]
    return "\n".join(line.strip() for node in fields for line in lines[node.lineno - 1 : node.end_lineno])


def _tree(thing: Any) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def _signature(function: Any, name: str = "") -> str:
    """A function's signature as it is written, a parameter a line where it is long."""
    tree = _tree(function)
    assert isinstance(tree, ast.FunctionDef)
    returns = f" -> {_plain(tree.returns)}" if tree.returns is not None and not name else ""
    name = name or tree.name
    arguments = tree.args
    for argument in [*arguments.args, *arguments.kwonlyargs]:
        if argument.annotation is not None:
            argument.annotation = ast.parse(_plain(argument.annotation), mode="eval").body
    arguments.args = [argument for argument in arguments.args if argument.arg not in ("self", "cls")]
    found = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", argument) for argument in _split(ast.unparse(arguments))]
    line = f"{name}({', '.join(found)}){returns}"
    if len(line) > _WIDTH:
        line = f"{name}(\n    " + ",\n    ".join(found) + f",\n){returns}"
    return f"```text\n{line}\n```"


def _plain(annotation: ast.expr) -> str:
    """An annotation without the quotes of one that is read late."""
    return str(annotation.value) if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str) else ast.unparse(annotation)


def _split(arguments: str) -> list[str]:
    """At the commas outside of all brackets."""
    found, depth, start = [], 0, 0
    for index, letter in enumerate(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append(arguments[start:index].strip())
            start = index + 1
    return [argument for argument in (*found, arguments[start:].strip()) if argument]
