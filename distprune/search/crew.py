"""The ranks of a trial as Ray runs them: a worker group of Ray Train, its processes joined by Ray Train's set-up of torch.

They live in the bundles that Tune has reserved for the trial, so that it never waits for its own ranks; whoever leads them ends with the
trial's worker, and they end with him. That a rank is gone is heard from Ray, not from a sum that never comes.
"""

import time
from typing import Any

import ray
from ray.train._internal.worker_group import WorkerGroup
from ray.train.torch import TorchConfig

from distprune.core.ranks import Lost
from distprune.search.together import Answer, Rank

GRACE_S = 10.0  # for the others, once one rank has failed: it may not be the first
_TIMEOUT_S = 6 * 3600  # of a sum, where rank 0 may wait for what another trial computes


class RayCrew:
    """`size` ranks with the resources of one bundle each."""

    def __init__(self, size: int, bundle: dict[str, float], device: str) -> None:
        self._size, self._bundle = size, bundle
        self._config = TorchConfig(backend="nccl" if device == "cuda" else "gloo", init_method="tcp", timeout_s=_TIMEOUT_S)
        self._group: WorkerGroup | None = None

    def all(self, method: str, *arguments: Any) -> list[Answer]:
        """What all ranks answer, in their order; where one has failed, what came until then and soon after."""
        if self._group is None:
            try:  # a rank, or its node, may die while it starts
                self._group = WorkerGroup(self._size, self._bundle, actor_cls=Rank)
                self._config.backend_cls().on_start(self._group, self._config)
            except Exception as error:
                raise Lost(f"The ranks of the trial do not start: {error}") from error
        calls = [getattr(worker.actor, method).remote(*arguments) for worker in self._group.workers]
        answers: dict[int, Answer] = {}
        waiting, until = list(calls), float("inf")
        while waiting and time.monotonic() < until:
            ready, waiting = ray.wait(waiting, timeout=1.0)
            for call in ready:
                try:
                    answers[calls.index(call)] = ray.get(call)
                except ray.exceptions.RayError as error:
                    raise Lost(f"A rank of the trial is gone: {error}") from error
                if "failed" in answers[calls.index(call)]:
                    until = min(until, time.monotonic() + GRACE_S)
        return [answers[index] for index in sorted(answers)]

    def dismiss(self) -> None:
        """Kill the ranks, which may wait for one another."""
        if self._group is not None:
            self._group.shutdown(patience_s=0)
            self._group = None
