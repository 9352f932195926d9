"""Tests of the cluster read run folders as those of the search room do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "search"))
