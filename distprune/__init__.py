"""distprune: distributed search over pruning paradigms, per-layer sparsity budgets and regularization schedules.

    import distprune as dp
    masks = dp.prune(model, criterion="synflow", sparsity=0.95, batches=batches)
    result = dp.search("configs/digits.yaml")

Nothing heavy is imported before a name is used, so that `distprune --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distprune.api import check, resume, run, sanity, search
    from distprune.core.data.dataset import Dataset, Split
    from distprune.core.masks import Masks
    from distprune.core.prune import prune, shrink
    from distprune.core.recipe import Recipe
    from distprune.errors import UserError
    from distprune.result import Result
    from distprune.search.config import Search

_WHERE = {
    **dict.fromkeys(("check", "resume", "run", "sanity", "search"), "distprune.api"),
    **dict.fromkeys(("prune", "shrink"), "distprune.core.prune"),
    "Dataset": "distprune.core.data.dataset",
    "Split": "distprune.core.data.dataset",
    "Masks": "distprune.core.masks",
    "Recipe": "distprune.core.recipe",
    "Result": "distprune.result",
    "Search": "distprune.search.config",
    "UserError": "distprune.errors",
}
__all__ = [
    "Dataset",
    "Masks",
    "Recipe",
    "Result",
    "Search",
    "Split",
    "UserError",
    "check",
    "prune",
    "resume",
    "run",
    "sanity",
    "search",
    "shrink",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'distprune' has no attribute '{name}'")
