"""Figures show what was counted: against sums, medians and rankings made here by hand."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import LAYERS, Row, dense, failed, fronted, reports, run_folder, stopped, trial, usual
from safetensors.torch import save_file
from torch import ones

from distprune.report.data import Data
from distprune.report.figures.compute import compute, parts
from distprune.report.figures.curves import curves
from distprune.report.figures.failures import failures, reasons
from distprune.report.figures.front import front
from distprune.report.figures.importance import gaps, importance
from distprune.report.figures.layers import layers
from distprune.report.figures.paradigms import paradigms
from distprune.report.figures.sanity import sanity
from distprune.report.headline import cards


def _data(path: Path, rows: list[Row], **search: Any) -> Data:
    return Data.read(run_folder(path / "run", rows, **search))


def test_all_samples_that_were_run_are_somewhere_and_none_twice(tmp_path: Path) -> None:
    rows = [
        trial(0, cost=1000.0, spent=1100.0),  # 100 for scoring
        trial(1, cost=1000.0, spent=300.0, saved=800),  # 800 of its bill another had run
        trial(2, cost=1000.0, spent=1700.0, attempts=2, deaths='["x"]'),  # 700 again, after its worker died
        stopped(3, cost=400.0, spent=450.0),
        failed(4, "x", spent=250.0, cost=250.0),
        trial(5, round_of=0, cost=900.0, spent=0.0, saved=900),  # was billed in trial 0
        trial(6, ended="duplicate", cost=1000.0, spent=0.0),
        trial(7, ended="running", cost=500.0, spent=500.0),
        trial(8, ended="running", cost=500.0, spent=540.0, attempts=3),  # was promoted twice: 40 for scoring
    ]
    found = parts(_data(tmp_path, rows))
    expected = {
        "useful": 1000.0 + 200.0 + 1000.0,
        "stopped": 400.0,
        "running": 1000.0,
        "scoring": 100.0 + 100.0 + 50.0 + 40.0,
        "again": 700.0,
    }
    assert {name: found[name] for name in expected} == expected and found["failed"] == 250.0 and found["shared"] == 800.0
    run = sum(value for name, value in found.items() if name not in ("shared", "stopping"))
    assert run == sum(row["spent"] for row in rows)
    # The finished one of paradigm 3 % 4 is none: the middle bill of those that finished is 1000.
    assert found["stopping"] == 1000.0 - 400.0
    drawn = compute(_data(tmp_path / "again", rows))
    assert drawn.caption.startswith("Of 4.84 k samples run, 45.5% went into trials that finished and 19.6% was lost to failures;")
    assert "; 2 minutes of workers in the last attempt of each trial" in cards(_data(tmp_path / "card", rows))


def test_paradigms_are_compared_at_the_first_rung_by_the_score_there(tmp_path: Path) -> None:
    rows = [trial(n) if n % 3 else stopped(n) for n in range(16)] + [dense(16)]
    late = trial(17, paradigm="late")  # judged for the first time beyond the second rung

    def curve(row: Row) -> list[Row]:
        found = reports(row)
        return [{**one, "rung": -1, "score": None} if one["cost"] < 2000 else one for one in found] if row is late else found

    data = Data.read(run_folder(tmp_path / "run", [*rows, late], curve=curve))
    drawn = paradigms(data)
    expected = {row["number"]: reports(row)[0]["score"] for row in rows if row["paradigm"] != "dense"}
    assert {row[1]: row[3] for row in drawn.rows} == expected
    groups = {
        name: [expected[row["number"]] for row in rows if row["paradigm"] == name] for name in ("gradual", "lth", "at_init", "finetune")
    }
    first = max(groups, key=lambda name: statistics.median(groups[name]))
    assert drawn.caption.startswith(f"At 1 k samples, {first} has the best median of the 4 paradigms with 3 trials or more:")
    assert f"{statistics.median(groups[first]):.4f}, middle half" in drawn.caption and "1 paradigm is missing" in drawn.caption
    assert all(row[2] == pytest.approx(1 - json.loads(rows[row[1]]["recipe"])["sparsity"]) for row in drawn.rows), "what it is judged for"


def test_a_share_of_flops_is_not_told_as_one_of_weights(tmp_path: Path) -> None:
    def planned(number: int, **of: Any) -> Row:
        row = trial(number, sparsity=0.9)
        return {**row, "recipe": json.dumps({**json.loads(row["recipe"]), "sparsity": 0.6, **of})}

    rows = [planned(0), planned(1, sparsity_of="params"), planned(2, sparsity_of="flops"), planned(3, sparsity_of={"name": "flops"})]
    found = {row[1]: row[2] for row in paradigms(_data(tmp_path, rows)).rows}
    assert found == {number: pytest.approx(density) for number, density in enumerate((0.4, 0.4, 0.1, 0.1))}


def test_a_trial_is_behind_the_best_that_costs_no_more() -> None:
    costs = np.array([[0.1], [0.2], [0.2], [0.4]])
    assert gaps(np.array([0.7, 0.9, 0.8, 0.85]), costs).tolist() == pytest.approx([0.0, 0.0, -0.1, -0.05])
    two = np.array([[0.1, 0.5], [0.2, 0.4]])  # neither costs less in both
    assert gaps(np.array([0.7, 0.6]), two).tolist() == [0.0, 0.0]


def _planted(number: int, effect: float) -> Row:
    random = np.random.default_rng(number)
    good, lr, share = bool(random.random() < 0.3), float(random.uniform(0.01, 0.2)), float(random.uniform(0.1, 0.9))
    params = {"criterion/a": "snip" if good else "random", "sgd/lr": lr, **({"lth/share": share} if number % 2 else {})}
    value = 0.5 + effect * good + 0.1 * float(random.random())
    return trial(number, objective=value, parameters=json.dumps(params), costs='{"params": 0.1}')


@pytest.mark.parametrize("effect", [0.3, 0.0])
def test_importance_finds_the_choice_that_counts_and_nothing_where_none_does(effect: float, tmp_path: Path) -> None:
    drawn = importance(_data(tmp_path, [_planted(number, effect) for number in range(120)]))
    above = [row[0] for row in drawn.rows if row[4]]
    assert above == (["criterion"] if effect else []), drawn.rows
    assert sum(row[2] for row in drawn.rows) == pytest.approx(1.0)
    assert drawn.caption.startswith(
        "criterion decided the most among those above chance, with" if effect else "No choice decides more than chance"
    )
    assert {row[0]: row[1] for row in drawn.rows} == {"criterion": 120, "sgd/lr": 120, "lth/share": 60}


def test_layers_are_counted_against_the_masks_or_the_densest_trial(tmp_path: Path) -> None:
    rows = fronted([trial(number, objective=0.9 - 0.1 * number) for number in range(3)])
    assert all(row["pareto"] for row in rows)
    folder = run_folder(tmp_path / "run", rows)
    counted = {row["number"]: json.loads(row["layers"]) for row in rows}
    most = {name: max(found[name] for found in counted.values()) for name in LAYERS}
    guessed = layers(Data.read(folder))
    assert [row[3] for row in guessed.rows] == [most[name] for _ in rows for name in LAYERS]
    assert "until then shares are of the most that any trial kept there" in guessed.note
    middle_count = statistics.median(counted[row["number"]]["fc1.weight"] for row in rows)
    assert guessed.caption == f"fc1.weight keeps the most weights, {middle_count:,.0f}: median over 3 trials of the front."
    with_dense = layers(_data(tmp_path / "dense", fronted([*rows, dense(3)])))
    assert "keeps the largest part" in with_dense.caption and "until then" not in with_dense.note, "a dense one has them all"
    save_file({name: ones(size).bool() for name, size in LAYERS.items()}, folder.masks_file(rows[0]["number"]))
    drawn = layers(Data.read(folder))
    assert [(row[0], row[1], row[2], row[3]) for row in drawn.rows] == [
        (row["number"], name, counted[row["number"]][name], LAYERS[name]) for row in rows for name in LAYERS
    ]
    middle = {name: statistics.median(counted[row["number"]][name] / LAYERS[name] for row in rows) for name in LAYERS}
    assert drawn.caption.startswith("conv.weight keeps the largest part of its weights, 100%") and "until then" not in drawn.note
    assert f"fc1.weight the smallest, {middle['fc1.weight']:.1%}" in drawn.caption


def test_every_curve_is_that_of_its_trial_and_stops_are_marked(tmp_path: Path) -> None:
    rows = usual(24)
    drawn = curves(_data(tmp_path, rows))
    assert drawn.figure is not None
    kinds = {trace.name: trace for trace in drawn.figure.data if trace.mode == "lines"}
    finished = [row for row in rows if row["ended"] == "finished" and not row["pareto"]]
    expected = [value for row in finished for value in (*[one["objective"] for one in reports(row)], None)]
    assert list(kinds["finished"].y) == expected
    marks = next(trace for trace in drawn.figure.data if trace.marker.symbol == "x-thin" and trace.name == "stopped")
    assert list(marks.x) == [1000.0] * sum(row["ended"] == "stopped" for row in rows)
    lines = [shape.x0 for shape in drawn.figure.layout.shapes]
    assert lines == [1000.0, 2000.0], "a line a rung"


def test_what_is_not_on_the_front_says_why_and_limits_are_lines(tmp_path: Path) -> None:
    rows = fronted([*(trial(number) for number in range(6)), trial(6, violated=["floor"])])
    drawn = front(_data(tmp_path, rows, floor=0.6, budget=[{"cost": "params", "most": 0.3}]))
    assert drawn.figure is not None
    texts = [text for trace in drawn.figure.data if trace.name == "finished" for text in trace.text]
    assert [text for text in texts if "not on the front: floor" in text] and len(drawn.figure.layout.shapes) == 2
    written = front(_data(tmp_path / "written", rows, budget={"cost": {"name": "params"}, "most": 0.3}))
    assert written.figure is not None and len(written.figure.layout.shapes) == 1, "a cost with options is one too"
    flags = {row[0]: row[1] for row in drawn.rows}
    assert flags == {row["number"]: row["pareto"] for row in rows}


def test_failures_are_counted_by_class_and_by_reason(tmp_path: Path) -> None:
    rows = [trial(0), failed(1, "b"), failed(2, "a"), failed(3, "a"), failed(4, "x" * 400, ended="oom", deaths='["killed"]')]
    data = _data(tmp_path, rows)
    assert [(end, reason[:3], count, first) for end, reason, count, first in reasons(data)] == [
        ("error", "a", 2, 2), ("error", "b", 1, 1), ("oom", "xxx", 1, 4),
    ]  # fmt: skip
    drawn = failures(data)
    assert drawn.figure is not None and dict(zip(drawn.figure.data[0].y, drawn.figure.data[0].x, strict=True)) == {"oom": 1, "error": 3}
    assert drawn.caption.startswith("4 trials of 5 failed, 80.0%;") and "Workers of 1 trial died" in drawn.caption


def test_sanity_checks_are_read_where_they_lie(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", usual())
    (folder.path / "learned.json").write_text("[]")
    (folder.path / "broken.json").write_text('{"format": "distprune.sanity/1", ')
    (folder.path / "numbers.json").write_text(json.dumps({"format": "distprune.sanity/1", "rows": 3, "verdict": "x"}))
    assert "holds no numbers" in sanity(Data.read(folder)).caption
    rows = [{"variant": "as found", "values": [0.9, 0.8]}, {"variant": "shuffled", "values": [None, 0.7]}]
    found = {"format": "distprune.sanity/1", "rows": rows, "seeds": [0, 1], "verdict": {"text": "It knows."}, "objective": "accuracy"}
    (folder.path / "numbers.json").write_text(json.dumps(found))
    drawn = sanity(Data.read(folder))
    assert drawn.caption == "It knows." and drawn.figure is not None
    assert list(drawn.figure.data[0].x) == [0.9, 0.8, 0.7] and list(drawn.figure.data[1].x) == pytest.approx([0.85, 0.7])
