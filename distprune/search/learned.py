"""What a search learns from earlier ones: their ended trials that are trials of its own space too."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distprune.core.config import read_yaml
from distprune.core.costs import label
from distprune.core.recipe import Recipe
from distprune.errors import UserError
from distprune.search.config import Search, differences
from distprune.search.entry import Entry
from distprune.search.fitset import scores
from distprune.search.goals import Goals
from distprune.search.space import Recorder, Space
from distprune.search.studies import trials_in_database
from distprune.store.folder import RunFolder


def collect(search: Search, space: Space) -> dict[str, list[dict[str, Any]]]:
    """Folder -> its usable trials as plain data: parameters, values, constraints. Raises UserError for one that has none.

    The earlier search must have minimized what this one does, over the same network, data and training. A trial of it is usable if its
    parameters are parameters of this space and make the same recipe of it. What it violates is said of this search's limits.
    """
    found = {}
    for index, path in enumerate(search.learn_from):
        where = f"learn_from[{index}] {path}"
        folder, earlier = _earlier(path, where)
        told, now = ([cost.plain() for cost in each.minimize] for each in (earlier, search))
        if told != now:
            raise UserError(f"{where}: it must minimize what this search does, {now}, got {told}. Leave it out.")
        for line in differences(earlier.shared, search.shared):
            raise UserError(f"{where}: its trials had {line}. Write it alike, or leave it out.")
        _check_budgets(earlier, search, where)
        ended = [trial for trial in _read(folder, where) if _told(trial)]
        usable = [trial for trial in sorted(ended, key=lambda trial: trial.user_attrs["end"].get("turn", 0)) if _fits(space, trial)]
        if not usable:
            why = f"none of its {len(ended)} ended trials is one of this space" if ended else "it has no ended trials"
            raise UserError(f"{where}: nothing to learn, as {why}. Leave it out, or widen the space.")
        found[path] = [_plain(trial, _constraints(trial, earlier, search)) for trial in usable]
    return found


def _earlier(path: str, where: str) -> tuple[RunFolder, Search]:
    try:
        folder = RunFolder.existing(path)
        folder.check_real("learned from")
        return folder, Search.of_run(read_yaml(folder.search_yaml).get("search"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_budgets(earlier: Search, search: Search, where: str) -> None:
    """Raise UserError where a budget is another and its cost is not among the values of trials."""
    hidden = [budget for budget in search.budget if budget.cost not in search.minimize]
    if earlier.budget != search.budget and hidden:
        was = [budget.plain() for budget in earlier.budget] or "none"
        raise UserError(
            f"{where}: it must have the budget of this search, as the journal does not say what its trials cost in "
            f"{label(hidden[0].cost)}, got {was}. Minimize {label(hidden[0].cost)} in both, or leave it out."
        )


def _constraints(trial: FrozenTrial, earlier: Search, search: Search) -> dict[str, float]:
    """What this search would have told of an earlier trial. What depends on no limit is as it was."""
    if trial.user_attrs["end"]["ended"] != "finished":
        return dict(trial.constraints)
    kept = ("unmeasured", "budget") if earlier.budget == search.budget else ("unmeasured",)
    found = {name: value for name, value in trial.constraints.items() if name.startswith(kept)}
    score, *costs = trial.values
    shares = {label(cost): share for cost, share in zip(search.minimize, costs, strict=True)}
    entry = Entry(
        trial.number, Recipe.read(trial.user_attrs["recipe"]), "", last={"objective": score, "extra": json.dumps({"costs": shares})}
    )
    goals = Goals((), () if earlier.budget == search.budget else search.budget, search.floor)
    return found | goals.violations(entry)


def _told(trial: FrozenTrial) -> bool:
    """Whether a trial says something: it has values, and is no repeat of a finalist, which is told as what is not to appear in a front."""
    told = trial.user_attrs.get("end", {}).get("ended") in ("finished", "stopped") and trial.values is not None
    return told and "repeat_of" not in trial.user_attrs


def _read(folder: RunFolder, where: str) -> list[FrozenTrial]:
    """A copy of the journal is read up to its last whole line: the search may be running."""
    if (trials := trials_in_database(folder)) is not None:
        return trials
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    data = folder.journal.read_bytes() if folder.journal.exists() else b""
    with tempfile.TemporaryDirectory() as aside:
        copy = Path(aside) / "study.journal"
        copy.write_bytes(data[: data.rfind(b"\n") + 1])
        storage = JournalStorage(JournalFileBackend(str(copy)))
        studies = storage.get_all_studies()
        if not studies:
            raise UserError(f"{where}: nothing to learn, as it has no trials. Leave it out.")
        return storage.get_all_trials(studies[0]._study_id)


def _fits(space: Space, trial: FrozenTrial) -> bool:
    recorder = Recorder(trial.params)
    try:
        recipe = space.build(recorder)
        earlier = Recipe.read(trial.user_attrs["recipe"])
    except (KeyError, ValueError):  # not given, or outside; an illegal recipe is a ValueError as well
        return False
    return recorder.distributions.keys() == trial.params.keys() and replace(earlier, seed=recipe.seed) == recipe


def _plain(trial: FrozenTrial, constraints: Mapping[str, float]) -> dict[str, Any]:
    return {
        "params": trial.params,
        "state": trial.state.name,
        "values": trial.values,
        "constraints": dict(constraints),
        "intermediate": {str(rung): value for rung, value in scores(trial).items()},
    }


def as_trials(found: Mapping[str, Sequence[Mapping[str, Any]]], space: Space) -> list[FrozenTrial]:
    """What `collect` found, as a sampler knows trials."""
    return [_trial(row, space) for rows in found.values() for row in rows]


def _trial(row: Mapping[str, Any], space: Space) -> FrozenTrial:
    recorder = Recorder(row["params"])
    space.build(recorder)
    return optuna.trial.create_trial(
        state=TrialState[row["state"]],
        values=row["values"],
        params=dict(row["params"]),
        distributions=recorder.distributions,
        intermediate_values={int(step): value for step, value in row["intermediate"].items()},
        constraints=row["constraints"] or None,
    )
