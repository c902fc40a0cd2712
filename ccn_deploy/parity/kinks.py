"""Which images lie so near a kink that rounding alone may change their gradient, and by how much.

The gradient of a network of ReLUs and max-pools jumps where one of them decides otherwise. The
noisy forwards of :mod:`ccn_deploy.parity.rounding` decide otherwise where rounding may, so their
gradients show it, and ignore decisions on which nothing depends. ``docs/parity.md`` derives how
large the noise must be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ccn_deploy.data import Images
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.parity.comparison import scale_of
from ccn_deploy.parity.gradients import untied
from ccn_deploy.parity.rounding import ExactRun, RoundingModel, images_kept
from ccn_deploy.parity.rounding_rules import Errors
from ccn_deploy.parity.tolerances import Arithmetic, Tolerance
from ccn_deploy.runtimes.base import Array

TYPICAL_PAIRS = 2
"""Most draws of errors of the model's own size, which tell what a kink usually does."""

_KEPT = 3
"""Tensors that autograd keeps for each of the graph's, roughly."""


@dataclass(frozen=True)
class Shifts:
    """How far rounding moved each image's gradient, over the largest slope.

    Attributes:
        largest: By errors as large as the policy lets a runtime's be, ``max_units`` times those of
            the model, [n].
        typical: By errors of the model's own size, [n]; 0 for images that are not near a kink.
    """

    largest: NDArray[np.float64]
    typical: NDArray[np.float64]


def measure_shifts(
    model: GraphModule,
    images: Images,
    cotangents: Array,
    truth: Array,
    policy: Tolerance,
    *,
    pairs: int = 4,
    seed: int = 0,
    single: GraphModule | None = None,
) -> Shifts:
    """Find the images near a kink: those whose gradient rounding moves by more than is allowed.

    Args:
        model: The forward graph in float64.
        images: float32 [n, C, H, W].
        cotangents: [n, K, classes].
        truth: The exact gradients [n, K, C, H, W] for these cotangents.
        policy: Of the precision.
        pairs: Draws of errors by which kinks are looked for, each run with both signs.
        seed: Of the errors.
        single: The forward graph in float32, if the networks with errors are to be run in that; it
            is half the work.
    """
    scale = scale_of(truth) or 1.0
    largest = rounding_shifts(
        model, images, cotangents, truth, _larger(policy), pairs=pairs, seed=seed, noisy=single
    )
    if not np.isfinite(largest).all():  # too large for float32 somewhere
        return measure_shifts(model, images, cotangents, truth, policy, pairs=pairs, seed=seed)
    near = largest > policy.max_gradient * scale
    typical = np.zeros(len(images))
    if near.any():
        some = images[near], cotangents[near], truth[near]
        typical[near] = rounding_shifts(
            model,
            *some,
            policy.arithmetic,
            pairs=min(pairs, TYPICAL_PAIRS),
            seed=seed,
            noisy=single,
        )
    return Shifts(largest / scale, typical / scale)


def rounding_shifts(
    model: GraphModule,
    images: Images,
    cotangents: Array,
    truth: Array,
    arithmetic: Arithmetic,
    *,
    pairs: int,
    seed: int = 0,
    noisy: GraphModule | None = None,
) -> NDArray[np.float64]:
    """Return how far errors of an arithmetic moved any gradient of each image, [n].

    Ties are taken out as they are in the comparison.

    Args:
        model: As for :func:`measure_shifts`, and so are images, cotangents and truth.
        images: float32 [n, C, H, W].
        cotangents: [n, K, classes].
        truth: [n, K, C, H, W].
        arithmetic: What is modelled.
        pairs: Draws of errors, each run with both signs.
        seed: Of the errors.
        noisy: What errors are made in; ``model`` if not given.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = images_kept(model.graph, 2 * _KEPT)
    shifts = np.zeros(len(images))
    wanted = untied(truth, images)
    for at in range(0, len(images), kept):
        piece = slice(at, at + kept)
        x = torch.from_numpy(images[piece]).double()
        rows = torch.from_numpy(cotangents[piece]).double()
        exact, errors = ExactRun(), Errors(generator, draws=2, paired=True)
        rounding = RoundingModel(model, arithmetic, errors, noisy=noisy)
        for _ in range(pairs):
            for gradients in _noisy_pair(rounding, x, rows, exact):
                change = np.abs(untied(gradients, images[piece]) - wanted[piece])
                shifts[piece] = np.maximum(shifts[piece], change.max(axis=(1, 2)))
    return shifts


def _noisy_pair(
    rounding: RoundingModel, images: torch.Tensor, cotangents: torch.Tensor, exact: ExactRun
) -> NDArray[np.float64]:
    """Return the gradients [2, N, K, C, H, W] of the network with errors, and their opposite."""
    dtype = (rounding.noisy or rounding.model).dtype
    leaf = torch.cat([images] * 2).to(dtype).requires_grad_(True)
    with torch.enable_grad():
        logits = torch.empty(0)
        for tensor, noisy in rounding.run(images, leaf, exact=exact):
            if tensor == rounding.model.output:
                logits = noisy
        rows = torch.cat([cotangents] * 2).to(dtype).unbind(dim=1)
        found = [
            torch.autograd.grad((logits * row).sum(), leaf, retain_graph=True)[0] for row in rows
        ]
    gradients: NDArray[np.float64] = torch.stack(found, dim=1).double().numpy()
    return gradients.reshape(2, len(images), len(rows), *images.shape[1:])


def _larger(policy: Tolerance) -> Arithmetic:
    """Return the arithmetic with errors as large as the policy lets a runtime's be."""
    own, factor = policy.arithmetic, policy.max_units
    return replace(
        own,
        store=factor * own.store,
        accumulate=factor * own.accumulate,
        norm=factor * own.norm,
    )
