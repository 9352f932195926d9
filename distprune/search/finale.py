"""The end of a search: the front is measured on the test split, its masks are written, and the tables are closed."""

import json
import statistics
from pathlib import Path
from typing import Any

from safetensors import safe_open

from distprune.core.run import Run, prepare
from distprune.errors import UserError
from distprune.search.book import Book
from distprune.search.entry import Entry
from distprune.store.checkpoints import checkpoints_at
from distprune.store.files import patiently
from distprune.store.folder import RunFolder
from distprune.store.place import answering
from distprune.store.reports import to_parquet
from distprune.store.trials import write_trials


def finalize(folder: RunFolder, book: Book) -> None:
    """Write `masks/<trial>.safetensors` for the front, `trials.parquet` and `reports.parquet`. Doing it again changes nothing."""
    folder.masks.mkdir(exist_ok=True)
    for number in sorted(book.front):
        write_masks(folder, book.entries[number])
    for path in folder.masks.glob("*.safetensors"):
        if path.stem.isdigit() and int(path.stem) not in book.front:
            path.unlink()
    close_tables(folder, book)


def close_tables(folder: RunFolder, book: Book) -> None:
    """Write `trials.parquet` and `reports.parquet`."""
    write_table(folder, book)
    to_parquet(folder.reports, folder.reports_parquet)


def write_table(folder: RunFolder, book: Book) -> None:
    """Write `trials.parquet` as the search stands."""
    tests = {int(path.stem): _test(path) for path in folder.masks.glob("*.safetensors") if path.stem.isdigit()}
    repeats = {number: [float(entry.last["objective"]) for entry in entries] for number, entries in book.repeats().items()}
    write_trials(folder.trials, (_row(entry, book, tests.get(entry.number), repeats.get(entry.number, [])) for entry in book.entries))


def write_masks(folder: RunFolder, entry: Entry) -> None:
    """Measure a finished trial on the test split and write its masks, unless that is done."""
    path = folder.masks_file(entry.number)
    if path.exists() and json.loads(_facts(path)["recipe"]) == entry.recipe.plain():  # else of a trial that a journal has lost
        return
    run = load_trial(folder, entry.number, entry.recipe.plain())
    metrics = run.env.task.metrics(run.state.model, "test")  # the one time that test is read
    folder.masks.mkdir(exist_ok=True)
    facts = {"trial": entry.number, "key": run.key, "recipe": entry.recipe.plain(), "test": metrics}
    patiently(path, lambda: run.state.masks.save(path, **facts))


def _test(path: Path) -> float:
    """The objective on the test split, of a trial that was measured there."""
    return float(next(iter(json.loads(_facts(path)["test"]).values())))


def _facts(path: Path) -> dict[str, str]:
    """What lies beside the masks in their file."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def keeps_weights(folder: RunFolder, number: int) -> bool:
    """Whether a trial's network can be loaded."""
    with answering(folder.place):
        return any(True for _ in checkpoints_at(folder.place).held(number).farthest_first())


def load_trial(folder: RunFolder, number: int, recipe: dict[str, Any], *, device: str = "cpu") -> Run:
    """A trial's network as its latest checkpoint holds it. Raises UserError if none is left."""
    from distprune.core.recipe import Recipe

    folder.check_real("exported")
    run = prepare(Recipe.read(recipe), device=device)
    with answering(folder.place):
        store = checkpoints_at(folder.place)
        held = store.held(number)
        for checkpoint in held.farthest_first():
            with store.reading(number, checkpoint) as path:
                run.state.load(path)
                return run
    if held.dropped:
        raise UserError(
            f"Trial {number} has kept its masks, {folder.masks_file(number)}, but no weights: they were deleted to keep to limits.disk. "
            "Choose another trial, or train its recipe again."
        )
    raise UserError(f"Trial {number} has kept no weights: only trials on the front do. Choose one of the Pareto table.")


def _row(entry: Entry, book: Book, test: float | None, repeats: list[float]) -> dict[str, Any]:
    last, recipe = entry.last, entry.recipe
    uses = recipe.paradigm.entry.facts["uses"]
    extra = entry.extra
    return {
        "number": entry.number,
        "ended": entry.ended or "running",
        "reason": entry.reason,
        "pareto": entry.number in book.front,
        "violated": book.violated(entry),
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
        "repeat_of": entry.repeat_of,
        "round_of": entry.round_of,
        "seeds": len(repeats) or None,
        "mean": statistics.fmean(repeats) if repeats else None,
        "spread": statistics.stdev(repeats) if len(repeats) > 1 else None,
        "params": extra.get("params"),
        "flops": extra.get("flops"),
        "costs": json.dumps(extra.get("costs") or {}),
        "cost": entry.cost,
        "spent": entry.spent + entry.spent_now,
        "saved": extra.get("saved", 0),
        "bill_flops": (extra.get("ledger") or {}).get("flops"),
        "bill_sparse_flops": (extra.get("ledger") or {}).get("sparse_flops"),
        "rung": entry.rung,
        "attempts": len(entry.attempts),
        "deaths": json.dumps(entry.deaths),
        "micro_batch": extra.get("micro_batch"),
        "retries": extra.get("retries", 0),
        "asked": entry.ask.times if entry.ask else 0,
        "wall_s": last.get("wall_s"),
        "recipe_key": extra.get("key") or entry.identity,
        "recipe": json.dumps(recipe.plain()),
        "parameters": json.dumps(dict(entry.params)),
        "layers": json.dumps(extra.get("layers") or {}),
    }
