"""The figures of a page, one a file, in the order in which they are read. Each is a function from the data to what is drawn."""

from collections.abc import Callable

from distprune.report.data import Data
from distprune.report.drawn import Drawn
from distprune.report.figures.compute import compute
from distprune.report.figures.curves import curves
from distprune.report.figures.failures import failures
from distprune.report.figures.front import front
from distprune.report.figures.importance import importance
from distprune.report.figures.layers import layers
from distprune.report.figures.paradigms import paradigms
from distprune.report.figures.sanity import sanity

FIGURES: tuple[Callable[[Data], Drawn], ...] = (front, curves, paradigms, importance, layers, compute, failures, sanity)
