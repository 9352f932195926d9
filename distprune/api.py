"""The Python API: what the command line calls, and what a notebook calls."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    from distprune.export.applied import Applied
    from distprune.export.bench import Bench
    from distprune.report.sanity import Sanity
    from distprune.result import Result
    from distprune.search.config import Search
    from distprune.search.driver import Listener
    from distprune.search.replay import Replay
    from distprune.store.folder import RunFolder


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

    def export(self, to: str | Path, *, formats: Iterable[str] | None = None) -> Path:
        """Write masks, weights, model, the other `formats` and a manifest to the new folder `to`.

        `formats` are names of `distprune list format`, by default those that need no further package. Raises UserError for an unknown
        format and for a folder that is not empty; nothing is written then.
        """
        from distprune.export.writing import export

        return export(self.run, to, {"key": self.run.key, "versions": environment()}, formats=formats)


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
    from distprune.search import driver
    from distprune.search.config import Search

    found = Search.load(config, name=name, storage=storage, limits=limits, log=None if simulate is None else [])
    if simulate is not None:
        from distprune.search.config import check_workers
        from distprune.search.recorded import Recorded

        if workers is not None:
            check_workers(workers, "workers")

        if address is not None:
            raise UserError(f"A simulated search runs in this process and needs no cluster, got address {address!r}. Leave it out.")
        return _reported(driver.simulate(found, recorded=Recorded(simulate), workers=workers, listen=listen), listen)
    if workers is not None:
        raise UserError(f"workers are those of a simulated search, got {workers}. Write workers: {{most: {workers}}} in the file.")
    from distprune.search.runner import Ray

    return _reported(driver.start(found, engine=Ray(address, listen), listen=listen), listen)


def resume(
    path: str | Path, *, limits: Mapping[str, Any] | None = None, address: str | None = None, listen: "Listener" = quiet
) -> "Result":
    """Go on with an interrupted search, or extend a finished one by larger `limits`."""
    from distprune.search import driver
    from distprune.search.runner import Ray

    return _reported(driver.resume(path, limits=limits or {}, engine=Ray(address, listen), listen=listen), listen)


def _reported(folder: "RunFolder", listen: "Listener") -> "Result":
    """The result of a search that has ended, its page written. Where that cannot be, `listen` hears why, and nothing else happens."""
    from distprune.result import Result

    result = Result(folder)
    try:
        result.report()
    except Exception as error:  # whatever it is, the search has been done
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        listen("report", {"message": f"The search is done, but its page was not made: {reason}"})
    return result


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


def apply(
    masks: "str | Path | Masks",
    model: "str | nn.Module",
    *,
    options: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    to: str | Path | None = None,
    trial: int | None = None,
    strict: bool = True,
) -> "Applied":
    """Put masks on a network of your own, in place, and write its pruned state.

    `masks` are Masks, a file of them (safetensors or Parquet), an export folder, or a run folder with `trial`, by default the most accurate
    pruned one of the front. `model` is a network or 'package.module:function', which is called with `options`; `weights` is a safetensors
    file of its state, `to` a new one for the pruned state under the same names and in the same types. Names may differ by the parts that
    wrappers add, such as `module.` and `_orig_mod.`. With `strict=False`, what does not fit is left out and stands in the result.
    Raises UserError, with nothing written, for what cannot be read or built, for masks of which none fits, and for whatever is left over.
    """
    from distprune.export import applied

    found = masks if isinstance(masks, Masks) else _masks_at(masks, trial)
    if not isinstance(model, nn.Module):
        model = applied.build(model, options or {})
    elif options:
        raise UserError(f"options are for a function that builds the network, got {', '.join(options)} beside a network. Leave them out.")
    return applied.apply(found, model, weights=weights, to=to, strict=strict)


def _masks_at(path: str | Path, trial: int | None) -> Masks:
    from distprune.export.reading import open_export
    from distprune.result import found_masks
    from distprune.store.place import is_url

    place = Path(path)
    if not is_url(path) and not place.exists():
        raise UserError(f"{path} does not exist. Give a file of masks, an export folder or a run folder.")
    if is_url(path) or not (place.is_file() or (place / "manifest.json").is_file()):
        return found_masks(path, trial).masks
    if trial is not None:
        raise UserError(f"{path} holds the masks of one trial, so there is none to choose, got --trial {trial}. Leave it out.")
    return Masks.load(place) if place.is_file() else open_export(place).masks


def bench(
    path: str | Path,
    *,
    batches: Sequence[int] = (1, 64),
    threads: int | None = None,
    device: str = "cpu",
    rounds: int | None = None,
    to: str | Path | None = None,
    listen: "Listener" = quiet,
) -> "Bench":
    """Measure the forms of an export beside the dense network, in turn: numbers, and what they say; `export/bench.py` says how.

    `batches` are batch sizes, `threads` are torch's as they are by default, `rounds` are blocks of each network; `to` is a new JSON file.
    Raises UserError for a folder that is no export or was damaged, and for what cannot be measured so, before anything is.
    """
    from distprune.export import bench as measuring
    from distprune.export.reading import open_export
    from distprune.report.sanity import check_target

    check_target(to)
    found = measuring.bench(
        open_export(path),
        batches=batches,
        threads=threads,
        device=device,
        rounds=measuring.ROUNDS if rounds is None else rounds,
        listen=listen,
    )
    if to is not None:
        Path(to).write_text(json.dumps({**found.plain(), "lines": found.lines(), "versions": environment()}, indent=2) + "\n")
    return found


def dashboard(path: str | Path, *, host: str = "127.0.0.1", port: int = 8080, say: Callable[[str], None] = print) -> None:
    """Show the trials of a run in optuna-dashboard until Ctrl-C; nothing in it can change them, and the search may still be running.

    `path` is a run folder or its URL, `port` 0 one that is free; `say` hears where a browser finds it.
    Raises UserError for a run without trials, a missing package, and an address that cannot be listened on.
    """
    from distprune.report.dashboard import serve

    serve(str(path), host=host, port=port, say=say)


def check(config: str | Path) -> list[str]:
    """Validate a recipe or a search without starting anything; returns lines that say what it is. Raises UserError for what is wrong."""
    from distprune.search.config import Search
    from distprune.search.loggers import check_loggers
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
    for look in (functools.partial(check_machine, found), functools.partial(check_loggers, found.log)):
        try:
            look()
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
