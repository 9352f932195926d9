"""What a search hands out in the end belongs to the trials of its journal."""

from pathlib import Path

import pytest
import torch
from searches import search, start, trials

from distprune.core.masks import Masks
from distprune.core.recipe import Recipe
from distprune.search.entry import Entry
from distprune.search.finale import write_masks
from distprune.search.trial import run_trial


def test_masks_of_a_trial_that_a_journal_has_lost_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"paradigm": ["at_init"], "criterion": ["magnitude"], "allocator": ["erk"], "regularizer": ["none"]}
    folder = start(search(tmp_path, trials=1, space=space), using=run_trial, workers=1)
    (trial,) = trials(folder)
    entry = Entry.of(trial)
    path = folder.masks_file(0)
    own, written = Masks.load(path), path.stat().st_mtime_ns
    write_masks(folder, entry)
    assert path.stat().st_mtime_ns == written, "the test split is read once"

    lost = Recipe.read({**entry.recipe.plain(), "sparsity": 0.5})  # trial 0 of a journal whose end was lost
    other = Masks({name: torch.ones_like(mask) for name, mask in own.items()})
    other.save(path, trial=0, key="another", recipe=lost.plain(), test={"accuracy": 0.0})
    write_masks(folder, entry)
    assert Masks.load(path).equal(own) and not own.equal(other)
