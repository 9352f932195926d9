"""A run goes on from any report with the same bits, in this process and in a fresh one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import PARADIGMS, finish, ready, same, tensors

from distprune.core.executor import execute
from distprune.errors import UserError


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_from_every_report(paradigm: str, optimizer: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"regularizer": "growing_l2", "train": {"optimizer": optimizer, "length": "3ep"}, "report_every": "7it"}
    whole = ready(paradigm, **changes)
    reports = []
    for report in execute(whole.plan, whole.state, whole.env):
        reports.append(report)
        whole.state.save(tmp_path / f"{report.index}.safetensors", note=report.index)
    for index in range(len(reports)):
        again = ready(paradigm, **changes)
        assert again.state.load(tmp_path / f"{index}.safetensors") == {"note": index}
        assert finish(again) == reports[index + 1 :]
        assert same(tensors(again), tensors(whole)) and again.state.ledger == whole.state.ledger


def test_in_a_fresh_process(tmp_path: Path) -> None:
    run = ready("lth", report_every="7it")
    for count, _ in enumerate(execute(run.plan, run.state, run.env)):
        if count == 4:
            run.state.save(tmp_path / "middle.safetensors")
    run.state.save(tmp_path / "end.safetensors")
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch; torch.set_num_threads(1)
from toys import ready, finish
run = ready("lth", report_every="7it")
run.state.load({str(tmp_path / "middle.safetensors")!r})
finish(run)
run.state.save({str(tmp_path / "again.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert same(load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "end.safetensors"))


def test_two_trains_are_one(tmp_path: Path) -> None:
    from distprune.core.plan import Plan
    from distprune.core.stages import Snapshot

    one, two = ready("dense", regularizer="growing_l2"), ready("dense", regularizer="growing_l2")
    (whole,) = one.plan.stages
    from dataclasses import replace

    split = Plan([replace(whole, until=13), Snapshot(tag="here"), whole])
    list(execute(one.plan, one.state, one.env))
    list(execute(split, two.state, two.env))
    assert same(tensors(one), tensors(two))


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "other"])
def test_a_damaged_state_is_refused_and_changes_nothing(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run = ready()
    run.state.save(path)
    data = bytearray(path.read_bytes())
    if damage == "other":
        from toys import prepare, recipe

        other = prepare(recipe(model={"import": "toys:network", "hidden": 8}))
        other.state.save(path)
    else:
        path.write_bytes({"empty": b"", "torn": bytes(data[:-100]), "flipped": bytes([*data[:20], data[20] ^ 0xFF, *data[21:]])}[damage])
    before = run.state.values()
    with pytest.raises(UserError, match="is not a readable state of this network"):
        run.state.load(path)
    assert all(torch.equal(value, before[name]) for name, value in run.state.values().items())


def test_header_is_plain_json(tmp_path: Path) -> None:
    run = ready("gradual")
    finish(run)
    run.state.save(tmp_path / "s.safetensors", reason="look")
    from safetensors import safe_open

    with safe_open(str(tmp_path / "s.safetensors"), framework="pt") as file:
        tree = json.loads(file.metadata()["tree"])
    assert tree["facts"] == {"reason": "look"} and tree["position"]["clock"] == run.state.clock
