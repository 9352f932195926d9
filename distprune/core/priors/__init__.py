"""Priors over functions: Gaussian processes, families of weight priors, and what brings the second to the first."""
