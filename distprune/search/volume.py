"""Hypervolume: how much of the space of objectives a set of points dominates."""

from collections.abc import Mapping, Sequence

_BEYOND = 1.0  # spans between the reference and the worst: the ends of a front are worth much, as nothing is near them


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume of what lies between `reference` and at least one of the points; larger is better in every objective."""
    inside = [tuple(point) for point in points if all(value > least for value, least in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return max(point[0] for point in inside) - reference[0]
    volume, below = 0.0, reference[-1]
    for level in sorted({point[-1] for point in inside}):  # slices along the last objective
        volume += (level - below) * hypervolume([point[:-1] for point in inside if point[-1] >= level], reference[:-1])
        below = level
    return volume


def contributions(front: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """What each point of a front adds to its hypervolume, with objectives scaled to their span."""
    points = list(front.values())
    if not points:
        return {}
    least = [min(column) for column in zip(*points, strict=True)]
    spans = [max(column) - low or 1.0 for column, low in zip(zip(*points, strict=True), least, strict=True)]
    scaled = {key: [(v - low) / span for v, low, span in zip(point, least, spans, strict=True)] for key, point in front.items()}
    reference = [-_BEYOND] * len(least)
    whole = hypervolume(list(scaled.values()), reference)
    return {key: whole - hypervolume([point for other, point in scaled.items() if other != key], reference) for key in scaled}
