"""Ray's nodes: joining them, and for how many trials they have room as they come and go. Autoscalers are told early what will be needed."""

import atexit
import json
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get

from distprune.errors import UserError
from distprune.search import access
from distprune.search.config import Search, Workers
from distprune.search.more import Ask
from distprune.search.resources import bounded, bundles, largest_on, no_room, slots_on

LOOK_EVERY_S = 3.0  # at the nodes
SAY_EVERY_S = 30.0  # that they are waited for
_STATUS = b"__autoscaling_status"  # what the first autoscaler says of itself
_OF_NO_KIND = "node_"  # what an autoscaler that only looks on calls each node


class Cluster:
    """Ray on this machine, or the cluster at `address`, or the one that this process runs in."""

    def __init__(
        self,
        address: str | None,
        listen: Callable[[str, dict[str, Any]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address, self._listen, self._clock, self._sleep = address, listen, clock, sleep
        self._slots, self._looked, self._announced, self._workers = 0, 0.0, False, Workers()

    def join(self, search: Search) -> None:
        """Connect, and wait for a first node if an autoscaler will bring one. Raises UserError where not even one trial will ever fit."""
        access.connect(self._address)
        self._workers = search.workers
        self._announce(search)
        if not self._count(search):
            self._await(search)
        resources = {str(name): float(amount) for name, amount in ray.cluster_resources().items()}  # type: ignore[no-untyped-call]
        self._listen("slots", {"slots": self._slots, "resources": resources})

    def slots(self, search: Search) -> int:
        """Trials that have room at once, as the nodes were a few seconds ago."""
        if self._clock() - self._looked >= LOOK_EVERY_S:
            before = self._slots
            if self._count(search) != before:
                self._listen("nodes", {"message": f"the nodes have changed: {self._slots} trials at once, {before} before"})
        return self._slots

    def largest(self) -> float:
        """Memory (bytes) that a trial can set aside on the largest node that has all else that it asks for."""
        return largest_on(nodes(), self._workers)

    def bounded(self, ask: Ask | None) -> Ask | None:
        """What a trial was given, as far as there is a node that has it."""
        return ask and bounded(ask, self._workers, self.largest())

    def release(self) -> None:
        """Take back what was announced: nodes that nobody needs may go."""
        if self._announced:
            self._announced = False
            request_resources(bundles=[])

    def _announce(self, search: Search) -> None:
        """Have an autoscaler bring the nodes for all trials at once now, and not one by one as trials begin to wait for them."""
        if self._address is None or search.workers.most is None or not autoscales():
            return
        most = min(search.workers.most, search.limits.trials)
        self._announced = True
        atexit.register(lambda: self.release() if ray.is_initialized() else None)  # where nothing was left to run
        request_resources(bundles=[bundle for _ in range(most) for bundle in bundles(search.workers)])

    def _count(self, search: Search) -> int:
        self._slots, self._looked = slots_on(nodes(), search.workers), self._clock()
        return self._slots

    def _await(self, search: Search) -> None:
        if not self._announced:
            if self._address is None or not autoscales():
                raise no_room(nodes(), search.workers)
            raise UserError(
                f"{no_room(nodes(), search.workers)} The cluster can bring nodes if it is told how many: write workers.most, the number of "
                "trials at once."
            )
        said = -SAY_EVERY_S
        began = self._clock()
        try:
            while not self._count(search):
                if self._clock() - began - said >= SAY_EVERY_S:
                    said = self._clock() - began
                    asked = " and ".join(f"{amount:g} {name}" for name, amount in bundles(search.workers)[0].items())
                    self._listen("nodes", {"message": f"waiting for a node with {asked}, for {said:.0f} s so far; Ctrl-C ends it"})
                self._sleep(1.0)
        except BaseException:
            self.release()
            raise


def nodes() -> list[dict[str, float]]:
    """The resources of each node that is there."""
    return [{str(name): float(amount) for name, amount in node["Resources"].items()} for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def autoscales() -> bool:
    """Whether the cluster may bring nodes that are not there. An autoscaler names the kinds of node that it has; one that only looks on
    cannot."""
    return any(kind and not kind.startswith(_OF_NO_KIND) for kind in _kinds())


def _kinds() -> list[str]:
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    said = json.loads(_internal_kv_get(_STATUS) or b"{}")
    return list((said.get("autoscaler_report") or {}).get("active_nodes") or {})
