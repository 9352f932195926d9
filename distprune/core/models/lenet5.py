"""LeNet-5 as the pruning literature uses it."""

from collections import OrderedDict

from torch import nn

from distprune.core.registry import model


@model("lenet5", paper="LeCun et al. 1998, Gradient-based learning applied to document recognition; the sizes of Caffe's example")
def lenet5(shape: tuple[int, int, int], classes: int, *, width: float = 1.0, batch_norm: bool = False) -> nn.Module:
    """Two 5x5 convolutions with max-pooling and two linear layers, 20-50-500 times `width` (430,500 weights on 28x28x1).

    Caffe has a ReLU after the first linear layer only; here one follows each hidden layer, as in most pruning code, and with `batch_norm`
    a batch normalization before it.
    """
    if not width > 0:
        raise ValueError(f"lenet5.width must be above 0, got {width}. For half of the units write 0.5.")
    padding = 2 if min(shape[1:]) < 16 else 0  # without it a 5x5 kernel runs out of pixels after the first pooling
    sides = [((side + 2 * padding - 4) // 2 + 2 * padding - 4) // 2 for side in shape[1:]]
    if min(sides) < 1:
        raise ValueError(f"lenet5 needs images of at least 4x4, got {shape[1]}x{shape[2]}. For smaller ones take mlp.")
    first, second, third = (max(1, round(units * width)) for units in (20, 50, 500))
    layers = OrderedDict(
        conv1=nn.Conv2d(shape[0], first, 5, padding=padding),
        bn1=nn.BatchNorm2d(first),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, 5, padding=padding),
        bn2=nn.BatchNorm2d(second),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * sides[0] * sides[1], third),
        bn3=nn.BatchNorm1d(third),
        relu3=nn.ReLU(),
        fc2=nn.Linear(third, classes),
    )
    kept = [(name, layer) for name, layer in layers.items() if batch_norm or not name.startswith("bn")]
    return nn.Sequential(OrderedDict(kept))
