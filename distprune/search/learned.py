"""What a search learns from earlier ones: their ended trials whose parameters are parameters of its own space."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distprune.core.config import read_yaml
from distprune.errors import UserError
from distprune.search.fitset import scores
from distprune.search.space import Recorder, Space
from distprune.store.folder import RunFolder

_TOLD = ("finished", "stopped")


def collect(paths: Sequence[str], space: Space, minimize: Sequence[Any]) -> dict[str, list[dict[str, Any]]]:
    """Folder -> its usable trials as plain data: parameters, values, constraints. Raises UserError for one that has none.

    A trial is usable if the space asks for exactly its parameters, and its values lie in the space's distributions. `minimize` is what the
    search minimizes, which must be what the earlier ones did.
    """
    found = {}
    for path in paths:
        folder = RunFolder.existing(path)
        earlier = read_yaml(folder.search_yaml).get("search", {}).get("minimize")
        if earlier != list(minimize):
            raise UserError(f"learn_from {path}: it must minimize what this search does, {list(minimize)}, got {earlier}. Leave it out.")
        ended = [trial for trial in _read(folder) if trial.user_attrs.get("end", {}).get("ended") in _TOLD and trial.values is not None]
        usable = [trial for trial in sorted(ended, key=lambda trial: trial.user_attrs["end"].get("turn", 0)) if _fits(space, trial.params)]
        if not usable:
            why = f"none of its {len(ended)} ended trials has just the parameters of this space" if ended else "it has no ended trials"
            raise UserError(f"learn_from {path}: nothing to learn, as {why}. Leave it out, or widen the space.")
        found[path] = [_plain(trial) for trial in usable]
    return found


def _read(folder: RunFolder) -> list[FrozenTrial]:
    """A copy of the journal is read up to its last whole line: the search may be running."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    data = folder.journal.read_bytes() if folder.journal.exists() else b""
    with tempfile.TemporaryDirectory() as aside:
        copy = Path(aside) / "study.journal"
        copy.write_bytes(data[: data.rfind(b"\n") + 1])
        storage = JournalStorage(JournalFileBackend(str(copy)))
        studies = storage.get_all_studies()
        if not studies:
            raise UserError(f"learn_from {folder.path}: nothing to learn, as it has no trials. Leave it out.")
        return storage.get_all_trials(studies[0]._study_id)


def _fits(space: Space, params: Mapping[str, Any]) -> bool:
    recorder = Recorder(params)
    try:
        space.build(recorder)
    except (KeyError, ValueError):  # not given, or outside; an illegal recipe is a ValueError as well
        return False
    return recorder.distributions.keys() == params.keys()


def _plain(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "params": trial.params,
        "state": trial.state.name,
        "values": trial.values,
        "constraints": trial.constraints,
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
