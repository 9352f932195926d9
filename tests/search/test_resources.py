"""What a trial asks for, and how many of it a cluster has room for."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from books import row_of
from machines import BIG, GB, HEAD, SMALL
from searches import job_in, search
from toys import recipe

from distprune.errors import UserError
from distprune.search.config import Workers
from distprune.search.more import Ask
from distprune.search.resources import bounded, bundles, largest_on, no_room, slots_on
from distprune.search.setup import check_machine
from distprune.search.trial import run_trial

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"memory": 0}, r"workers.memory must be above 0, got 0\. Write 8GB"),
        ({"memory": "much"}, r"workers.memory must be a size in bytes, got 'much'\. Write 20GB"),
        ({"accelerator": "H100"}, r"accelerator is the type of GPU .* got 'H100' with gpus: 0\. Write gpus: 1"),
        ({"accelerator": "", "gpus": 1}, r"accelerator is the type of GPU .* in one word, got ''"),
        ({"ranks": 0}, r"workers.ranks must be in \[1, 1024\], got 0\. Leave it out"),
        ({"ranks": 2, "gpus": 0.5}, r"workers.gpus is that of each rank and must be 1, or 0 .* ranks: 2, got 0.5\. Write gpus: 1"),
        ({"ranks": 2, "gpus": 2}, r"workers.gpus is that of each rank .* got 2"),
        ({"resources": {"GPU": 1}}, r"workers.resources are custom resources .* 'GPU' is none\. Write cpus"),
        ({"resources": {"spot": 0}}, r"workers.resources.spot must be a whole number or a share .* got 0\. Write 1"),
        ({"resources": {"spot": 1.5}}, r"workers.resources.spot must be a whole number .* got 1.5"),
    ],
)
def test_a_wrong_value_is_one_line(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Workers.read(value, "workers")
    assert "\n" not in str(caught.value)


def test_a_search_that_says_nothing_asks_for_what_it_always_did(tmp_path: Path) -> None:
    assert bundles(Workers()) == [{"CPU": 1.0}] and bundles(Workers(cpus=2, gpus=0.25)) == [{"CPU": 2.0, "GPU": 0.25}]
    value = search(tmp_path, workers={"memory": "8GB", "gpus": 1, "accelerator": "H100", "ranks": 2, "resources": {"spot": 0.01}})
    assert type(value).read(json.loads(json.dumps(value.plain()))) == value
    each = {"CPU": 1.0, "spot": 0.01, "GPU": 1.0, "memory": 8e9, "accelerator_type:H100": 0.001}
    assert bundles(value.workers) == [each, each]


NODE = {"CPU": 3.0, "GPU": 2.0, "memory": 10.0 * GB, "accelerator_type:H100": 1.0}


@pytest.mark.parametrize(
    ("nodes", "asked", "slots"),
    [
        ([NODE], {}, 3),
        ([NODE, NODE], {"cpus": 2}, 2),  # 6 CPUs would be three trials
        ([NODE], {"gpus": 0.25}, 3),
        ([NODE], {"gpus": 1}, 2),
        ([{**NODE, "CPU": 64.0}], {"gpus": 0.1}, 20),
        ([{**NODE, "CPU": 9.0}], {"gpus": 0.4}, 4),  # of five one would lie on both
        ([{"CPU": 64.0, "GPU": 8.0}], {"gpus": 0.6}, 8),
        ([{"CPU": 64.0, "GPU": 3.0}], {"gpus": 1 / 3}, 9),
        ([{**NODE, "spot": 2.0}], {"resources": {"spot": 0.7}}, 2),
        ([{**NODE, "CPU": 9.0, "spot": 2.0}], {"resources": {"spot": 0.4}}, 5),  # of what is no device, no share lies anywhere
        ([NODE], {"gpus": 2}, 1),
        ([NODE, NODE], {"gpus": 3}, 0),
        ([NODE, NODE], {"memory": 4 * GB}, 4),
        ([NODE, NODE], {"gpus": 1, "ranks": 2}, 2),
        ([NODE, {"CPU": 3.0}], {"gpus": 1, "ranks": 3}, 0),  # of ranks, two fit
        ([NODE, {"CPU": 9.0, "GPU": 9.0, "accelerator_type:T4": 1.0}], {"gpus": 1, "accelerator": "H100"}, 2),
        ([NODE, {**NODE, "spot": 1.0}], {"resources": {"spot": 0.01}}, 3),
        ([NODE], {"resources": {"spot": 0.01}}, 0),
        ([NODE] * 4, {"most": 5}, 5),
        ([], {}, 0),
    ],
)
def test_a_bundle_lies_on_one_node(nodes: list[dict[str, float]], asked: dict[str, Any], slots: int) -> None:
    assert slots_on(nodes, Workers.read(asked, "workers")) == slots


@pytest.mark.parametrize(
    ("nodes", "asked", "largest"),
    [
        ([SMALL, HEAD], {}, 9.5),  # no trial lies on a head without CPUs
        ([SMALL, BIG, HEAD], {}, 19),
        ([SMALL, BIG, HEAD], {"gpus": 0.5}, 9.5),  # nor on a node without GPUs
        ([SMALL, BIG, HEAD], {"cpus": 4}, 19),
        ([SMALL, BIG, HEAD], {"ranks": 2}, 9.5),  # on the large one there is room for one rank with as much as it has
        ([BIG, {**BIG, "memory": 20.02 * GB}, HEAD], {"ranks": 2}, 19),  # of which the machines of one kind have a little more or less
        ([SMALL, BIG, HEAD], {"cpus": 10}, 0),
        ([], {}, 0),
    ],
)
def test_a_trial_can_be_given_what_a_node_has_on_which_it_fits(
    nodes: list[dict[str, float]], asked: dict[str, Any], largest: float
) -> None:
    """What it is given has room, and on each of its nodes a little is left."""
    workers = Workers.read({"memory": "3GB", **asked}, "workers")
    found = largest_on(nodes, workers)
    assert found == pytest.approx(largest * GB, rel=0.01)
    if found:
        assert slots_on(nodes, replace(workers, memory=int(found))) >= 1 > slots_on(nodes, replace(workers, memory=int(found * 1.1)))


def test_what_a_trial_was_given_on_larger_nodes_is_taken_back() -> None:
    workers, ask = Workers(memory=3 * GB), Ask(times=2, memory=12 * GB)
    assert [bounded(ask, workers, size * GB).memory for size in (20.0, 9.5, 2.0, 0.0)] == [12 * GB, int(9.5 * GB), 3 * GB, 3 * GB]
    assert bounded(ask, workers, 9.5 * GB).times == 2, "so that it may ask again"
    assert bounded(Ask(times=1, gpus=1.0), Workers(gpus=0.5), 0.0) == Ask(times=1, gpus=1.0)


def test_no_room_says_what_is_asked_for_and_what_there_is() -> None:
    asked = Workers.read({"gpus": 1, "accelerator": "A100", "memory": "16GB", "ranks": 2}, "workers")
    message = str(no_room([NODE, NODE], asked))
    assert message == (
        "workers asks for 1 CPUs, 1 GPUs, 16 GB, a A100 for each of 2 ranks, and the cluster has no room for one trial. "
        "Its nodes have: 3 CPUs, 2 GPUs, 10 GB, no A100. Ask for less."
    )


def test_this_machine_counts_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    check_machine(search(tmp_path, workers={"cpus": 2, "ranks": 2}))
    with pytest.raises(UserError, match=r"at most the 4 CPUs of this machine, got 2 for each of 3 ranks\. Write cpus: 1"):
        check_machine(search(tmp_path, workers={"cpus": 2, "ranks": 3}))


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (4, 0), (8, 1), (8, 3)])
@pytest.mark.parametrize("asked", [{"cpus": 1}, {"cpus": 3}, {"cpus": 16}, {"gpus": 1}, {"gpus": 2, "ranks": 1}])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_way_out_is_one(ranks: int, asked: Any, cpus: int, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes what the error says has less to write the next time, and at the third time nothing."""
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    workers = {"ranks": ranks, **asked}
    for _ in range(3):
        try:
            check_machine(search(tmp_path, workers=workers))
            break
        except UserError as error:
            told = {name: int(number) for name, number in re.findall(r"(cpus|gpus|ranks): (\d+)", str(error).partition("Write ")[2])}
            assert told and all(number < workers.get(name, 1) for name, number in told.items()), (workers, str(error))
            workers |= told
    else:
        pytest.fail(f"no way out of {asked}: {workers}")


# A share of a GPU is a share of its memory.


def test_a_trial_is_held_to_its_share_and_the_next_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[float] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", set_to.append)
    monkeypatch.setattr("distprune.search.trial.rows_of", lambda job, base, memory: iter([row_of(job.number, 0, final=True)]))
    job = job_in(tmp_path, recipe=recipe("dense").plain())
    list(run_trial(job))
    assert set_to == [], "a CPU has no cap"
    on_gpu = replace(job, device="cuda")
    for gpus in (0.0, 1.0, 2.0):
        list(run_trial(replace(on_gpu, ask=Ask(gpus=gpus).plain())))
    assert set_to == [], "nor has a whole GPU"
    with closing(run_trial(replace(on_gpu, ask=Ask(gpus=0.25).plain()))) as work:
        next(work)
        assert set_to == [0.25]
    assert set_to == [0.25, 1.0], "a worker that takes another trial, or is stopped, begins without a cap"
