"""The balls that bounded attacks stay in, with their geometry. One attack serves both."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Generator = np.random.Generator


class Ball(Protocol):
    """A ball in one norm around each image."""

    def direction(self, gradients: Tensor) -> Tensor:
        """Return the steepest steps of size 1 along finite gradients [N, C, H, W].

        Where a gradient is zero everywhere, so is the step.
        """
        ...

    def project(self, origin: Tensor, points: Tensor, epsilon: float) -> Tensor:
        """Return the points [N, C, H, W] drawn back into the ball of radius ``epsilon``."""
        ...

    def inside(self, generator: Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return a uniform point of the unit ball."""
        ...

    def outermost(self, generator: Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return a random point on the surface of the unit ball."""
        ...


class LinfBall:
    """A box."""

    def direction(self, gradients: Tensor) -> Tensor:
        """Return signs."""
        return gradients.sign()

    def project(self, origin: Tensor, points: Tensor, epsilon: float) -> Tensor:
        """Clip every difference."""
        return origin + (points - origin).clamp(-epsilon, epsilon)

    def inside(self, generator: Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return uniform noise."""
        return generator.uniform(-1.0, 1.0, shape)

    def outermost(self, generator: Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return uniform noise, stretched until it touches a side."""
        noise = self.inside(generator, shape)
        stretched: NDArray[np.float64] = noise / np.abs(noise).max()
        return stretched


class L2Ball:
    """A ball."""

    def direction(self, gradients: Tensor) -> Tensor:
        """Return gradients divided by their norms, whatever their scale."""
        # Squares of what is far from 1 would leave float32.
        largest = as_images(gradients.flatten(1).abs().amax(dim=1))
        scaled = gradients / largest.where(largest > 0, 1.0)
        norms = _norms(scaled)
        return scaled / norms.where(norms > 0, 1.0)

    def project(self, origin: Tensor, points: Tensor, epsilon: float) -> Tensor:
        """Shorten what is longer than epsilon."""
        away = points - origin
        return origin + away * (epsilon / _norms(away).clamp(min=epsilon))

    def inside(self, generator: Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return a point as far from the middle as a uniform one is."""
        radius = generator.uniform() ** (1 / np.prod(shape))
        return radius * self.outermost(generator, shape)

    def outermost(self, generator: Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return a uniform direction."""
        noise = generator.standard_normal(shape)
        direction: NDArray[np.float64] = noise / np.sqrt(np.square(noise).sum())
        return direction


def generators_of(seeds: NDArray[np.int64] | None, images: int) -> list[Generator]:
    """Return the random state of each image.

    Args:
        seeds: One sequence of integers per image; the image's place in the batch if None.
        images: How many.
    """
    chosen = np.arange(images) if seeds is None else seeds
    return [np.random.default_rng(seed) for seed in chosen]


def stacked(noise: list[NDArray[np.float64]], like: Tensor) -> Tensor:
    """Return the noise of images as one tensor [n, C, H, W] of the kind of ``like``."""
    if not noise:
        return like.new_empty((0, *like.shape[1:]))
    return torch.from_numpy(np.stack(noise)).to(like)


def _norms(points: Tensor) -> Tensor:
    return as_images(points.flatten(1).norm(dim=1))


def as_images(values: Tensor) -> Tensor:
    """Return one value an image [n] so that it goes with images [n, C, H, W]."""
    return values.view(-1, 1, 1, 1)
