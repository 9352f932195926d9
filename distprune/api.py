"""The Python API: what the command line calls, and what a notebook calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distprune.core import run as core_run
from distprune.core.config import read_yaml
from distprune.core.executor import Report, execute
from distprune.core.masks import Masks
from distprune.core.recipe import Recipe
from distprune.core.run import Run
from distprune.environment import environment
from distprune.errors import UserError

# A recipe runs where only torch is installed: what needs Ray, Optuna or Arrow is imported by the calls that use it.
if TYPE_CHECKING:
    from distprune.report.sanity import Sanity
    from distprune.result import Result
    from distprune.search.config import Search
    from distprune.search.driver import Listener
    from distprune.search.replay import Replay


def quiet(event: str, facts: dict[str, Any]) -> None:
    """The listener that shows nothing."""


@dataclass(frozen=True)
class Outcome:
    """A recipe that was run to its end."""

    run: Run
    reports: tuple[Report, ...]

    @property
    def model(self) -> nn.Module:
        """The trained network, its removed weights zero."""
        return self.run.state.model

    @property
    def masks(self) -> Masks:
        """Its masks."""
        return self.run.state.masks

    def summary(self) -> str:
        """One line."""
        last = self.reports[-1]
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in last.metrics.items())
        return f"finished: {metrics} (validation), {last.kept:,} weights kept, sparsity {last.sparsity:.4f}, {last.cost:,} samples"

    def export(self, to: str | Path) -> Path:
        """Write masks, weights, model and manifest to the new folder `to`."""
        from distprune.export.network import export

        return export(self.run, to, {"key": self.run.key, "versions": environment()})


def _read_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.read(dict(recipe) if isinstance(recipe, Mapping) else read_yaml(recipe))


def prepare(recipe: str | Path | Mapping[str, Any] | Recipe, *, device: str = "cpu") -> Run:
    """A recipe with its data loaded, its network built and its plan made."""
    return core_run.prepare(_read_recipe(recipe), device=device)


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    device: str = "cpu",
    listen: Callable[[Run, Report], None] = lambda run, report: None,
) -> Outcome:
    """Execute one recipe; `listen` hears every report."""
    ready = prepare(recipe, device=device)
    reports = []
    for report in execute(ready.plan, ready.state, ready.env):
        reports.append(report)
        listen(ready, report)
    return Outcome(ready, tuple(reports))


def search(
    config: "str | Path | Mapping[str, Any] | Search",
    *,
    name: str | None = None,
    storage: str | None = None,
    limits: Mapping[str, Any] | None = None,
    address: str | None = None,
    simulate: str | Path | None = None,
    workers: int | None = None,
    listen: "Listener" = quiet,
) -> "Result":
    """Run a search to its end, on this machine or on the Ray cluster at `address`.

    `simulate` is a run folder whose finished trials answer for the search's own, on `workers` and a virtual clock: nothing is trained.
    Raises UserError, before anything is written, for whatever in it cannot be done.
    """
    from distprune.result import Result
    from distprune.search import driver
    from distprune.search.config import Search

    found = Search.load(config, name=name, storage=storage, limits=limits)
    if simulate is not None:
        from distprune.search.config import check_workers
        from distprune.search.recorded import Recorded

        if workers is not None:
            check_workers(workers, "workers")

        if address is not None:
            raise UserError(f"A simulated search runs in this process and needs no cluster, got address {address!r}. Leave it out.")
        return Result(driver.simulate(found, recorded=Recorded(simulate), workers=workers, listen=listen))
    if workers is not None:
        raise UserError(f"workers are those of a simulated search, got {workers}. Write workers: {{most: {workers}}} in the file.")
    from distprune.search.runner import Ray

    return Result(driver.start(found, engine=Ray(address, listen), listen=listen))


def resume(
    path: str | Path, *, limits: Mapping[str, Any] | None = None, address: str | None = None, listen: "Listener" = quiet
) -> "Result":
    """Go on with an interrupted search, or extend a finished one by larger `limits`."""
    from distprune.result import Result
    from distprune.search import driver
    from distprune.search.runner import Ray

    return Result(driver.resume(path, limits=limits or {}, engine=Ray(address, listen), listen=listen))


def replay(path: str | Path, trial: int, *, device: str | None = None, listen: "Listener" = quiet) -> "Replay":
    """Run a trial of a run folder again from nothing and compare it with its record, bit by bit.

    `device` is by default the one that the trial ran on. Raises UserError for a folder or trial that cannot be replayed.
    """
    from distprune.search import replay as again

    return again.replay(path, trial, device=device, listen=listen)


def sanity(
    path: str | Path,
    *,
    trial: int | None = None,
    seeds: int = 3,
    device: str = "cpu",
    to: str | Path | None = None,
    listen: "Listener" = quiet,
) -> "Sanity":
    """Check what the mask of a trial in a run folder, or of an export folder, knows besides its layer budgets; `core/sanity.py` says how.

    `trial` is by default the most accurate pruned one of the front; `to` is a new JSON file for the numbers.
    Raises UserError for a folder, trial or mask that cannot be checked, before anything is trained.
    """
    from distprune.core import sanity as checks
    from distprune.report.sanity import Sanity, check_target
    from distprune.result import found_masks

    checks.check_seeds(seeds)
    check_target(to)
    found = found_masks(path, trial)
    threads = torch.get_num_threads()
    torch.set_num_threads(found.threads or threads)  # the bits of a trial depend on it
    try:
        ready = prepare(found.recipe, device=device)
        listen("rerunning", {"name": found.name})
        subject = checks.subject_of(ready, found.masks)
        task, notes = ready.env.task, found.notes + subject.notes
        listen("subject", {"protocol": subject.protocol, "notes": notes})
        results = []
        for result in checks.sanity(subject, seeds):
            results.append(result)
            listen("retrained", {"result": result, "share": len(results) / (seeds * len(subject.variants))})
    finally:
        torch.set_num_threads(threads)
    outcome = Sanity(
        protocol=subject.protocol, notes=notes, objective=task.objective, maximize=task.direction == "maximize", results=tuple(results)
    )
    if to is not None:
        outcome.write(to, name=found.name, recipe=ready.recipe.plain(), device=device, versions=environment())
    return outcome


def check(config: str | Path) -> list[str]:
    """Validate a recipe or a search without starting anything; returns lines that say what it is. Raises UserError for what is wrong."""
    from distprune.search.config import Search
    from distprune.search.setup import check_cache, check_machine, check_storage, set_up
    from distprune.store.folder import RunFolder

    value = read_yaml(config)
    if "paradigm" in value:
        ready = prepare(value)
        return [f"{config}: a recipe of {len(ready.plan.stages)} stages that bills {ready.plan.cost:,} samples. It is valid."]
    found = Search.load(value)
    check_storage(found)
    setup = set_up(found)
    check_cache(found)
    notes = []
    if (folder := RunFolder(found.folder, found.url)).is_there:
        notes.append(f"{folder} exists already: a new search wants another name, --name NAME.")
    try:
        check_machine(found)
    except UserError as error:
        notes.append(f"Not on this machine: {error}")
    axes = ", ".join(f"{axis} ({len(candidates)})" for axis, candidates in setup.space.axes.items())
    return [
        f"{config}: a search over {axes}, {setup.total:,} prunable weights.",
        f"A dense training bills {setup.dense_cost:,} samples, a trial {setup.mean_cost:,} on average and {setup.most_cost:,} at most.",
        f"Rungs at {', '.join(f'{cost:,}' for cost in setup.rungs().costs) or 'none'} samples; {found.limits.trials} trials.",
        *(f"Excluded: {line}" for line in setup.space.excluded),
        *notes,
        "It is valid.",
    ]
