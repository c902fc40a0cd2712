"""Saying why a training diverged."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import TrainingDivergedError
from ccn_deploy.trainers.batches import read_images
from ccn_deploy.trainers.recipes import Recipe

CUSTOMARY = 0.1
"""The paper's learning rate: nothing higher is suggested."""


def diverged(
    recipe: Recipe,
    data: Dataset,
    epoch: int,
    index: int,
    indices: NDArray[np.int64] | None = None,
    *,
    what: str = "The loss",
) -> TrainingDivergedError:
    """Build the error for a step, with the likely cause.

    Args:
        recipe: Of the training.
        data: The training split.
        epoch: From 0.
        index: Of the step in its epoch, from 0.
        indices: The images of that step; they are fetched again and looked at.
        what: What is not a number.
    """
    steps = math.ceil(len(data) / recipe.batch_size)
    step = epoch * steps + index
    where = f"{what} is not a number at step {step + 1} (epoch {epoch + 1})"
    kept = f"the checkpoint of epoch {epoch} is untouched" if epoch else "there is no checkpoint"
    if indices is not None:
        images, indices, _ = read_images(data, indices)
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        if not finite.all():
            return TrainingDivergedError(
                f"{where}: image {indices[np.argmin(finite)]} of {data.name} ({data.split}) "
                "holds NaN or infinity.",
                f"Repair the data set and train again; {kept}.",
            )
    guards = []
    if not recipe.warmup_steps:
        guards.append("no warm-up")
    if recipe.clip_norm is None:
        guards.append("no gradient clipping")
    beside = f", with {' and '.join(guards)}" if guards else ""
    return TrainingDivergedError(
        f"{where}: the learning rate, {recipe.learning_rate_at(step, steps):.3g} there, is likely "
        f"too high{beside}.",
        f"Start anew with --learning-rate {min(recipe.learning_rate / 10, CUSTOMARY):g} "
        f"--overwrite; {kept}.",
    )
