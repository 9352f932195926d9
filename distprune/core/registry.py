"""Tables of named entries: a decorated function is an entry, its keyword-only parameters are its options.

The signature alone feeds the check of a configuration, `distprune list` and, where an annotation holds a range
(`options.py`), the default search space. Adding an entry is one file with one function in the room of its table.
"""

import hashlib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distprune.core.options import REQUIRED, Option, options_of
from distprune.errors import UserError, unknown


@dataclass(frozen=True)
class Entry:
    """A function in a table."""

    table: str
    name: str
    function: Callable[..., Any]
    paper: str
    version: int
    facts: Mapping[str, Any]
    options: Mapping[str, Option] = field(repr=False)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def file(self) -> Path:
        """Where the entry is written."""
        return Path(inspect.getsourcefile(inspect.unwrap(self.function)) or "")


class Table:
    """The entries of one kind, found by importing every module of `room` at the first look-up."""

    def __init__(self, kind: str, room: str, **facts: Any) -> None:
        self.kind, self._room, self._facts = kind, room, facts
        self._entries: dict[str, Entry] = {}
        self._loaded = False
        TABLES[kind] = self

    def __call__(self, name: str, *, paper: str = "", version: int = 1, **facts: Any) -> Callable[[Any], Any]:
        """Decorator that enters a function under `name`. `facts` say what the table's users must know before calling it."""
        if extra := set(facts) - set(self._facts):
            raise TypeError(f"{self.kind} entries have no fact {sorted(extra)}; known: {sorted(self._facts)}")

        def enter(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                raise TypeError(f"{self.kind} '{name}' is entered twice: {self._entries[name].file} and {function.__code__.co_filename}")
            self._entries[name] = self._entry(name, function, paper, version, facts)
            return function

        return enter

    def _entry(self, name: str, function: Callable[..., Any], paper: str, version: int, facts: Mapping[str, Any]) -> Entry:
        return Entry(self.kind, name, function, paper, version, {**self._facts, **facts}, options_of(function))

    def _load(self) -> dict[str, Entry]:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._room)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{self._room}.{module.name}")
        return self._entries

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._load())

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._load()[name] for name in self.names()])

    def get(self, name: str) -> Entry:
        """The entry called `name`, or the user's function where name is 'import:package.module:function'."""
        if name.startswith("import:"):
            function = import_object(name.removeprefix("import:"), f"{self.kind}.import")
            entered = next((entry for entry in self._entries.values() if entry.function is function), None)
            return replace(entered, name=name) if entered else self._entry(name, function, "", 1, {})
        entries = self._load()
        if name not in entries:
            raise unknown(self.kind, name, entries)
        return entries[name]

    def read(self, value: Any, where: str) -> "Choice":
        """A choice from YAML: `snip`, `{name: snip, batches: 2}` or `{import: "pkg.mod:fn", ...}`."""
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            return self.choose(value, where=where)
        if not isinstance(value, Mapping) or ("name" in value) == ("import" in value):
            raise UserError(
                f"{where} must be a name or a mapping with 'name' or 'import', got {value!r}. Known: {', '.join(self.names())}."
            )
        options = {str(key): item for key, item in value.items() if key not in ("name", "import")}
        name = f"import:{value['import']}" if "import" in value else str(value["name"])
        return self.choose(name, where=where, **options)

    def choose(self, name: str, *, where: str = "", **options: Any) -> "Choice":
        """A checked choice of `name` with `options`. Options that equal their default are dropped."""
        entry, where = self.get(name), where or self.kind
        checked = {}
        for key, value in options.items():
            if key not in entry.options:
                raise unknown(f"option of {where} {name}:", key, entry.options)
            value = entry.options[key].check(value, f"{where}.{key}")
            if value != entry.options[key].default:
                checked[key] = value
        missing = [key for key, option in entry.options.items() if option.default is REQUIRED and key not in checked]
        if missing:
            raise UserError(f"{where} {name} needs {', '.join(missing)}. Write {where}: {{name: {name}, {missing[0]}: ...}}.")
        return Choice(self.kind, name, dict(sorted(checked.items())))


TABLES: dict[str, Table] = {}


@dataclass(frozen=True)
class Choice:
    """An entry by name with its non-default options: plain data, the form in which recipes and stages hold behaviour."""

    table: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        """What the name stands for."""
        return TABLES[self.table].get(self.name)

    def __call__(self, *args: Any, **extra: Any) -> Any:
        """Call the entry with its options."""
        return self.entry.function(*args, **{**self.options, **extra})

    def option(self, name: str) -> Any:
        """The value of an option, default included."""
        return self.options.get(name, self.entry.options[name].default)

    def plain(self) -> Any:
        """As YAML writes it; `Table.read` is the inverse."""
        if not self.options and not self.name.startswith("import:"):
            return self.name
        head = {"import": self.name.removeprefix("import:")} if self.name.startswith("import:") else {"name": self.name}
        return {**head, **{key: list(v) if isinstance(v, tuple) else v for key, v in self.options.items()}}

    def identity(self) -> dict[str, Any]:
        """What a key depends on: name and version, or for a user's function its path and the hash of its file."""
        head: dict[str, Any] = {"name": self.name}
        if self.name.startswith("import:"):
            head["file"] = hashlib.sha256(self.entry.file.read_bytes()).hexdigest()[:16]
        elif self.entry.version != 1:
            head["version"] = self.entry.version
        return {**head, **self.options}


def import_object(path: str, where: str) -> Any:
    """The object at 'package.module:name', with modules of the working directory importable. Raises UserError if it is not there."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UserError(f"{where} must be 'package.module:function', got {path!r}. Write import: mine:function for one of mine.py.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything at import
        raise UserError(
            f"{where}: cannot import '{module_name}' ({type(error).__name__}: {error}). Run from its folder or install it."
        ) from error
    if not hasattr(module, name):
        raise unknown(f"name in {module_name}:", name, [n for n in vars(module) if not n.startswith("_")])
    return getattr(module, name)


# steps: exponential steps in which the masks are reached; passes: passes over `batches` batches of data in each, or a function of the
# choice; reduction: how the scores of a unit's weights become one score (`units.py`); of_units: it scores whole units itself;
# converged: it holds near a minimum of the loss only.
criterion = Table("criterion", "distprune.core.criteria", steps=1, passes=0, reduction="mean", of_units=False, converged=False)
# channels: its units are coupled channels; sparsity: of a choice whose pattern allows one sparsity only; allocator: the one that it allows.
granularity = Table("granularity", "distprune.core.granularity", channels=False, sparsity=None, allocator=None)
WEIGHT = Choice("granularity", "weight")
# sets_sparsity: its options say what each layer keeps, so a search derives the sparsity from them.
allocator = Table("allocator", "distprune.core.allocators", needs_scores=False, sets_sparsity=False)
# grows: its strength grows with the steps.
regularizer = Table("regularizer", "distprune.core.hooks", grows=False)
# uses: the axes that a paradigm looks at. The row of the survey's table (arXiv 2103.06460) that it fills: branch of the taxonomy, mask:
# where the mask comes from, values: where the kept values come from, after: what is done to the sparse network.
# scores: masks come from scores that it makes itself; trains: weights are trained, so optimizer and regularizer matter;
# grows: it grows a penalty of its own; granularities: the only legal ones, () for all;
# moves: weights move between layers while their number stays, so that no other cost does.
paradigm = Table(
    "paradigm",
    "distprune.core.paradigms",
    uses=("sparsity", "criterion", "allocator", "granularity"),
    branch="",
    mask="",
    values="",
    after="",
    scores=False,
    trains=True,
    grows=False,
    granularities=(),
    moves=False,
)
# keeps_zeros: a weight at zero with a zero gradient and zeroed memory stays at zero; under others it is masked again after each step.
# samples: it is a sampler, and is given the number of training samples after the parameters.
optimizer = Table("optimizer", "distprune.core.optimizers", keeps_zeros=False, samples=False)
decay = Table("decay", "distprune.core.decays")
# values_only: options that set initial values and nothing else; an export has its own values.
model = Table("model", "distprune.core.models", values_only=())
# files: what a choice reads, as a function of it: paths of files, which need not be there. None where only its function knows.
# content: what tells the images of a choice from others that its options would fit too, as a function of it; keys depend on it.
data = Table("data", "distprune.core.data", files=None, content=None)
# measured: it is measured on networks, where others are functions of how many weights are kept.
cost = Table("cost", "distprune.core.costs", measured=False)
PARAMS = Choice("cost", "params")
task = Table("task", "distprune.core.tasks")
