"""The tables of the search room."""

from distprune.core.registry import Table

# blind: its proposals depend on the seed and on how many came before them alone, so that nothing is told to it.
# enumerates: it comes to an end by itself, and to every candidate on the way, so no trial is there to cover them.
# flat: it models one set of parameters: those that a recipe has not are proposed too, and kept with its trial.
# same_constraint: it wants one and the same constraint of every trial. objectives: "one" if it cannot do with more.
# most_trials: what it is still quick enough for; None where its cost does not grow.
# learns: it returns a BudgetSampler, which lives as long as its proposer, in place of one that is made anew for every proposal.
sampler = Table(
    "sampler",
    "distprune.search.samplers",
    blind=False,
    enumerates=False,
    flat=False,
    same_constraint=False,
    objectives=None,
    most_trials=None,
    learns=False,
)
scheduler = Table("scheduler", "distprune.search.rungs")
# packages: that have to be installed; show: the command that shows what lies in `folder`.
logger = Table("logger", "distprune.search.loggers", packages=(), show="")
