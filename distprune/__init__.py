"""distprune: distributed search over pruning paradigms, per-layer sparsity budgets and regularization schedules.

    import distprune as dp
    masks = dp.prune(model, criterion="synflow", sparsity=0.95, batches=batches)
    result = dp.search("configs/digits.yaml")

Nothing heavy is imported before a name is used, so that `distprune --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distprune.api import apply, bench, check, dashboard, resume, run, sanity, search
    from distprune.core.data.dataset import Dataset, Split
    from distprune.core.masks import Masks
    from distprune.core.prune import hold, prune, shrink
    from distprune.core.recipe import Recipe
    from distprune.errors import UserError
    from distprune.export.reading import Export, open_export
    from distprune.result import Result
    from distprune.search.config import Search

_WHERE = {
    **dict.fromkeys(("apply", "bench", "check", "dashboard", "resume", "run", "sanity", "search"), "distprune.api"),
    **dict.fromkeys(("hold", "prune", "shrink"), "distprune.core.prune"),
    "Dataset": "distprune.core.data.dataset",
    "Export": "distprune.export.reading",
    "Split": "distprune.core.data.dataset",
    "Masks": "distprune.core.masks",
    "Recipe": "distprune.core.recipe",
    "Result": "distprune.result",
    "Search": "distprune.search.config",
    "UserError": "distprune.errors",
    "open_export": "distprune.export.reading",
}
__all__ = [
    "Dataset",
    "Export",
    "Masks",
    "Recipe",
    "Result",
    "Search",
    "Split",
    "UserError",
    "apply",
    "bench",
    "check",
    "dashboard",
    "hold",
    "open_export",
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
