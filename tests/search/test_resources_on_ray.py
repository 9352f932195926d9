"""Memory, custom resources and nodes that join, on a real Ray."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from books import on_ray
from searches import reports, search
from torch import nn
from toys import BASE

from distprune.errors import UserError
from distprune.search import driver
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")


def _table(folder: RunFolder) -> list[dict[str, Any]]:
    return list(read_trials(folder.trials).to_pylist())


class Hungry(nn.Sequential):
    """Runs out of memory in a worker that has set aside less than 300 MB."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        import ray

        context = ray.get_runtime_context() if ray.is_initialized() else None
        if context and context.get_actor_id() and context.get_assigned_resources().get("memory", 0) < 3e8:
            raise MemoryError
        time.sleep(0.05)  # the node that joins is noticed before the first trial has ended
        return super().forward(inputs)  # type: ignore[no-any-return]


def hungry(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network that needs much memory."""
    return Hungry(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


@on_ray
def test_on_ray_a_trial_gets_more_memory_and_a_node_that_joins_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from distprune.search.runner import Ray

    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}")  # in workers
    node = {"num_cpus": 1, "resources": {"spot": 1}, "memory": 10**9, "object_store_memory": 10**8}
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    said, running = list[str](), list[int]()

    def listen(event: str, facts: dict[str, Any]) -> None:
        said.extend([facts["message"]] if event == "nodes" else [])
        if event == "progress":
            running.append(facts["ends"]["running"])
            if len(running) == 1:
                cluster.add_node(**node)

    value = search(
        tmp_path,
        trials=2,
        recipe={**BASE, "model": {"import": "test_resources_on_ray:hungry"}},
        space={
            "paradigm": ["at_init"],
            "sparsity": [0.9],
            "criterion": ["magnitude", "random"],
            "allocator": ["erk"],
            "regularizer": ["none"],
        },
        sampler="grid",
        scheduler="none",
        workers={"memory": "200MB", "resources": {"spot": 0.01}},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        folder = driver.start(value, engine=Ray(None, listen), listen=listen)
        with pytest.raises(UserError, match=r"workers asks for 1 CPUs, 2 spot, and the cluster has no room .* 1 CPUs, 1 spot"):
            Ray(None, listen).open(search(tmp_path, workers={"resources": {"spot": 2}}))
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = _table(folder)
    assert [(row["ended"], row["asked"], row["retries"], row["deaths"]) for row in rows] == [("finished", 1, 0, "[]")] * 2, rows
    assert said == ["the nodes have changed: 2 trials at once, 1 before"] and running[0] == 1 and max(running) == 2


@on_ray
def test_on_ray_a_search_ends_in_time_whose_trial_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes what the trial asks for. It stays with the search, which goes on with it when it is resumed."""
    import ray

    from distprune.search import runner

    monkeypatch.setattr(runner, "WAITS_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    space = {"paradigm": ["dense"], "regularizer": ["none"]}
    value = search(tmp_path, trials=1, space=space, workers={"resources": {"spot": 1}}, limits={"trials": 1, "wall": 15})
    engine = runner.Ray(None, lambda event, facts: None)
    ray.init(address="local", num_cpus=2, resources={"spot": 1}, include_dashboard=False, log_to_driver=False)
    try:
        taken = ray.util.placement_group([{"spot": 1}])
        ray.get(taken.ready())
        folder = driver.start(value, engine=engine, listen=lambda event, facts: None)
        (row,) = _table(folder)
        assert row["ended"] in ("", None, "running") and not reports(folder), row
        ray.util.remove_placement_group(taken)
        driver.resume(folder.path, limits={"wall": 600}, engine=engine, listen=lambda event, facts: None)
    finally:
        ray.shutdown()
    assert [(row["ended"], row["attempts"]) for row in _table(folder)] == [("finished", 1)]
