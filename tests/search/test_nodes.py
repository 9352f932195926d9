"""Nodes that come and go: asked for, waited for, given back."""

import json
from pathlib import Path
from typing import Any

import pytest
from books import on_ray
from machines import BIG, GB, HEAD, SMALL
from searches import search

from distprune.errors import UserError
from distprune.search.more import Ask

pytestmark = pytest.mark.usefixtures("elsewhere")


class Nodes:
    """A cluster on a clock that sleeping moves on: which nodes it has when, and what its autoscaler is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, scales: bool, **kinds: list[tuple[float, list[dict[str, float]]]]) -> None:
        from distprune.search import cluster

        self.now, self.asked, self.said, self._when = 0.0, list[Any](), list[str](), kinds["when"]
        monkeypatch.setattr(cluster.access, "connect", lambda address: None)
        monkeypatch.setattr(cluster, "nodes", lambda: next(nodes for since, nodes in reversed(self._when) if since <= self.now))
        monkeypatch.setattr(cluster, "autoscales", lambda: scales)
        monkeypatch.setattr(cluster, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(cluster.ray, "cluster_resources", dict)

    def cluster(self, address: str | None = "head:6379") -> Any:
        from distprune.search.cluster import Cluster

        return Cluster(
            address, lambda event, facts: self.said.append(facts.get("message", event)), clock=lambda: self.now, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 1000:
            raise KeyboardInterrupt


ONE: dict[str, float] = {"CPU": 1.0}


@on_ray
def test_nodes_are_asked_for_at_once_waited_for_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Nodes(monkeypatch, scales=True, when=[(0.0, [{"GPU": 1.0}]), (70.0, [ONE]), (80.0, [ONE, ONE]), (90.0, [ONE])])
    cluster, value = there.cluster(), search(tmp_path, workers={"most": 3})
    cluster.join(value)
    assert there.now == 70 and there.asked == [[ONE] * 3], "for all trials at once, before the first begins"
    assert [line for line in there.said if "waiting" in line] == [
        f"waiting for a node with 1 CPU, for {seconds} s so far; Ctrl-C ends it" for seconds in (0, 30, 60)
    ]
    slots = []
    for there.now in (71.0, 80.0, 81.0, 84.0, 90.0, 95.0):
        slots.append(cluster.slots(value))
    assert slots == [1, 2, 2, 2, 1, 1] and there.said[-1] == "the nodes have changed: 1 trials at once, 2 before"
    cluster.release()
    cluster.release()
    assert there.asked[1:] == [[]], "once"


@on_ray
def test_no_node_is_asked_for_what_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has grown on the larger node, which then leaves; the largest of all is not for trials."""
    there = Nodes(monkeypatch, scales=False, when=[(0.0, [HEAD, SMALL, BIG]), (10.0, [HEAD, SMALL])])
    cluster = there.cluster()
    cluster.join(search(tmp_path, workers={"memory": "8GB"}))
    assert cluster.bounded(None) is None
    for there.now, most in ((0.0, 19e9), (10.0, 9.5e9)):
        assert cluster.largest() == most and cluster.bounded(Ask(memory=64 * GB)).memory == most


@on_ray
@pytest.mark.parametrize(
    ("address", "scales", "workers", "message"),
    [
        ("head:6379", False, {"most": 2}, r"the cluster has no room for one trial\. .* Ask for less\.$"),
        (None, True, {"most": 2}, r"Ask for less\.$"),
        ("head:6379", True, {}, r"The cluster can bring nodes if it is told how many: write workers\.most"),
    ],
)
def test_nodes_that_will_not_come_are_not_waited_for(
    address: str | None, scales: bool, workers: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Nodes(monkeypatch, scales=scales, when=[(0.0, [])])
    with pytest.raises(UserError, match=message):
        there.cluster(address).join(search(tmp_path, workers=workers))
    assert there.now == 0 and there.asked == []


@on_ray
def test_who_gives_up_waiting_takes_back_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Nodes(monkeypatch, scales=True, when=[(0.0, [])])
    with pytest.raises(KeyboardInterrupt):
        there.cluster().join(search(tmp_path, trials=2, workers={"most": 9, "ranks": 2}))
    assert there.asked == [[ONE] * 4, []], "two trials of two ranks are all that will run"


@on_ray
@pytest.mark.parametrize(
    ("said", "scales"),
    [
        (None, False),
        ({"autoscaler_report": {"active_nodes": {"node_" + "ab" * 28: 1}}}, False),
        ({"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}, True),
    ],
)
def test_an_autoscaler_names_the_kinds_of_its_nodes(said: Any, scales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import cluster

    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)
    monkeypatch.setattr(cluster, "_internal_kv_get", lambda key: said and json.dumps(said).encode())
    assert cluster.autoscales() is scales
