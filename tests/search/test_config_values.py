"""Every key of a search with values that make no sense: each is one line with the key and a way out, or the search runs."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import search, start, trials

from distprune.core.lengths import check_length
from distprune.core.options import check_type
from distprune.errors import UserError
from distprune.search import setup, tables
from distprune.search.config import Budget, Caching, Finalists, Limits, Search, Workers, read_size

pytestmark = pytest.mark.usefixtures("no_finale")

SPACE: dict[str, Any] = {"paradigm": ["at_init"], "criterion": ["magnitude", "random"], "allocator": ["erk"], "regularizer": ["none"]}
NUMBERS: list[Any] = [0, -1, 1, 0.5, math.nan, math.inf, 10**12, 1e300, 10**400]
OTHERS: list[Any] = ["", "text", "0ep", "0.0001ep", "5", "1e999GB", "foo://b/x", "a\0b", "x" * 300, True, None]
EDGES: list[Any] = [*NUMBERS, *OTHERS, [], {}, [None], ["text"], {"text": 1}]
PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "limits": (Limits, {"trials": 3}),
    "workers": (Workers, {}),
    "finalists": (Finalists, {}),
    "cache": (Caching, {}),
    "budget": (Budget, {"most": 0.5}),
}
KEYS = [(field.name,) for field in dataclasses.fields(Search)]
KEYS += [(part, field.name) for part, (kind, _) in PARTS.items() for field in dataclasses.fields(kind)]
OPTIONS = [(table.kind, entry.name, option) for table in (tables.sampler, tables.scheduler) for entry in table for option in entry.options]
SINGLE = ("halving", "median", "cmaes", "gp")  # for one objective, or quicker with it
NEVER_ENDS = [(("limits", "trials"), 10**12)]  # of use, but for no test


def _with(storage: Path, place: tuple[str, ...], value: Any) -> Search:
    changes: dict[str, Any] = {"storage": str(storage), "space": SPACE, "limits": {"trials": 3}, "cache": False}
    if len(place) == 3:
        kind, name, option = place
        changes[kind] = {"name": name, option: value}
        if name in SINGLE:
            changes |= {"minimize": [], **({"scheduler": "none"} if kind == "sampler" else {})}
        if name == "constrained_rl":
            changes |= {"budget": {"cost": "params", "most": 0.5}, "space": {**SPACE, "allocator": ["constrained_rl"]}}
    elif len(place) == 2:
        changes[place[0]] = {**PARTS[place[0]][1], place[1]: value}
    else:
        changes[place[0]] = value
    return Search.read({**search(storage).plain(), **changes})


@pytest.mark.parametrize("place", [*KEYS, *OPTIONS], ids=".".join)
def test_a_value_is_one_line_with_a_way_out_or_of_use(place: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup, "_LOOKED_AT", 2)
    for index, value in enumerate(EDGES):
        if (place, value) in NEVER_ENDS:
            continue
        before = sorted(tmp_path.rglob("*"))
        try:
            found = _with(tmp_path / str(index), place, value)
            assert Search.read(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(found.plain()))))) == found
            folder = start(found)
        except UserError as error:
            message = str(error)
            assert "\n" not in message and (place[-1] in message or (place == ("minimize",) and "cost" in message)), (value, message)
            assert re.search(r"[.?:] [A-Z{]", message), f"no way out for {value!r}: {message}"
            assert sorted(tmp_path.rglob("*")) == before, "nothing is written before everything is checked"
        else:
            assert all(trial.state.is_finished() for trial in trials(folder, name=found.name, objectives=1 + len(found.minimize)))


@pytest.mark.parametrize(
    ("value", "kind", "way_out"),
    [
        ("95 %", float, "Write 0.95."),
        ("much", float, "Write a value such as 0.5."),
        (math.nan, float | None, "Write a value such as 0.5, or leave it out."),
        ("3", int, "Write 3."),
        (1e9, int, "Write 1000000000."),
        (2**63, int, "Write a value such as 1."),
        (5, str, "Write '5'."),
        ("runs/x", tuple[str, ...], "Write [runs/x]."),
        ({"paradigm": "lth"}, tuple[dict[str, Any], ...], 'Write [{"paradigm": "lth"}].'),
        ("yes", bool, "Write a value such as true."),
    ],
)
def test_a_mistaken_type_is_answered_with_what_to_write(value: Any, kind: Any, way_out: str) -> None:
    with pytest.raises(UserError, match=r"^here must be .*, got .*\. " + re.escape(way_out) + "$"):
        check_type(value, kind, "here")


def test_sizes_and_lengths_are_finite() -> None:
    assert read_size("1.5GB", "x") == 1_500_000_000 and read_size("2e3", "x") == 2000 and read_size(7, "x") == 7
    for size in ("1e999GB", ".GB", "1.2.3", "-5GB", "GB", ""):
        with pytest.raises(UserError, match="x must be a size in bytes, got .* Write 20GB or 500MB"):
            read_size(size, "x")
    assert check_length("0ep", "x") == "0ep"
    for length in ("0ep", "0.0it", "9" * 400 + "ep", "5ep\n", "\u0665ep"):
        with pytest.raises(UserError, match="x must be .* Write"):
            check_length(length, "x", zero=False)
