"""HopSkipJump in L2, as a Foolbox attack: a walk along the decision boundary on labels alone.

Chen, Jordan and Wainwright, "HopSkipJumpAttack: a query-efficient decision-based attack" (2020),
https://arxiv.org/abs/1904.02144.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from foolbox.distances import l2
from foolbox.models.base import Model
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.attacks.balls import Generator, generators_of
from ccn_deploy.attacks.passes import scores
from ccn_deploy.attacks.untargeted import MinimumNormAttack

_FIRST_RADIUS = 0.1
"""About the first point of the boundary, where directions are tried: the paper's."""

_TINY = 1e-12
"""Added to norms before dividing by them."""


class HopSkipJump(MinimumNormAttack):
    r"""Estimate the boundary's normal from labels around it, step along, come back; again.

    It takes the steps of Foolbox's ``HopSkipJumpAttack`` from the same start, and differs in this.
    Every image is attacked by itself, with random numbers of its own seed, so that nothing depends
    on the batch. No image gets more than its queries, and the closest image that was ever answered
    with another label is the result; an image for which there was none is returned as it came. The
    model need not have gradients.
    All directions of an estimate are asked for at once. And the walk starts from flat images and
    the image's inverse as well as from noise, which a network may always give the same label.

    Args:
        queries: At most so many for an image.
        gradient_queries: For the first estimate; the k-th takes :math:`\sqrt k` times as many.
        seeds: One sequence of integers per image; the image's place in the batch if None.
    """

    title = "HopSkipJump here"
    distance = l2

    def __init__(
        self,
        *,
        queries: int = 2000,
        gradient_queries: int = 100,
        seeds: NDArray[np.int64] | None = None,
    ) -> None:
        if queries < 1 or gradient_queries < 1:
            raise ValueError("HopSkipJump needs a query, and one for an estimate")
        self.queries = queries
        self.gradient_queries = gradient_queries
        self.seeds = seeds

    def _search(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        generators = generators_of(self.seeds, len(images))
        result = images.clone()
        for place, generator in enumerate(generators):
            oracle = _Oracle(model, images[place], int(labels[place]), place, self.queries)
            try:
                self._walk(oracle, generator)
            except _SpentError:
                result[place] = oracle.closest
        return result

    def _walk(self, oracle: _Oracle, generator: Generator) -> None:
        """Walk until no query is left.

        Raises:
            _SpentError: Always, in the end.
        """
        x = _start(oracle, generator)
        step = 0
        while True:
            distance = float((x - oracle.image).norm())
            radius = distance / x.numel() if step else _FIRST_RADIUS
            count = int(self.gradient_queries * math.sqrt(step + 1))
            normal = _normal(oracle, x, radius, min(count, max(oracle.left, 1)), generator)
            length = distance / math.sqrt(step + 1)
            while not oracle.gone(oracle.clip(x + length * normal)):
                length /= 2
            x = oracle.boundary(oracle.clip(x + length * normal))
            step += 1


class _SpentError(Exception):
    """No query is left."""


class _Oracle:
    """Says whether an image's label is gone, and keeps the closest where it is.

    Args:
        model: What is asked.
        image: [C, H, W].
        label: To be left.
        place: Of the image in the batch.
        queries: How often it may be asked.

    Attributes:
        closest: The closest image without the label; the image itself until there is one.
        left: Queries that are left.
    """

    def __init__(self, model: Model, image: Tensor, label: int, place: int, queries: int) -> None:
        self.image = image
        self.closest = image
        self.left = queries
        self._model = model
        self._label = label
        self._place = place
        self._distance = math.inf

    def clip(self, images: Tensor) -> Tensor:
        """Return images within the model's bounds."""
        return images.clamp(*self._model.bounds)

    def ask(self, images: Tensor) -> Tensor:
        """Return where the label is gone, bool [n], for images [n, C, H, W].

        Raises:
            _SpentError: There are fewer queries left.
        """
        if len(images) > self.left:
            raise _SpentError
        self.left -= len(images)
        places = torch.full((len(images),), self._place, device=images.device)
        gone = scores(self._model, images, places).argmax(dim=-1) != self._label
        distances = (images - self.image).flatten(1).norm(dim=1).masked_fill(~gone, torch.inf)
        distance, nearest = distances.min(dim=0)
        if float(distance) < self._distance:
            self._distance, self.closest = float(distance), images[nearest]
        return gone

    def gone(self, image: Tensor) -> bool:
        """Return whether the label is gone from one image [C, H, W]."""
        return bool(self.ask(image[None])[0])

    def boundary(self, x: Tensor) -> Tensor:
        """Return where the boundary is passed on the way to ``x``, which is without the label."""
        low, high = 0.0, 1.0
        while high - low > x.numel() ** -1.5:
            middle = (low + high) / 2
            if self.gone((1 - middle) * self.image + middle * x):
                high = middle
            else:
                low = middle
        return (1 - high) * self.image + high * x


def _start(oracle: _Oracle, generator: Generator) -> Tensor:
    """Return an image without the label."""

    def noise() -> Tensor:
        drawn = generator.uniform(low, high, oracle.image.shape)
        return torch.from_numpy(drawn).to(oracle.image)

    low, high = oracle.clip(oracle.image.new_tensor([-torch.inf, torch.inf])).tolist()
    flat = (torch.full_like(oracle.image, value) for value in (low, high))
    starts = [x for x in (low + high - oracle.image, *flat, noise()) if oracle.gone(x)]
    while not starts:
        starts = [x for x in (noise(),) if oracle.gone(x)]
    beyond = [oracle.boundary(x) for x in starts]
    return min(beyond, key=lambda x: float((x - oracle.image).norm()))


def _normal(oracle: _Oracle, x: Tensor, radius: float, count: int, generator: Generator) -> Tensor:
    """Return an estimate of the direction [C, H, W], of norm 1, in which the label goes.

    Args:
        oracle: Is asked.
        x: A point on the boundary.
        radius: Of the sphere about it on which labels are asked for.
        count: For so many.
        generator: Draws them.
    """
    noise = torch.from_numpy(generator.standard_normal((count, *x.shape), np.float32)).to(x)
    directions = noise / (noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + _TINY)
    around = oracle.clip(x + radius * directions)
    votes = torch.where(oracle.ask(around), 1.0, -1.0)
    if votes.mean().abs() < 1:  # else there is nothing but this to go by
        votes = votes - votes.mean()
    normal = (votes.view(-1, 1, 1, 1) * (around - x)).mean(dim=0)
    unit: Tensor = normal / (normal.norm() + _TINY)
    return unit
