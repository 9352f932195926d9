"""The house: imports run one way, core needs torch alone, the command line is frozen and light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from toys import REPOSITORY

PACKAGE = REPOSITORY / "distprune"
# What a room may import of the others, at module level and inside functions alike.
ALLOWED = {
    "core": {"errors"},
    "store": {"core", "errors"},
    "search": {"core", "store", "errors", "environment", "api"},  # api: the room answers distprune.search(...) itself
    "export": {"core", "store", "errors"},
    "report": {"core", "store", "errors", "result"},
}
CORE_NEEDS = {"torch", "safetensors", "numpy"}


def _modules(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module}
    return set()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(path: Path, *, everywhere: bool) -> set[str]:
    body = [node for node in ast.parse(path.read_text()).body if not _is_type_checking(node)]
    nodes = [inner for node in body for inner in ast.walk(node)] if everywhere else body
    return {name for node in nodes for name in _modules(node)}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        for name in _imports(path, everywhere=True):
            if name.startswith("distprune."):
                other = name.split(".")[1]
                assert other == room or other in ALLOWED[room], f"{path.relative_to(REPOSITORY)} imports {name}"


def test_core_needs_torch_and_safetensors_alone() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        outside = {name.split(".")[0] for name in _imports(path, everywhere=False)} - sys.stdlib_module_names - {"distprune"}
        assert outside <= CORE_NEEDS, f"{path.relative_to(REPOSITORY)} imports {outside - CORE_NEEDS} at module level"


def test_ray_is_imported_by_few() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in _imports(path, everywhere=True))
    }
    assert users == {"search/runner.py", "search/loggers.py", "search/cluster.py", "search/crew.py", "search/access.py", "cli/head.py"}


def test_nothing_is_unpickled() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert "pickle" not in {name.split(".")[0] for name in _imports(path, everywhere=True)}, path
        assert "torch.load(" not in source and "allow_pickle=True" not in source, path


COMMANDS = {
    "search": {"config", "name", "storage", "trials", "address", "simulate", "workers"},
    "resume": {"run", "trials", "cost", "wall", "address", "pip", "uv", "follow"},
    "run": {"config", "to", "device"},
    "plan": {"config"},
    "check": {"config"},
    "list": {"kind"},
    "report": {"run", "watch", "to"},
    "export": {"run", "to", "trial", "max_density", "formats"},
    "replay": {"run", "trial", "device"},
    "sanity": {"run", "trial", "seeds", "device", "to"},
    "apply": {"masks", "model", "weights", "to", "option", "trial", "partial"},
    "bench": {"export", "batch", "threads", "device", "rounds", "to"},
    "dashboard": {"run", "port", "host"},
    "submit": {"config", "address", "name", "storage", "trials", "pip", "uv", "follow"},
    "status": {"job", "address"},
    "logs": {"job", "address", "tail", "follow"},
    "stop": {"job", "address"},
    "fetch": {"job", "address", "to"},
}


def test_the_command_line_is_frozen() -> None:
    import typer

    from distprune.cli.commands import app

    command = typer.main.get_command(app)
    found = {name: {p.name for p in sub.params} - {"help"} for name, sub in command.commands.items()}  # type: ignore[attr-defined]
    assert found == COMMANDS


def _imported_by(*arguments: str) -> tuple[int, set[str]]:
    program = (
        "import sys\nfrom distprune.cli import main\n"
        f"code = main({list(arguments)!r})\n"
        "print('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'ray', 'optuna', 'pyarrow'})), code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    *heavy, code = done.stdout.splitlines()[-1].split()
    return int(code), set(heavy)


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["serach"], ["search"], ["plan", "--colour"], ["export", "x"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code, heavy = _imported_by(*arguments)
    assert not heavy and code == (0 if "--help" in arguments else 2)


@pytest.mark.parametrize("arguments", [["list", "criterion"], ["plan", "configs/recipe.yaml"], ["check", "configs/digits.yaml"]])
def test_looking_commands_do_not_import_ray(arguments: list[str]) -> None:
    code, heavy = _imported_by(*arguments)
    assert code == 0 and "ray" not in heavy
