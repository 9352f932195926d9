"""Scales of batch normalisation."""

import torch
from torch import Tensor, nn

from distprune.core.registry import criterion
from distprune.core.scoring import Probe
from distprune.errors import UserError


@criterion("slimming", paper="Liu et al. 2017, arXiv:1708.06519, section 3", of_units=True)
def slimming(probe: Probe) -> dict[str, Tensor]:
    """|gamma| of a channel's batch normalisation, the mean over those that it goes through.

    Formula:
        s(channel) = mean |gamma|  over its batch normalisations
    """
    parameters = dict(probe.model.named_parameters())
    scores = {}
    for group in probe.units.channels:
        scales = []
        for part in group.parts:
            path, _, name = part.name.rpartition(".")
            norm = probe.model.get_submodule(path)
            if part.role == "carries" and name == "weight" and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                scales.append(parameters[part.name].detach().abs()[part.index].mean(1))
        if not scales:
            raise UserError(
                f"criterion 'slimming' ranks channels by the scales of their batch normalisation, and those of '{group.name}' go through "
                f"none. Choose taylor_gates or magnitude, for paradigm slimming ssl, or a network with batch norm behind every layer."
            )
        scores[group.name] = torch.stack(scales).mean(0)
    return scores
