"""The tables of the search room."""

from distprune.core.registry import Table

# keeps_all: the sampler looks at all finished trials instead of a bounded set of the best and the latest.
sampler = Table("sampler", "distprune.search.samplers", keeps_all=False)
scheduler = Table("scheduler", "distprune.search.rungs")
