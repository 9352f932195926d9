"""The tables of the search room."""

from distprune.core.registry import Table

# keeps_all: the sampler looks at all finished trials instead of a bounded set of the best and the latest.
# learns: it returns a BudgetSampler, which lives as long as its proposer, in place of one that is made anew for every proposal.
sampler = Table("sampler", "distprune.search.samplers", keeps_all=False, learns=False)
scheduler = Table("scheduler", "distprune.search.rungs")
