"""What an export shows of a network besides its weights, by task: rows with the recorded answers, and the code that reads them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distprune.core.task import Task
from distprune.core.tasks.classification import EVALUATION_BATCH, Classification
from distprune.core.tasks.inverse import Inverse
from distprune.errors import UserError

MOST_TEST_BYTES = 64 * 2**20  # of test images: larger test splits are cut, and the manifest says so
_CLOSE = 1e-4  # between two images of one network: thread counts round otherwise


@dataclass(frozen=True)
class Kind:
    """How the export of a trained network is made for its task."""

    rows: Mapping[str, Tensor]  # test.safetensors
    metrics: Mapping[str, Any]  # of the test split, for the manifest
    validation: Mapping[str, float]
    inputs: Mapping[str, Any]  # how inputs in bytes become what the network takes: mean and std of each channel
    functions: str  # of model.py, besides build()
    compare: str  # the middle of check.py: from `network` and `test` to `differ` and `line`
    same: Callable[[Mapping[str, Any], nn.Module, Mapping[str, Tensor]], bool]  # of the names in model.py, its network, and the rows


def kind_of(task: Task, model: nn.Module) -> Kind:
    """What is recorded of `model`. Raises UserError for a task that exports do not know."""
    if isinstance(task, Classification):
        return _classification(task, model)
    if isinstance(task, Inverse):
        return _inverse(task, model)
    raise UserError(f"An export needs task classification or inverse, got {type(task).__name__}. Take the masks with masks.save(path).")


def _classification(task: Classification, model: nn.Module) -> Kind:
    test = task.dataset.test
    count = min(len(test), MOST_TEST_BYTES // max(test.inputs[0].numel() * test.inputs.element_size(), 1))
    predictions = task.predict(model, "test").argmax(1).cpu()
    rows = {"inputs": test.inputs[:count], "labels": test.labels[:count], "predictions": predictions[:count]}
    device = next(model.parameters()).device.type
    mean, std = tuple(task.dataset.mean), tuple(task.dataset.std)

    def same(names: Mapping[str, Any], network: nn.Module, test: Mapping[str, Tensor]) -> bool:
        found = network(names["prepare"](test["inputs"][:EVALUATION_BATCH])).argmax(1)
        # Another device rounds otherwise, and an image on the border of two classes may fall on the other side.
        return int((found != test["predictions"][:EVALUATION_BATCH]).sum()) <= (0 if device == "cpu" else 0.01 * len(found))

    return Kind(
        rows,
        {"accuracy": (predictions == test.labels.cpu()).double().mean().item(), "images": len(test), "written": count},
        task.metrics(model, "validation"),
        {"mean": list(mean), "std": list(std)},
        "def prepare(inputs: torch.Tensor) -> torch.Tensor:\n"
        '    """Images as bytes, [n, channels, height, width], to what the network takes; floats are that already."""\n'
        "    if inputs.is_floating_point():\n"
        "        return inputs\n"
        f"    scale = 255 * torch.tensor({std}).view(1, -1, 1, 1)\n"
        f"    offset = -255 * torch.tensor({mean}).view(1, -1, 1, 1) / scale\n"
        "    return inputs.float() * (1 / scale) + offset\n",
        f"""    predictions = torch.cat([network(model.prepare(part)).argmax(1) for part in test["inputs"].split({EVALUATION_BATCH})])
differ = int((predictions != test["predictions"]).sum())
accuracy = (predictions == test["labels"]).double().mean().item()
line = f"test accuracy {{accuracy:.4f}} on {{len(predictions)}} images, {{differ}} predictions differ"
""",
        same,
    )


def _inverse(task: Inverse, model: nn.Module) -> Kind:
    network, given = copy.deepcopy(model).cpu().eval(), task.input.cpu()
    with torch.no_grad():
        image = task.image(network(given).view(task.truth.shape))
    measured = {"measured": task.measured, "held": task.held, "truth": task.truth}

    def same(names: Mapping[str, Any], network: nn.Module, test: Mapping[str, Tensor]) -> bool:
        return bool(((names["image"](network(test["inputs"])) - test["image"]).abs() <= _CLOSE * test["image"].abs().max()).all())

    made = "torch.sigmoid(outputs)" if task.bytes else "outputs"
    return Kind(
        {"inputs": given, "image": image, **measured},
        task.metrics(model, "test"),
        task.metrics(model, "validation"),
        {},
        "def image(outputs: torch.Tensor) -> torch.Tensor:\n"
        '    """The image, [1, channels, height, width], that the network makes out of its one input."""\n'
        f"    return {made}.view({tuple(task.truth.shape)})\n",
        f"""    image = model.image(network(test["inputs"]))
differ = int(((image - test["image"]).abs() > {_CLOSE} * test["image"].abs().max()).sum())
error = (image - test["truth"]).square().mean().sqrt().item()
line = f"root mean squared error {{error:.4f}} against the true image, {{differ}} pixels differ"
""",
        same,
    )
