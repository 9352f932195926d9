"""Every classifier of torchvision."""

from torch import nn

from distprune.core.registry import model
from distprune.errors import UserError, unknown


@model("torchvision", values_only=("pretrained",))
def torchvision_model(shape: tuple[int, int, int], classes: int, *, arch: str, pretrained: str = "") -> nn.Module:
    """The torchvision classifier `arch`, with the weights called `pretrained` ('DEFAULT', 'IMAGENET1K_V1') or fresh ones."""
    from torchvision import models

    known = models.list_models(module=models)
    if arch not in known:
        raise unknown("torchvision arch", arch, known)
    if shape[0] != 3:
        raise UserError(
            f"torchvision models need images of 3 channels, got {shape[0]}. Take lenet5, resnet_cifar or vgg_cifar for such data."
        )
    if not pretrained:
        size = {"image_size": shape[1]} if arch.startswith("vit_") else {}  # its position embeddings are for one size
        return _without_auxiliary(models.get_model(arch, weights=None, num_classes=classes, **size))
    weights = models.get_model_weights(arch).__members__
    if pretrained not in weights:
        raise unknown(f"pretrained weights of {arch}:", pretrained, weights)
    try:
        net = models.get_model(arch, weights=weights[pretrained])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The weights {arch} {pretrained} could not be downloaded ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Try again on a machine with network, or leave pretrained out."
        ) from error
    _fit_head(net, arch, classes, len(weights[pretrained].meta["categories"]))
    return _without_auxiliary(net)


def _without_auxiliary(net: nn.Module) -> nn.Module:
    """Drop the auxiliary heads of GoogLeNet and Inception: they turn the output of training mode into a tuple."""
    if getattr(net, "aux_logits", False):
        net.aux_logits = False  # type: ignore[assignment]
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(net, name):
                setattr(net, name, None)
    return net


def _fit_head(net: nn.Module, arch: str, classes: int, trained: int) -> None:
    """Put a fresh linear layer in place of the last one if its `trained` classes are not `classes`."""
    if classes == trained:
        return
    linear = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].out_features != trained:
        raise UserError(
            f"pretrained {arch} has no linear head to replace, it keeps its {trained} classes, got {classes}. Leave pretrained out."
        )
    name, head = linear[-1]
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, nn.Linear(head.in_features, classes))
