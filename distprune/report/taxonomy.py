"""The paradigms in one picture, as an SVG file that needs nothing else."""

from collections.abc import Iterable

from distprune.report.framework import BRANCHES, paradigms

PICTURE = "docs/figures/taxonomy.svg"
_LINE, _IN_A_ROW, _LEAVES = 17, 4, 660  # height of a line; names in a row; where leaves begin


def picture() -> str:
    """The drawing docs/figures/taxonomy.svg: the survey's two questions, its branches, and the paradigms as their leaves."""
    leaves = [(branch, [entry.name for entry in paradigms() if entry.facts["branch"] == branch]) for branch in BRANCHES[1:]]
    tops, y = [], 10
    for _, names in leaves:
        tops.append(y)
        y += _LINE * -(-len(names) // _IN_A_ROW) + _LINE + 26
    middles = {branch: top + _height(names) / 2 for top, (branch, names) in zip(tops, leaves, strict=True)}
    static = _mean(middle for branch, middle in middles.items() if "static" in branch)
    train = (static + middles["sparse training, dynamic"]) / 2
    start = (train + middles["sparse selection"]) / 2
    late = (middles["after training"] + middles["while training"]) / 2
    nodes = {
        "pruning": (90, (late + start) / 2, ["pruning"]),
        "late": (250, late, ["mask from a trained", "network, or on the", "way there"]),
        "start": (250, start, ["at initialization:", "the kept values come", "from the start"]),
        "train": (420, train, ["sparse training:", "weights are trained", "under masks"]),
        "static": (560, static, ["static masks"]),
    }
    edges = [("pruning", "late"), ("pruning", "start"), ("start", "train"), ("train", "static")]
    drawn = [_edge(nodes[a][0], nodes[a][1], nodes[b][0], nodes[b][1]) for a, b in edges]
    for (branch, names), top in zip(leaves, tops, strict=True):
        parent = {"sparse selection": "start", "sparse training, dynamic": "train"}.get(branch, "static" if "static" in branch else "late")
        drawn.append(_edge(nodes[parent][0], nodes[parent][1], _LEAVES, top + _height(names) / 2))
    drawn += [_box(x - 76, middle - (_LINE * len(lines) + 10) / 2, 152, lines, "#dbe4f0") for x, middle, lines in nodes.values()]
    for (branch, names), top in zip(leaves, tops, strict=True):
        rows = [", ".join(names[i : i + _IN_A_ROW]) for i in range(0, len(names), _IN_A_ROW)]
        drawn.append(_box(_LEAVES, top, 280, [branch.split(", ")[-1], *rows], "#f4efe0"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 950 {y}" font-family="sans-serif" font-size="13" text-anchor="middle">'
    return "\n".join([head, *drawn, "</svg>"]) + "\n"


def _height(names: list[str]) -> int:
    return _LINE * (1 + -(-len(names) // _IN_A_ROW)) + 10


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _edge(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:g} {y:g} C{(x + to_x) / 2:g} {y:g} {(x + to_x) / 2:g} {to_y:g} {to_x:g} {to_y:g}" fill="none" stroke="#808890"/>'


def _box(x: float, y: float, width: float, lines: list[str], colour: str) -> str:
    """A box with lines of text; its own background, so that it reads on light and dark pages."""
    height = _LINE * len(lines) + 10
    rows = [f'<tspan x="{x + width / 2:g}" dy="{_LINE if i else 0}">{line}</tspan>' for i, line in enumerate(lines)]
    box = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="5" fill="{colour}" stroke="#808890"/>'
    return f'{box}<text x="{x + width / 2:g}" y="{y + _LINE:g}" fill="#202428">{"".join(rows)}</text>'
