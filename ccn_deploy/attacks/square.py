"""Square Attack in Linf and L2, as Foolbox attacks: random search on scores alone.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search" (2020), https://arxiv.org/abs/1912.00049.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache

import numpy as np
import torch
from foolbox.distances import l2, linf
from foolbox.models.base import Model
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.attacks.balls import Generator, generators_of
from ccn_deploy.attacks.cw import without
from ccn_deploy.attacks.passes import scores
from ccn_deploy.attacks.untargeted import BoundedAttack

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries: where the share of pixels in a square is halved (the paper's section 3.3)."""

_TINY = 1e-12
"""Added to norms before dividing by them."""


class _SquareAttack(BoundedAttack):
    """Change a random square at a time, and keep what lowers the margin of the logits.

    The margin is the label's logit less the highest other. An image leaves as soon as its label
    changes; where the attack failed, the image of the lowest margin is returned. All that is random
    about an image is drawn from its own seed. The model need not have gradients.

    Args:
        queries: At most so many from each start, that of the start included. The paper's 5000 and
            10,000 are for numbers to publish.
        p_init: The first share of the image that a square covers.
        restarts: How often to start, for images that still hold.
        seeds: One sequence of integers per image; the image's place in the batch if None.
    """

    title = "Square Attack"

    def __init__(
        self,
        *,
        queries: int = 1000,
        p_init: float = 0.8,
        restarts: int = 1,
        seeds: NDArray[np.int64] | None = None,
    ) -> None:
        if queries < 1 or restarts < 1 or not 0 < p_init <= 1:
            raise ValueError("Square Attack needs a query, a start and a share p_init in (0, 1]")
        self.queries = queries
        self.p_init = p_init
        self.restarts = restarts
        self.seeds = seeds

    def _search(self, model: Model, origin: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        generators = generators_of(self.seeds, len(origin))
        result = origin.clone()
        active = torch.arange(len(origin), device=origin.device)
        for _ in range(self.restarts):
            if not len(active):
                break
            search = _Search(model, origin, labels, active, generators)
            active = self._descend(search, epsilon)
            result[search.everyone] = search.best
        return result

    def _descend(self, search: _Search, epsilon: float) -> Tensor:
        """Search from one start; return the places [n] of the images that hold."""
        search.propose(self._start(search, epsilon))
        for query in range(self.queries - 1):
            if not len(search.active):
                break
            share = self.p_init * shrunk(query, self.queries)
            search.propose(self._change(search, epsilon, share))
        return search.active

    @abstractmethod
    def _start(self, search: _Search, epsilon: float) -> Tensor:
        """Return the first proposals [n, C, H, W]."""

    @abstractmethod
    def _change(self, search: _Search, epsilon: float, share: float) -> Tensor:
        """Return proposals [n, C, H, W] that differ from the best in a square."""


class LinfSquareAttack(_SquareAttack):
    """In Linf: every pixel of a square by 2 epsilon, in a direction drawn for each channel.

    It starts from vertical stripes of width 1, by plus or minus epsilon.
    """

    distance = linf

    def _start(self, search: _Search, epsilon: float) -> Tensor:
        images = search.images
        channels, _, width = images.shape[1:]
        stripes = _signs(search.draw(channels * width)).view(-1, channels, 1, width)
        return search.clip(images + epsilon * stripes)

    def _change(self, search: _Search, epsilon: float, share: float) -> Tensor:
        images = search.images
        channels, height, width = images.shape[1:]
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        drawn = search.draw(2 + channels)
        window = _window(_corners(drawn[:, :2], side, height, width), side, height, width)
        change = 2 * epsilon * _signs(drawn[:, 2:])[:, :, None, None]
        moved = search.current + change * window
        return search.clip(torch.clamp(moved, images - epsilon, images + epsilon))


class L2SquareAttack(_SquareAttack):
    """In L2: a bump of two signs takes the norm of a square, that of another, and what is left.

    It starts from a grid of such bumps, five to a side.
    """

    distance = l2

    def _start(self, search: _Search, epsilon: float) -> Tensor:
        images = search.images
        channels, height, width = images.shape[1:]
        side = max(height // 5, 1)
        rows, columns = height // side, width // side
        top, left = (height - side * rows) // 2, (width - side * columns) // 2
        drawn = search.draw(rows * columns * (1 + channels)).view(len(images), rows, columns, -1)
        tiles = _bumps(side, drawn[..., 0], drawn[..., 1:])  # [n, rows, columns, C, side, side]
        grid = torch.zeros_like(images)
        grid[:, :, top : top + side * rows, left : left + side * columns] = tiles.permute(
            0, 3, 1, 4, 2, 5
        ).reshape(len(images), channels, side * rows, side * columns)
        return search.clip(images + _of_length(epsilon, grid))

    def _change(self, search: _Search, epsilon: float, share: float) -> Tensor:
        images = search.images
        channels, height, width = images.shape[1:]
        side = max(round(math.sqrt(share * height * width)), 3)
        side = min(side + (side + 1) % 2, height, width)
        drawn = search.draw(5 + channels)
        to, fro = (_corners(drawn[:, at : at + 2], side, height, width) for at in (0, 2))
        window, other = (_window(place, side, height, width) for place in (to, fro))

        delta = search.current - images
        spare = (epsilon**2 - delta.square().sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0)
        there = (delta * (window | other)).square().sum(dim=(2, 3), keepdim=True)
        norm = (there + spare / channels).sqrt()

        sample = torch.arange(len(images), device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        along = torch.arange(side, device=images.device)
        row = (to[:, :1] + along)[:, None, :, None]
        column = (to[:, 1:] + along)[:, None, None, :]
        old = delta[sample, channel, row, column]
        new = _bumps(side, drawn[:, 4], drawn[:, 5:])
        new = new + old / (_TINY + _norm(old))
        delta = delta.masked_fill(other, 0.0)
        delta[sample, channel, row, column] = new / (_TINY + _norm(new)) * norm
        return search.clip(images + _of_length(epsilon, delta))


class _Search:
    """The images of one start, and the best that was seen of each.

    Args:
        model: What is asked.
        images: The batch [N, C, H, W].
        labels: To be left, int64 [N].
        active: Places of the images that are searched, int64 [n].
        generators: One for each image of the batch.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        active: Tensor,
        generators: list[Generator],
    ) -> None:
        self._model = model
        self.everyone = active
        self.best = images[active]
        self.active = active
        self._generators = generators
        self._images = images
        self._labels = labels
        self._rows = torch.arange(len(active), device=images.device)  # of the active, in best
        self._margin = images.new_full((len(active),), torch.inf)

    @property
    def images(self) -> Tensor:
        """The images [n, C, H, W] that still hold, as they came."""
        return self._images[self.active]

    @property
    def current(self) -> Tensor:
        """The best [n, C, H, W] that was seen of them."""
        return self.best[self._rows]

    def clip(self, images: Tensor) -> Tensor:
        """Return images within the model's bounds."""
        return images.clamp(*self._model.bounds)

    def draw(self, count: int) -> Tensor:
        """Return numbers in [0, 1), [n, count], each row from its image's own generator."""
        drawn = [self._generators[at].random(count, np.float32) for at in self.active.tolist()]
        return torch.from_numpy(np.stack(drawn)).to(self._images)

    def propose(self, proposals: Tensor) -> None:
        """Keep those proposals [n, C, H, W] that are better; who is fooled leaves."""
        logits = scores(self._model, proposals, self.active)
        labels = self._labels[self.active]
        holding = logits.argmax(dim=-1) == labels
        others = without(logits, labels).amax(dim=-1)
        margin = logits.gather(1, labels[:, None])[:, 0] - others
        better = (margin < self._margin) | ~holding
        self.best[self._rows[better]] = proposals[better]
        self._margin = torch.where(better, margin, self._margin)[holding]
        self.active, self._rows = self.active[holding], self._rows[holding]


def shrunk(query: int, queries: int) -> float:
    """Return by how much squares have shrunk at a query, counted from 0, of so many."""
    scaled = int(query / queries * 10000)
    return 0.5 ** sum(scaled > bound for bound in _HALVED_AFTER)


def _signs(drawn: Tensor) -> Tensor:
    """Return -1 or 1 for numbers in [0, 1)."""
    return torch.where(drawn < 0.5, -1.0, 1.0).to(drawn)


def _corners(drawn: Tensor, side: int, height: int, width: int) -> Tensor:
    """Return the upper left corners int64 [n, 2] of squares, for numbers in [0, 1), [n, 2]."""
    room = drawn.new_tensor([height - side + 1, width - side + 1])
    return (drawn * room).long()


def _window(corners: Tensor, side: int, height: int, width: int) -> Tensor:
    """Return where squares are, bool [n, 1, height, width]."""

    def inside(first: Tensor, length: int) -> Tensor:
        at = torch.arange(length, device=first.device)
        return (at >= first) & (at < first + side)

    rows, columns = inside(corners[:, :1], height), inside(corners[:, 1:], width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _bumps(side: int, turn: Tensor, drawn: Tensor) -> Tensor:
    """Return bumps [..., C, side, side] of norm 1, turned and signed by numbers in [0, 1).

    Args:
        side: Of the square.
        turn: [...]; above a half, the halves stand side by side instead of one on the other.
        drawn: [..., C].
    """
    bump = _bump(side).to(drawn)
    turned = torch.where((turn > 0.5)[..., None, None], bump.T, bump)
    bumps: Tensor = _signs(drawn)[..., None, None] * turned[..., None, :, :]
    return bumps


@lru_cache
def _bump(side: int) -> Tensor:
    """Return the paper's figure 2 and equation 2: a hill above a valley, together of norm 1."""
    halves = [sign * _hill(rows, side) for sign, rows in ((1, side // 2), (-1, side - side // 2))]
    bump = torch.cat(halves)
    unit: Tensor = bump / bump.norm()
    return unit


def _hill(height: int, width: int) -> Tensor:
    """Return a hill [height, width] of norm 1: frames about its middle, 1 / k^2 the k-th on."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    frame = torch.maximum(rows[:, None], columns)
    steps = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -2
    hill: Tensor = steps.flip(0).cumsum(0).flip(0)[frame]
    return hill / hill.norm() if height else hill


def _norm(windows: Tensor) -> Tensor:
    return windows.square().sum(dim=(2, 3), keepdim=True).sqrt()


def _of_length(epsilon: float, delta: Tensor) -> Tensor:
    """Return perturbations [n, C, H, W] with the norm epsilon; of what is zero, zero."""
    length = delta.flatten(1).double().norm(dim=1).add(_TINY).to(delta)
    stretched: Tensor = epsilon / length.view(-1, 1, 1, 1) * delta
    return stretched
