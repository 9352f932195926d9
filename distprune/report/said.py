"""What is said of a trial: its recipe in short, its commands, and both with its numbers where it is pointed at."""

import shlex
from collections.abc import Mapping
from typing import Any

from distprune.errors import command
from distprune.report.data import Data, Row
from distprune.report.drawn import many, number, plain, share


def choice(value: Any) -> str:
    """An axis of a recipe as YAML writes it, in short: `lth (share 0.2)`."""
    if not isinstance(value, Mapping):
        return str(value)
    options = {key: item for key, item in value.items() if key not in ("name", "import")}
    text = ", ".join(f"{key} {_short(item)}" for key, item in options.items())
    name = str(value.get("name") or value.get("import") or "")
    return f"{name} ({text})" if text else name


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return str(value)


def short_recipe(row: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe chose, a line an axis; axes that its paradigm has no use for are left out."""
    lines = [choice(recipe.get("paradigm", row["paradigm"]))]
    for axis in ("criterion", "allocator", "granularity", "regularizer"):
        if row[axis] not in (None, "none") and (axis, row[axis]) != ("granularity", "weight"):
            lines.append(f"{axis}: {choice(recipe.get(axis, row[axis]))}")
    train = recipe.get("train")
    if isinstance(train, Mapping) and "optimizer" in train:
        lines.append(f"optimizer: {choice(train['optimizer'])}, {train.get('length', '')}")
    return lines


def of_trial(data: Data, number: int) -> list[str]:
    """What can be done with a trial of the front; nothing where the search is simulated."""
    if data.simulated is not None:
        return []
    target = shlex.quote(f"exported/{data.folder.path.name}-{number}")
    return [
        command(f"export {data.folder.quoted} --trial {number} --to {target}"),
        command(f"replay {data.folder.quoted} {number}"),
    ]


def hover(data: Data, row: Row) -> str:
    """What is said of a trial: its numbers, its recipe in short, and its commands."""
    test = "" if row["test"] is None else f", {number(row['test'])} on test"
    seeds = f"<br>{number(row['mean'])} over {many(row['seeds'], 'more seed')}" if row["seeds"] else ""
    recipe = "<br>".join(plain(_cut(line)) for line in short_recipe(row, data.long(row["number"], "recipe") or {}))
    commands = "".join(f"<br><i>{plain(_cut(line))}</i>" for line in of_trial(data, row["number"]))
    return (
        f"<b>trial {row['number']}</b>: {number(row['objective'])} on validation{test}{seeds}<br>"
        f"keeps {share(1 - row['sparsity'])} of the weights, {row['kept']:,}<br>{recipe}{commands}"
    )


def _cut(line: str, most: int = 90) -> str:
    return line if len(line) <= most else line[: most - 1] + "…"
