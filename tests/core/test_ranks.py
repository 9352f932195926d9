"""One run on two processes: the same masks on both and as on one, and the same accuracy."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from rank_process import alone
from toys import REPOSITORY, ready

from distprune.core.ranks import ALONE, Together
from distprune.core.run import root_key
from distprune.errors import UserError

DOUBLE: dict[str, Any] = {"model": {"import": "rank_process:double"}, "train": {"length": "2ep", "batch_size": 32}}
CASES: dict[str, dict[str, Any]] = {
    "one-shot": {**DOUBLE, "paradigm": "at_init", "criterion": "snip"},
    "gradual": {**DOUBLE, "paradigm": "gradual", "criterion": "magnitude", "regularizer": {"name": "l1", "strength": 1e-3}},
    "rounds": {**DOUBLE, "paradigm": {"name": "lth", "share": 0.7, "rewind_to": "10%"}},
    "dynamic": {**DOUBLE, "paradigm": "rigl"},
    "scores": {**DOUBLE, "paradigm": {"name": "edge_popup", "weights": "kaiming"}, "sparsity": 0.5},
    "penalty": {**DOUBLE, "paradigm": "gradual", "regularizer": "growing_l2", "granularity": "filter", "sparsity": 0.3},
    "parts": {**DOUBLE, "paradigm": "gradual", "criterion": "snip", "micro_batch": 4, "model": {"name": "mlp", "hidden": [16]}},
    "uneven": {**DOUBLE, "paradigm": "at_init", "criterion": "magnitude", "train": {"length": "2ep", "batch_size": 33}},
    "dropout": {"paradigm": "gradual", "train": {"length": "8ep", "batch_size": 32}},
    "noise": {"paradigm": "dense", "train": {"length": "2ep", "batch_size": 32, "optimizer": {"name": "sghmc"}}},
    "settling": {**DOUBLE, "paradigm": {"name": "early_bird", "every": "2it", "window": 2, "near": 0.9}, "deaf": True},
    "broken": {**DOUBLE, "paradigm": "gradual", "broken": True},
}
EXACT = [name for name in CASES if name not in ("dropout", "noise", "broken")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes have found, every case in the same two."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(CASES))
    tests = str(REPOSITORY / "tests")
    processes = [
        subprocess.Popen(
            [sys.executable, f"{tests}/rank_process.py", str(rank), "2", str(folder)],
            env={**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_hold_the_same_bits(name: str, ran: list[dict[str, Any]]) -> None:
    assert ran[0][name] == ran[1][name], "masks, weights, statistics and reports"


@pytest.mark.parametrize("name", EXACT)
def test_masks_are_those_of_one_process_and_so_is_the_accuracy(name: str, ran: list[dict[str, Any]]) -> None:
    one, two = alone(CASES[name]), ran[0][name]
    assert two["masks"] == one["masks"] and len({bit for mask in one["masks"].values() for bit in mask}) == 2
    assert two["reports"] == one["reports"], "cost, kept weights and accuracy"
    tolerance = 1e-4 if CASES[name]["model"].get("name") else 1e-9  # float32, or float64
    assert two["losses"] == pytest.approx(one["losses"], abs=max(tolerance, 1e-6)), "measured in float32"
    for key, values in one["values"].items():
        assert two["values"][key] == pytest.approx(values, abs=tolerance), key


@pytest.mark.parametrize("name", ["dropout", "noise"])
def test_what_is_drawn_for_each_slice_costs_no_accuracy(name: str, ran: list[dict[str, Any]]) -> None:
    one, two = alone(CASES[name]), ran[0][name]
    assert [row[:4] for row in two["reports"]] == [row[:4] for row in one["reports"]]
    assert two["reports"][-1][4] == pytest.approx(one["reports"][-1][4], abs=0.1)
    assert name == "noise" or one["reports"][-1][4] > 0.5


def test_rank_0_says_when_a_stage_ends_before_its_time(ran: list[dict[str, Any]]) -> None:
    whole = {**CASES["settling"], "paradigm": {**CASES["settling"]["paradigm"], "near": 0.0, "window": 50}}
    assert ran[1]["settling"]["reports"][-1][2] < alone(whole)["reports"][-1][2], "rank 1 would have gone on"


def test_a_rank_that_has_come_apart_is_put_right(ran: list[dict[str, Any]]) -> None:
    assert ran[0]["broken"]["masks"] == ran[1]["broken"]["masks"] and ran[0]["broken"]["values"] == ran[1]["broken"]["values"]


def test_what_ranks_say_to_one_another(ran: list[dict[str, Any]]) -> None:
    first, second = (found["primitives"] for found in ran)
    assert first["told"] == second["told"] == "rank 0's" and first["nothing"] == second["nothing"] == ""
    assert first["masks"] == second["masks"] == {"a": [[True, False], [False, True]], "b": [True]}
    told = [{"steps": 3, "deep": {"a": [0.0]}, "only 0": 1}, [True], {"l2": {"w": 1.0}}]
    assert first["plain"] == second["plain"] == told, "plain numbers too, in the memory that the hook holds"
    assert first["order"] == second["order"] == {"x": [1.0, 1.0], "y": [0.0, 0.0]}, "by name"
    whole = (10 * torch.arange(22.0).reshape(11, 2)).tolist()
    assert first["each"] == second["each"] == whole and first["one"] == second["one"] == whole[:3]
    assert first["computed"] == [3, 3, 3] and second["computed"] == [3, 2, 1], "each part once, and one sample for the shape of nothing"


def test_tensors_that_rank_0_does_not_hold_are_an_error() -> None:
    class Second(Together):
        """Rank 1, to whom rank 0 says what it has said before."""

        def __init__(self, said: bytes) -> None:
            self.rank, self.size, self._device, self._said = 1, 2, torch.device("cpu"), said

        def tell(self, content: bytes) -> bytes:
            return self._said

        def _of_first(self, values: torch.Tensor) -> torch.Tensor:
            return values

    class First(Second):
        def tell(self, content: bytes) -> bytes:
            self._said = content
            return content

    state = ready("dense").state
    first = First(b"")
    first.rank = 0
    first.align(state)
    second = Second(first._said)
    second.align(state)
    state.slots["0.Hook"] = {"5:mask": torch.ones(2)}
    with pytest.raises(
        UserError, match=r"the same tensors, and rank 1 differs from rank 0 in slots/0\.Hook/5:mask\. .*write workers\.ranks: 1\."
    ):
        second.align(state)


def test_ranks_are_part_of_the_key_and_one_is_none(ran: list[dict[str, Any]]) -> None:
    run = ready("dense")
    keys = {ranks: root_key(run.recipe, run.env.device, ranks=ranks) for ranks in (1, 2, 4)}
    assert len(set(keys.values())) == 3 and keys[1] == root_key(run.recipe, run.env.device)
    assert ran[0]["one-shot"]["key"] != alone(CASES["one-shot"])["key"]


def test_a_batch_that_is_smaller_than_the_ranks_says_so() -> None:
    task = ready("dense").env.task
    batch = task.batch(0, 0, 0, 3)
    assert task.ranks is ALONE and [index for index, _ in task.share(batch)] == [0]
    task.ranks = type("Four", (type(ALONE),), {"size": 4, "rank": 1})()
    with pytest.raises(UserError, match=r"A batch of 3 cannot be shared by 4 ranks\. Write workers\.ranks: 1"):
        task.share(batch)
    task.micro_batch = 2
    shares = []
    for rank in range(4):
        type(task.ranks).rank = rank
        shares.append([(index, len(part[1])) for index, part in task.share(task.batch(0, 0, 0, 14))])
    assert shares == [[(0, 2), (1, 2)], [(2, 2), (3, 2)], [(4, 2), (5, 1)], [(6, 2), (7, 1)]], "as many sums on each rank"


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, None])
def test_no_part_of_a_batch_is_empty_on_any_rank(size: int, micro_batch: int | None) -> None:
    task = ready("dense").env.task
    task.ranks = type("Some", (type(ALONE),), {"size": size})()
    task.micro_batch = micro_batch
    for samples in range(size, 14):
        shares = []
        for rank in range(size):
            type(task.ranks).rank = rank
            shares.append(task.share(task.batch(0, 0, 0, samples)))
        sizes = [[len(part[1]) for _, part in share] for share in shares]
        assert sum(map(sum, sizes)) == samples and min(map(min, sizes)) >= 1 and len({len(share) for share in shares}) == 1
        assert max(map(max, sizes)) <= max(micro_batch or samples, 2), "two where one more than the smallest slice is left"
        assert [index for share in shares for index, _ in share] == list(range(sum(map(len, shares))))
