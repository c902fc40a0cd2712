"""What tests of training share: a network of one's own, and stopping a training on the way."""

from __future__ import annotations

from collections.abc import Callable

from ccn_deploy.trainers import Event

BLOCK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(4 * 10 * 10, classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.drop(x.view(len(x), -1)))
"""
"""A file with a factory of a network with batch normalisation and dropout, for 1x12x12 images."""


class InterruptError(Exception):
    """What stops a training."""


def interrupt_after(count: int) -> Callable[[Event], None]:
    """Watch until ``count`` events have come, then stop the training as Ctrl-C would."""
    events: list[Event] = []

    def watch(event: Event) -> None:
        events.append(event)
        if len(events) == count:
            raise InterruptError

    return watch
