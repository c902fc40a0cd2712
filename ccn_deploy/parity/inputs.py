"""The images on which a runtime and the reference are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.data import Dataset, Images
from ccn_deploy.parity.evidence import KINDS

EPSILONS = (0.02, 0.1, 0.3)
"""Linf sizes of the adversarial perturbations, taken in turn."""

PGD_STEPS = 10
NEAR_MEAN_NOISE = 1e-3
"""Half-width of the noise around the mean, where ``x - 0.5`` cancels almost everything."""

CRAFT_BATCH = 64
"""Images that adversarial ones are crafted from at once, where memory allows."""


@dataclass(frozen=True)
class Probe:
    """One kind of input.

    Attributes:
        kind: Its name in reports.
        images: float32 [m, C, H, W] in [0, 1], all different; m is 1 for a constant kind.
    """

    kind: str
    images: Images

    def take(self, n: int) -> NDArray[np.int64]:
        """Return the rows that n images of this kind are made of, repeating if there are fewer."""
        return np.arange(n) % len(self.images)


def make_inputs(
    reference: nn.Module, data: Dataset, samples: int, seed: int, *, batch: int = CRAFT_BATCH
) -> list[Probe]:
    """Return every kind of input, ``samples`` images of each.

    Args:
        reference: The float32 forward graph, on which the adversarial images are crafted.
        data: Where clean images and labels come from.
        samples: Images of each kind; fewer if the data set has fewer.
        seed: Of the selection and of the noise.
        batch: Images whose gradients are computed at once.
    """
    chosen = data.order(seed)[:samples]
    clean, labels = data.images(chosen), data.labels[chosen]
    shape = (len(chosen), *data.input_shape)
    rng = np.random.default_rng([seed, 1])
    near_mean = 0.5 + NEAR_MEAN_NOISE * rng.uniform(-1.0, 1.0, shape)
    images = (
        clean,
        craft(reference, clean, labels, batch=batch),
        rng.random(shape, dtype=np.float32),
        np.zeros((1, *data.input_shape), np.float32),
        np.ones((1, *data.input_shape), np.float32),
        near_mean.astype(np.float32),
    )
    return [Probe(kind, array) for kind, array in zip(KINDS, images, strict=True)]


def craft(
    reference: nn.Module, images: Images, labels: NDArray[np.int64], *, batch: int = CRAFT_BATCH
) -> Images:
    """Return adversarial images: one gradient step and ten in turn, at each of :data:`EPSILONS`.

    They are inputs for a comparison of arithmetic, not a measure of robustness, so a few
    signed gradient steps on the cross-entropy do.

    Args:
        reference: float32, in eval mode.
        images: float32 [N, C, H, W] in [0, 1].
        labels: int64 [N].
        batch: Images whose gradients are computed at once.
    """
    eps = torch.tensor([EPSILONS[i % len(EPSILONS)] for i in range(len(images))])
    steps = torch.tensor([1 if i % 2 == 0 else PGD_STEPS for i in range(len(images))])
    crafted = torch.from_numpy(images.copy())
    for start in range(0, len(images), batch):
        piece = slice(start, start + batch)
        crafted[piece] = _signed_steps(
            reference,
            crafted[piece],
            torch.from_numpy(labels)[piece],
            eps[piece].view(-1, 1, 1, 1),
            steps[piece].view(-1, 1, 1, 1),
        )
    array: Images = crafted.numpy()
    return array


def _signed_steps(
    reference: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, steps: Tensor
) -> Tensor:
    """Climb the loss within ``eps`` of the images; a single step is as long as ``eps``."""
    low, high = (images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0)
    size = torch.where(steps == 1, eps, 2.5 * eps / steps)
    x = images
    for step in range(int(steps.max())):
        leaf = x.clone().requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(reference(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        moved = (x + size * gradient.sign()).clamp(low, high)
        x = torch.where(step < steps, moved, x)
    return x
