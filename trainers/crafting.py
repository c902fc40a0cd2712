"""Crafting images while training, and the losses that see them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.attacks.balls import LinfBall, generators_of, stacked
from ccn_deploy.models import soft_cross_entropy
from ccn_deploy.trainers.adversary import Adversary
from ccn_deploy.trainers.network import forward

NUDGE = 0.001
"""Deviation of the noise from which TRADES starts (algorithm 1): at the image itself, the
divergence has no slope."""

BALL = LinfBall()


def craft(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    adversary: Adversary,
    epsilon: float,
    seeds: NDArray[np.int64],
) -> Tensor:
    """Return perturbed images, within epsilon of the images in Linf and within [0, 1].

    The network answers in evaluation mode, and is left in training mode. So dropout does not
    blur the gradient, the running statistics of batch normalisation are those of the images
    that it learns, and what is attacked is the function that is deployed. The authors of TRADES
    do the same (https://github.com/yaodongyu/TRADES), and Pang et al. 2021
    (https://arxiv.org/abs/2010.00467) found that it gains clean accuracy at equal robustness.

    ``fgsm`` and ``pgd`` climb the cross-entropy of the label, also where the loss sees smoothed
    targets: that of those has its minimum at the smoothed prediction, and its slope leads
    a network that is surer than that back to the label.

    Args:
        network: What is trained.
        images: float [N, C, H, W] in [0, 1].
        labels: int64 [N].
        adversary: How it is done.
        epsilon: Half the width of the box now; at most that of ``adversary``. Nothing is done if 0.
        seeds: A sequence of integers an image, int64 [N, any]: its random start is its own.
    """
    if not epsilon:
        return images
    network.eval()
    found = _start(images, adversary, epsilon, seeds)
    if adversary.kind == "trades":
        with torch.no_grad():
            clean = forward(network, images)
    for _ in range(adversary.steps):
        found.requires_grad_()
        logits = forward(network, found)
        # Sums: a mean would make small slopes of sure images still smaller.
        if adversary.kind == "trades":
            height = divergence(clean, logits).sum()
        else:
            height = F.cross_entropy(logits, labels, reduction="sum")
        (slope,) = torch.autograd.grad(height, found)
        moved = found.detach() + adversary.rel_step * epsilon * BALL.direction(slope)
        found = BALL.project(images, moved, epsilon).clamp(0, 1)
    network.train()
    return found


def _start(
    images: Tensor, adversary: Adversary, epsilon: float, seeds: NDArray[np.int64]
) -> Tensor:
    if adversary.kind == "fgsm":
        return images.clone()
    shape = tuple(images.shape[1:])
    generators = generators_of(seeds, len(images))
    if adversary.kind == "pgd":
        noise = [epsilon * BALL.inside(generator, shape) for generator in generators]
    else:
        noise = [NUDGE * generator.standard_normal(shape) for generator in generators]
    # empty_like keeps the layout in memory.
    start = images + torch.empty_like(images).copy_(stacked(noise, images))
    return BALL.project(images, start, epsilon).clamp(0, 1)


def divergence(clean: Tensor, crafted: Tensor) -> Tensor:
    """Return how far the predictions of crafted images are from those of clean ones, [N].

    The Kullback-Leibler divergence KL(p(clean) || p(crafted)) of logits [N, classes].
    """
    before, after = clean.log_softmax(dim=1), crafted.log_softmax(dim=1)
    return (before.exp() * (before - after)).sum(dim=1)


def adversarial_loss(
    network: nn.Module, images: Tensor, crafted: Tensor, targets: Tensor, adversary: Adversary
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and the logits of the images that cross-entropy sees and of the crafted.

    Clean and crafted images go through the network in one batch, so that batch normalisation
    has one set of statistics for both (Kurakin et al. 2017, https://arxiv.org/abs/1611.01236,
    section 3), and processes exchange gradients once.

    Args:
        network: In training mode.
        images: float [N, C, H, W] in [0, 1].
        crafted: Of the same shape.
        targets: Distributions, float [N, classes].
        adversary: Which loss.
    """
    if adversary.kind == "pgd":
        logits = forward(network, crafted)
        return soft_cross_entropy(logits, targets), logits, logits
    clean, logits = forward(network, torch.cat([images, crafted])).chunk(2)
    loss = soft_cross_entropy(clean, targets)
    if adversary.beta is None:
        loss = (loss + soft_cross_entropy(logits, targets)) / 2
    else:
        loss = loss + adversary.beta * divergence(clean, logits).mean()
    return loss, clean, logits
