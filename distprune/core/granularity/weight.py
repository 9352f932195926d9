"""Single weights."""

from distprune.core.registry import granularity
from distprune.core.units import Network, Units, Weights


@granularity("weight", paper="LeCun et al. 1989, Optimal brain damage")
def weight(network: Network) -> Units:
    """Every weight is kept or removed for itself: the budget is met exactly.

    Formula:
        unit = one weight,   sum of kept units = round((1 - sparsity) n)
    """
    return Weights(network.weights)
