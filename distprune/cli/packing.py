"""What travels with a job: the search, the user's modules, data folders that it names by a relative path, and a pinned environment.

Everything is looked for from the folder that the command is run in, and lies at the same relative path in the job's working folder, on
every node: so the file that runs here runs there unchanged. Large data stays where it is, under an absolute path that the nodes have.
"""

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distprune.cli import aboard
from distprune.environment import environment
from distprune.errors import UserError

MOST_BYTES = 200 * 10**6  # of data; Ray copies the working folder to every node that runs a trial
_ARCHIVES = (".whl", ".tar.gz", ".zip")
_PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[^]]*\])?\s*(===?\s*[^\s,*;]+|@\s*[a-z+]+://\S+)\s*($|;|--hash)")
_NESTED = re.compile(r"(-r|-c|-e|--requirement|--constraint|--editable)\b")


def pack(folder: Path, *, job: str, keep: str | None, plain: Mapping[str, Any] | None = None, modules: list[Path] | None = None) -> None:
    """Fill the working folder of a job. `keep` is where the head keeps a copy, for the jobs that go on with this search."""
    for module in modules or ():
        if module.is_dir():
            shutil.copytree(module, folder / module.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(module, folder)
    if plain is not None:
        import yaml

        (folder / "search.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        for path in _data(plain):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
            else:
                shutil.copy(path, target)
    shutil.copy(aboard.__file__, folder / aboard.SCRIPT)
    facts = {"job": job, "keep": keep, "versions": environment(), "sent": plain is not None or bool(modules)}
    (folder / aboard.FACTS).write_text(json.dumps(facts))


def module_names(plain: Mapping[str, Any]) -> list[str]:
    """The top-level modules that a search imports from the user."""
    return sorted({path.split(":")[0].split(".")[0] for path in _imports(plain)} - {"distprune"})


def files_of(name: str) -> list[Path]:
    """The file or folder of this folder that a module is imported from, if it is."""
    package, module, spec = Path(name), Path(f"{name}.py"), importlib.util.find_spec(name)
    if (package / "__init__.py").is_file():
        return [package]
    if module.is_file():
        return [module]
    if package.is_dir() and (spec is None or spec.origin is None):  # without __init__.py: comes after installed ones
        return [package]
    return []


def modules_here(names: list[str]) -> list[Path]:
    """Files and folders of this folder to send along; installed packages are expected on the nodes. UserError for what is neither."""
    here = []
    for name in names:
        here += (paths := files_of(name))
        if not paths and importlib.util.find_spec(name) is None:
            raise UserError(f"'{name}' of an import is neither in {Path.cwd()} nor installed. Run from the folder that holds it.")
    return here


def _imports(value: Any) -> Iterator[str]:
    """Every 'package.module:function' in a search."""
    if isinstance(value, Mapping):
        yield from [item for key, item in value.items() if key == "import"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _imports(item)
    elif isinstance(value, str) and value.startswith("import:"):
        yield value.removeprefix("import:")


def _data(plain: Mapping[str, Any]) -> list[Path]:
    """Relative paths among the options of the data that are there. Raises UserError for what cannot be sent."""
    data = plain["recipe"].get("data")
    found = []
    for option, value in data.items() if isinstance(data, Mapping) else ():
        if option in ("name", "import") or not isinstance(value, str) or not value or value.startswith(("/", "~")) or "://" in value:
            continue
        path, where = Path(value), f"recipe.data.{option}"
        if not path.exists():
            if option == "folder":
                raise UserError(f"{where} '{value}' is not in {Path.cwd()}. Write the absolute path that it has on every node.")
            continue  # some other text
        if ".." in path.parts:
            raise UserError(f"{where} '{value}' is outside of {Path.cwd()}. Run from a folder that holds it, or write an absolute path.")
        found.append(path)
    size = sum(file.stat().st_size for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    if size > MOST_BYTES:
        raise UserError(
            f"recipe.data is {size / 1e6:,.0f} MB, and at most {MOST_BYTES / 1e6:.0f} MB are sent with a job. Put it on every node, or on "
            "a mount that all nodes see, and write its absolute path there."
        )
    return found


def requirements(path: Path, folder: Path) -> list[str]:
    """The lines of a requirements file. Archives that lie here are copied into `folder` and named there.

    Raises UserError unless every line pins one version: nodes that come up at different times must get the same.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}.") from error
    found = []
    for line in (re.sub(r"(^|\s)#.*", "", raw).strip() for raw in re.sub(r"\\\n", " ", text).splitlines()):
        if _NESTED.match(line):
            raise UserError(
                f"{path} must be one file with nothing in it from elsewhere, got '{line}'. Write one: uv export --no-emit-project."
            )
        archive = line.split(";")[0].strip()
        if archive.endswith(_ARCHIVES) and (path.parent / archive).is_file():
            found.append(_sent(path.parent / archive, folder) + line[len(archive) :])
        elif line.startswith("-") or _PINNED.match(line):
            found.append(line)
        elif line:
            raise UserError(
                f"{path} must pin every version, as in 'name==1.2', got '{line}'. Write them all: uv pip compile {path} -o pinned.txt."
            )
    return found


def _sent(archive: Path, folder: Path) -> str:
    """Copies an archive; returns the line that installs it on a node. Its path changes with what it holds: Ray keeps environments by it."""
    place = Path("wheels", hashlib.sha256(archive.read_bytes()).hexdigest()[:16], archive.name)
    (folder / place.parent).mkdir(parents=True, exist_ok=True)
    shutil.copy(archive, folder / place)
    return f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{place}"
