"""The end of a search: the front is measured on the test split, its masks are written, and the tables are closed."""

import json
from typing import Any

from safetensors import safe_open

from distprune.core.run import Run, prepare
from distprune.errors import UserError
from distprune.search.book import Book, Entry
from distprune.search.trial import checkpoints
from distprune.store.folder import RunFolder
from distprune.store.reports import to_parquet
from distprune.store.trials import write_trials


def finalize(folder: RunFolder, book: Book) -> None:
    """Write `masks/<trial>.safetensors` for the front, `trials.parquet` and `reports.parquet`. Doing it again changes nothing."""
    folder.masks.mkdir(exist_ok=True)
    for number in sorted(book.front):
        entry = book.entries[number]
        path = folder.masks_file(number)
        if not path.exists():
            run = load_trial(folder, number, entry.recipe.plain())
            metrics = run.env.task.metrics(run.state.model, "test")  # the one time that test is read
            run.state.masks.save(path, trial=number, key=run.key, recipe=entry.recipe.plain(), test=metrics)
    for path in folder.masks.glob("*.safetensors"):
        if path.stem.isdigit() and int(path.stem) not in book.front:
            path.unlink()
    write_table(folder, book)
    to_parquet(folder.reports, folder.reports_parquet)


def write_table(folder: RunFolder, book: Book) -> None:
    """Write `trials.parquet` as the search stands."""
    write_trials(folder.trials, [_row(entry, book, _test(folder, entry.number)) for entry in book.entries])


def _test(folder: RunFolder, number: int) -> float | None:
    """The objective on the test split, of a trial that was measured there."""
    path = folder.masks_file(number)
    if not path.exists():
        return None
    with safe_open(str(path), framework="pt") as file:
        return float(next(iter(json.loads(file.metadata()["test"]).values())))


def load_trial(folder: RunFolder, number: int, recipe: dict[str, Any], *, device: str = "cpu") -> Run:
    """A trial's network as its latest checkpoint holds it. Raises UserError if none is left."""
    from distprune.core.recipe import Recipe

    run = prepare(Recipe.read(recipe), device=device)
    for checkpoint in checkpoints(folder, number):
        run.state.load(checkpoint / "state.safetensors")
        return run
    raise UserError(f"Trial {number} has kept no weights: only trials on the front do. Choose one of the Pareto table.")


def _row(entry: Entry, book: Book, test: float | None) -> dict[str, Any]:
    last, recipe = entry.last, entry.recipe
    uses = recipe.paradigm.entry.facts["uses"]
    extra = json.loads(last.get("extra") or "{}")
    return {
        "number": entry.number,
        "ended": entry.ended or "running",
        "reason": entry.reason,
        "pareto": entry.number in book.front,
        "paradigm": recipe.paradigm.name,
        "granularity": recipe.granularity.name if "sparsity" in uses else None,
        "criterion": recipe.criterion.name if "criterion" in uses else None,
        "allocator": recipe.allocator.name if "allocator" in uses else None,
        "regularizer": recipe.regularizer.name,
        "sparsity": last.get("sparsity"),
        "kept": last.get("kept"),
        "objective": last.get("objective"),
        "score": entry.best,
        "test": test,
        "params": extra.get("params"),
        "flops": extra.get("flops"),
        "cost": entry.cost,
        "spent": entry.spent + entry.spent_now,
        "bill_flops": (extra.get("ledger") or {}).get("flops"),
        "bill_sparse_flops": (extra.get("ledger") or {}).get("sparse_flops"),
        "rung": entry.rung,
        "attempts": len(entry.attempts),
        "wall_s": last.get("wall_s"),
        "recipe_key": extra.get("key") or entry.identity,
        "recipe": json.dumps(recipe.plain()),
        "parameters": json.dumps(dict(entry.params)),
        "layers": json.dumps(extra.get("layers") or {}),
    }
