"""How the end of a trial is told to Optuna."""

from optuna.trial import TrialState

from distprune.search.entry import Entry
from distprune.search.goals import Goals


def verdict(entry: Entry, rungs: int, goals: Goals) -> tuple[str, TrialState, list[float] | None, dict[str, float]]:
    """(ended, Optuna state, values, constraints) of an ended trial.

    With several objectives, a stopped trial is told as complete with its values at the rung and the violated constraint `unfinished`,
    the share of rungs that it did not reach: Optuna's PRUNED carries no values then, and complete without a constraint would be a lie.
    With one objective it is told as PRUNED with its score, which Optuna's samplers rank by the rung first. Neither is ever among the best.
    Constraints of the goals are told of finished trials only: no other's cost is known.
    """
    if entry.ended and entry.ended not in ("finished", "stopped"):
        return entry.ended, TrialState.FAIL, None, {}
    if entry.ended == "finished":
        return "finished", TrialState.COMPLETE, goals.values(goals.reached(entry)), goals.violations(entry)
    if entry.best is None:  # stopped by a limit before it was scored: nothing to learn from
        return "stopped", TrialState.FAIL, None, {}
    values = goals.values(goals.expected(entry))
    if len(values) == 1:
        return "stopped", TrialState.PRUNED, values, {}
    unfinished = (rungs - entry.rung) / (rungs + 1)
    return "stopped", TrialState.COMPLETE, values, {"unfinished": max(unfinished, 1e-3)}
