"""Five families of networks as a user would hand them in, plain and wholly compact.

Factories for ``tests/own_classifiers.py:NAME``. Weights are random and the same in every process;
statistics and the head are set so that images get logits as different as those of a trained
network: what is degenerate can be neither attacked nor verified.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ccn_deploy.layers import CompactConv2d, CompactLinear, compactify
from tests.own_networks import ResNet
from tests.vjp_networks import VisionTransformer, Windows, convnext, mobilenet

SHAPE = (3, 32, 32)
CLASSES = 7

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet(CLASSES, width=8, blocks=(2, 2, 2, 2)),
    "mobilenetv3": mobilenet,
    "convnext": convnext,
    "vit": lambda: _attentive(VisionTransformer()),
    "swin": Windows,
}

SEEDS = {"convnext": 7}
"""Of the weights; others amplify the rounding of fp16 on constant images beyond what is allowed."""

SPREAD = 3.0
"""Standard deviation of a logit over images."""


def pictures(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return smooth coloured waves with a little noise, [count, 3, 32, 32] in [0, 1]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:32j, 0:1:32j]
    shape = (count, 3, 1, 1)
    down, across, phase = (random.uniform(-12, 12, shape) for _ in range(3))
    waves = 0.5 + 0.4 * np.sin(down * y + across * x + phase)
    waves *= random.uniform(0.3, 1.0, shape)
    return np.clip(waves + random.normal(0, 0.03, waves.shape), 0, 1).astype(np.float32)


@torch.no_grad()
def _attentive(made: VisionTransformer) -> nn.Module:
    """Let the class token see the images: random patches are small beside its place."""
    made.positions *= 0.1
    made.token *= 0.1
    made.patches.weight *= 4
    for block in made.blocks:
        block.attention.qkv.weight *= 2
    return made


@torch.no_grad()
def network(family: str, *, compact: bool) -> nn.Module:
    """Return a network of a family in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS.get(family, 5))
        made = FAMILIES[family]()
        if compact:
            compactify(made)
        for part in made.modules():
            if isinstance(part, CompactConv2d | CompactLinear):
                part.alpha.uniform_(0.8, 2.0)
    images = torch.from_numpy(pictures(64, seed=9))
    _settle(made, images)
    made.eval()
    _spread(made, images)
    return made


def _settle(made: nn.Module, images: Tensor) -> None:
    """Give batch normalisation the statistics of images, as training would."""
    norms = [part for part in made.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the average of all batches
    if norms:
        made.train()
        for part in made.modules():
            if isinstance(part, nn.Dropout):
                part.eval()
        made(images)


def _spread(made: nn.Module, images: Tensor) -> None:
    """Scale and shift the last layer so that every class is the answer now and then."""
    head = [part for part in made.modules() if isinstance(part, nn.Linear | CompactLinear)][-1]
    head.bias.zero_()
    logits = made(images)
    gain = SPREAD / logits.std(dim=0)
    head.weight *= gain[:, None]
    head.bias -= logits.mean(dim=0) * gain


resnet18_plain = partial(network, "resnet18", compact=False)
resnet18_compact = partial(network, "resnet18", compact=True)
mobilenetv3_plain = partial(network, "mobilenetv3", compact=False)
mobilenetv3_compact = partial(network, "mobilenetv3", compact=True)
convnext_plain = partial(network, "convnext", compact=False)
convnext_compact = partial(network, "convnext", compact=True)
vit_plain = partial(network, "vit", compact=False)
vit_compact = partial(network, "vit", compact=True)
swin_plain = partial(network, "swin", compact=False)
swin_compact = partial(network, "swin", compact=True)
