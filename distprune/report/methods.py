"""The pages docs/methods/: every entry of every table with formula, paper, options and file, as its function and docstring say."""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from distprune.core import hooks, schedules, weights
from distprune.core.hooks.hook import Hook
from distprune.core.options import REQUIRED, Option
from distprune.core.registry import Entry
from distprune.report.framework import PLURALS, searched, short, tables
from distprune.report.prose import markdown, table, text

FOLDER = "docs/methods"
_SOURCE = "https://github.com/distprune/distprune/blob/main/"


@dataclass(frozen=True)
class _Page:
    """What stands above the entries of a table."""

    title: str
    intro: str


_PAGES = {
    "paradigm": _Page(
        "Paradigms",
        """A paradigm is a whole way of pruning: it says which stages a recipe's plan has. Write `paradigm: lth`, or with options
`paradigm: {name: lth, share: 0.5}`; a search takes a list of them.

In the formulas `w(k)` are the weights after `k` of `K` training steps (`train.length`), `m` is the mask, `top(s)` keeps the units of the
highest score `s` that the allocator leaves each layer, and `train(w, a..b)` trains `w` under its mask over the steps `a` to `b` of the
learning-rate schedule. Lengths such as `50%` are shares of `K`; `2ep` are epochs and `500it` steps.

```yaml
paradigm: {name: lth, share: 0.5, rewind_to: "5%"}
```""",
    ),
    "criterion": _Page(
        "Criteria",
        """A criterion gives every prunable weight a score `s`; the highest stay. Each works at each granularity: a unit of several weights
has the mean or the sum of their scores, as its formula says. `L` is the loss of the recipe's task on a batch.

```yaml
criterion: {name: snip, batches: 2}
```

One of your own is a function of a `Probe`, in a file of its own (`CONTRIBUTING.md`) or as `criterion: {import: "mine:scores"}`.""",
    ),
    "allocator": _Page(
        "Allocators",
        """An allocator says how many units each layer keeps, so that the whole network keeps exactly the budget: whole numbers by largest
remainder, at least one unit a layer, never more than a layer has. `d_l` is the density of layer `l`, `k_l` the number that it keeps, `K`
their sum, `~` means in proportion to.

```yaml
allocator: {name: per_layer, shares: {"conv*": 1.0, "fc*": 0.2}}
```""",
    ),
    "granularity": _Page(
        "Granularities",
        """The granularity says what is kept or removed as one, a *unit*. With single weights the budget is met exactly; with units of
several weights what is left fits the budget or less.

```yaml
granularity: {name: n_m, n: 2, m: 4}
```""",
    ),
    "regularizer": _Page(
        "Regularizers",
        """A regularizer adds the gradient of a penalty on the prunable weights in every training step of a plan, besides the optimizer's
own weight decay. `t` counts these steps.

```yaml
regularizer: {name: growing_l2, step: 1.0e-5}
```""",
    ),
    "optimizer": _Page(
        "Optimizers",
        """Removed weights stay zero under every optimizer: gradients are masked, and what the optimizer remembers of a removed weight is
zero. Those that would move a zero weight all the same (`sghmc`) are masked again after each step. `g` is the gradient with all penalties.

```yaml
train: {length: 10ep, optimizer: {name: sgd, lr: 0.05}}
```""",
    ),
    "task": _Page(
        "Tasks",
        """A task says what a network is for: batches, loss, metrics, and the objective on validation that a search maximizes.

```yaml
task: {name: classification, label_smoothing: 0.1}
```""",
    ),
    "cost": _Page(
        "Costs",
        """A cost is what a pruned network takes as a share of the dense one. Searches minimize costs (`minimize: [params, latency]`) and
bound them (`budget: {cost: flops, most: 0.25}`); a recipe's sparsity can be a share of one (`sparsity_of: flops`). `n_l` and `kept_l` are
the prunable weights of layer `l`, dense and kept.

```yaml
minimize: [params, {name: latency, batch: 8}]
```""",
    ),
    "model": _Page(
        "Models",
        """A model is built for the shape of the task's inputs and its number of classes. One of your own is
`model: {import: "mine:network"}`, a function `(shape, classes, *, options) -> nn.Module`.

```yaml
model: {name: resnet_cifar, depth: 20}
```""",
    ),
    "data": _Page(
        "Data",
        """Data are three splits, train, validation and test, as bytes in memory. Masks are scored and weights trained on train, trials
compared on validation; test is read once, for what is handed out. One of your own is `data: {import: "mine:data"}`, a function that
returns a `dp.Dataset`.

```yaml
data: {name: digits, validation: 0.2}
```""",
    ),
    "sampler": _Page(
        "Samplers",
        """A sampler proposes the next trial of a search. A repeated recipe never runs again, whoever proposes it. All but
`constrained_rl` are Optuna's, made to fit a space with branches.

```yaml
sampler: {name: tpe, startup: 10}
```""",
    ),
    "scheduler": _Page(
        "Schedulers",
        """A scheduler compares trials at rungs, places in their bill of samples, and lets the best go on. [The search engine](../search.md)
says what is compared there.

```yaml
scheduler: {name: pareto_halving, reduction: 3}
```""",
    ),
    "logger": _Page(
        "Loggers",
        """Where a search is shown besides its run folder, by Ray Tune's own callbacks. Their packages are installed by yourself; they see
the search and change nothing in it.

```yaml
log: [tensorboard, {name: mlflow, experiment_name: digits}]
```""",
    ),
    "format": _Page(
        "Export formats",
        """A format is a form in which a trial's network is handed out. Every export holds `masks` and `weights`, code that builds the
network, a script that checks it, and a manifest with each form's error, size and latency against the dense network. Further formats are
named: `distprune export RUN --to DIR --formats slim,onnx`, or in Python `best.export("out", formats=["slim", "onnx"])`.
`dp.open_export("out")` reads them back, each file compared with the manifest first, and gives the networks: `export.network("slim")`.""",
    ),
}
_SCHEDULES = """Everything that depends on time within one trial: sparsity, learning rate, the values that kept weights start from, and the
hooks that change masks or gradients while a network trains. Hooks and policies are not named in recipes: paradigms and regularizers bring
theirs."""


def pages() -> dict[str, str]:
    """Path -> page."""
    found = {f"{FOLDER}/{PLURALS[name]}.md": _of_table(name) for name in tables() if name != "decay"}
    return {**found, f"{FOLDER}/{PLURALS['decay']}.md": _schedules()}


def _of_table(name: str) -> str:
    page = _PAGES[name]
    blocks = [f"# {page.title}", page.intro]
    for entry in tables()[name]:
        blocks += [f"## {entry.name}", *_entry(entry)]
    return "\n\n".join(blocks) + "\n"


def _entry(entry: Entry) -> Iterator[str]:
    yield from markdown(entry.function)
    if facts := "; ".join(_facts(entry)):
        yield f"{facts[0].upper()}{facts[1:]}."
    if entry.options:
        rows = [[f"`{option.name}`", _default(option), _takes(option), searched(option, mark="`")] for option in entry.options.values()]
        yield table(["option", "default", "takes", "searched over"], rows)
    yield from _origin(entry.paper, short(entry.file))


def _origin(paper: str, file: str) -> Iterator[str]:
    yield (f"Paper: {text(paper)}. " if paper else "") + f"File: [{file}]({_SOURCE}{file})"


def _facts(entry: Entry) -> Iterator[str]:
    """What the other axes have to know of an entry."""
    facts = entry.facts
    if entry.table == "paradigm":
        if facts["branch"] != "none":
            yield f"branch: {facts['branch']}"
        yield f"mask from: {facts['mask']}; values from: {facts['values']}; afterwards: {facts['after']}"
        axes = [f"`{axis}`" for axis in facts["uses"]] + ["`optimizer` and `regularizer`"] * facts["trains"]
        yield f"uses {', '.join(axes)}"
        if facts["granularities"]:
            yield f"at granularity {', '.join(f'`{name}`' for name in facts['granularities'])}"
    if entry.table == "criterion":
        yield "looks at data" if facts["passes"] else "looks at weights alone"
        if facts["converged"]:
            yield "for trained networks"
    if entry.table == "granularity" and facts["allocator"]:
        yield f"goes with allocator `{facts['allocator']}`"


def _default(option: Option) -> str:
    return "required" if option.default is REQUIRED else f"`{option.default!r}`"


def _takes(option: Option) -> str:
    if option.is_length:
        return "length"
    kind = option.type
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    return _name_of(kind)


def _name_of(kind: Any) -> str:
    plain = {float: "number", int: "whole number", str: "text", bool: "true, false", type(None): "null"}
    arguments = typing.get_args(kind)
    if kind in plain:
        return plain[kind]
    if typing.get_origin(kind) in (list, tuple):
        return f"list of {_name_of(arguments[0])}s"
    if len(arguments) == 2 and arguments[1] is not type(None):
        return f"{_name_of(arguments[1])} by name"
    return " or ".join(map(_name_of, arguments))


def _schedules() -> str:
    blocks = ["# Schedules, hooks and weights policies", _SCHEDULES, "## Sparsity over time"]
    for function in _functions(schedules):
        blocks += [f"### {function.__name__}", *markdown(function)]
    blocks += [
        "## Learning rate over time",
        "`t` is the progress from 0 to 1. In a recipe: `train: {decay: {name: cosine, warmup: 0.05}}`.",
    ]
    for entry in tables()["decay"]:
        blocks += [f"### {entry.name}", *_entry(entry)]
    blocks += ["## Weights policies", text(inspect.getdoc(weights) or "")]
    for name, policy in weights.POLICIES.items():
        blocks += [f"### {name}", *markdown(policy)]
    blocks += ["## Hooks", "\n\n".join(markdown(Hook))]
    for kind in sorted(_subclasses(Hook), key=lambda kind: kind.__name__):
        blocks += [f"### {kind.__name__}", *markdown(kind), *_origin("", short(Path(inspect.getsourcefile(kind) or "")))]
    return "\n\n".join(blocks) + "\n"


def _functions(module: ModuleType) -> list[Any]:
    """The public functions that a module defines, in its order."""
    found = [thing for name, thing in vars(module).items() if inspect.isfunction(thing) and not name.startswith("_")]
    return [function for function in found if function.__module__ == module.__name__]


def _subclasses(kind: type) -> set[type]:
    for module in pkgutil.iter_modules(hooks.__path__):
        importlib.import_module(f"{hooks.__name__}.{module.name}")
    direct: list[type] = type.__subclasses__(kind)
    below = {sub for sub in direct if sub.__module__.startswith("distprune.")}
    return below | {deeper for sub in below for deeper in _subclasses(sub)}
