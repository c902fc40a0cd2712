"""What an attack that looks for the smallest perturbation has found so far."""

from __future__ import annotations

import torch
from torch import Tensor


class Closest:
    """The closest success seen of every image; the image itself until there is one.

    Args:
        images: As they came, [N, C, H, W].
        order: Of the norm in which success is close: 2 or infinity.
    """

    def __init__(self, images: Tensor, order: float) -> None:
        self._origin = images
        self._order = order
        self._doubted = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self._images = images.clone()
        self.distance = images.new_full((len(images),), torch.inf)

    def doubt(self, rows: Tensor) -> None:
        """Take note of samples [n] whose search could not go on."""
        self._doubted[rows] = True

    def result(self) -> Tensor:
        """Return the images; NaN where nothing was found and the search could not go on."""
        self._images[self._doubted & self.distance.isinf()] = torch.nan
        return self._images

    def take(self, rows: Tensor, found: Tensor) -> None:
        """Keep those of the successes ``found`` [n, C, H, W] that are closer than before."""
        distance = (found - self._origin[rows]).flatten(1).norm(self._order, dim=1)
        closer = distance < self.distance[rows]
        self.distance[rows[closer]] = distance[closer]
        self._images[rows[closer]] = found[closer]
