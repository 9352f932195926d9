"""Machines that a cluster has, by the resources that Ray counts on them."""

GB = 10**9
HEAD, SMALL, BIG = (
    {"CPU": cpus, "GPU": gpus, "memory": size * GB} for cpus, gpus, size in ((0.0, 0.0, 64.0), (3.0, 1.0, 10.0), (9.0, 0.0, 20.0))
)
