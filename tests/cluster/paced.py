"""A network whose training takes its time on a node of the test, and which stops there when it is told to: sent along with a job."""

import os
import socket
import time
from pathlib import Path

import torch
from torch import nn

from distprune.core.models.mlp import mlp


class Paced(nn.Sequential):
    """Leaves a byte in `steps` at each step of training; from step `last` on it waits while there is a file `hold`.

    Both are in the folder that has the node's name. Where there is none it is a network as any other.
    """

    at: Path
    last: int
    done = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and self.at.is_dir():
            self.done += 1
            time.sleep(0.03)
            with (self.at / "steps").open("ab") as steps:
                steps.write(b".")
            while self.done >= self.last and (self.at / "hold").exists():
                (self.at / "held").write_text(f"{os.getpid()} {time.time()}")
                time.sleep(0.05)
        return super().forward(inputs)


def net(shape: tuple[int, int, int], classes: int, *, folder: str, last: int) -> nn.Module:
    """Two layers."""
    network = Paced(mlp(shape, classes, hidden=(16,)))
    network.at, network.last = Path(folder) / socket.gethostname(), last
    return network
