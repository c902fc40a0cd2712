"""Transferred attacks: crafted on one network and shown to others (paper, tables 7 and 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks import AttackSpec
from ccn_deploy.errors import RuntimeUnavailableError, UsageError, named
from ccn_deploy.extras import require
from ccn_deploy.robustness.attack_job import is_legal
from ccn_deploy.robustness.attack_session import labels_of
from ccn_deploy.robustness.collect import Progress
from ccn_deploy.robustness.non_inferiority import Mask
from ccn_deploy.runtimes.base import Array, Runtime


@dataclass(frozen=True)
class TransferMatrix:
    """What became of every image, crafted on each of some networks, on each of all.

    Attributes:
        spec: The attack.
        tested_on: Names of the T networks that looked at the images, the rows of the tables.
        crafted_on: Names of the C networks that the images were crafted on, the columns.
        right: bool [T, N], whether an image is right without an attack.
        held: bool [T, C, N], whether it is right without and with one.
        legal: bool [C, N], whether crafting gave a legal image. One that is none, as where a
            network has no slope, holds nowhere: nothing was shown of it.
    """

    spec: AttackSpec
    tested_on: tuple[str, ...]
    crafted_on: tuple[str, ...]
    right: Mask
    held: Mask
    legal: Mask

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of images that hold, float64 [T, C]."""
        return np.asarray(self.held.mean(axis=2))


def transfer_matrix(
    runtimes: Mapping[str, Runtime],
    images: Array,
    labels: Array,
    spec: AttackSpec,
    *,
    crafted_on: Sequence[str] | None = None,
    seeds: Array | None = None,
    batch: int = 100,
    progress: Progress | None = None,
) -> TransferMatrix:
    """Craft images on networks with their own gradients, and test each image on all networks.

    Images are crafted to leave the true label, those that are wrong already as well: another
    network may have them right. They count as wrong where they are wrong without an attack. So the
    diagonal is the accuracy that an evaluation with native gradients has.

    Args:
        runtimes: Open ones by name, for images of one shape.
        images: float32 [N, C, H, W] in [0, 1], at least one.
        labels: int64 [N], true ones.
        spec: An attack with an epsilon and without stages, as the paper's FGSM.
        crafted_on: On which of the runtimes images are crafted; on all if None.
        seeds: int64 [N, m], the random state of each image; (0, place) if None.
        batch: Images attacked at a time.
        progress: Told how many networks of how many were crafted on.

    Raises:
        UsageError: An attack, names or shapes that do not fit; said before anything is crafted.
        RuntimeUnavailableError: One to craft on has no gradients of its own. None of another
            network are taken instead: leave it out of ``crafted_on``, and it is only tested on.
        MissingExtraError: torch or Foolbox is not installed.
        InputError: The images do not fit the runtimes.
    """
    for package in ("torch", "foolbox"):
        require(package, "train", "to craft images")
    from ccn_deploy.attacks.foolbox_model import foolbox_model
    from ccn_deploy.attacks.perform import craft

    sources = _sources(runtimes, crafted_on)
    _check(runtimes, images, labels, spec)
    if seeds is None:
        seeds = np.stack([np.zeros(len(images), np.int64), np.arange(len(images))], axis=1)
    right = np.stack([labels_of(runtime, images) == labels for runtime in runtimes.values()])
    held = np.zeros((len(runtimes), len(sources), len(images)), dtype=np.bool_)
    legal = np.zeros((len(sources), len(images)), dtype=np.bool_)
    for place, (name, source) in enumerate(sources.items()):
        model = foolbox_model(source, None, gradient="native")
        made = craft(spec, model, images, labels, seeds=seeds, batch=batch)
        legal[place] = is_legal(spec, images, made)
        for row, runtime in enumerate(runtimes.values()):
            held[row, place] = right[row] & right_under(runtime, spec, images, labels, made)
        if progress is not None:
            progress(f"{spec.title} on {name}", place + 1, len(sources))
    return TransferMatrix(spec, tuple(runtimes), tuple(sources), right, held, legal)


def right_under(
    runtime: Runtime, spec: AttackSpec, images: Array, labels: Array, adversarial: Array
) -> Mask:
    """Return which images a runtime has right after an attack, bool [N].

    An image that the attack may not return counts as wrong. Those that are wrong without an attack
    are not looked at here: take ``labels_of(runtime, images) == labels`` as well.

    Args:
        runtime: Says what it sees.
        spec: The attack.
        images: Without it, float32 [N, C, H, W].
        labels: int64 [N], true ones.
        adversarial: After it, wherever it was crafted: float32 [N, C, H, W].
    """
    found = is_legal(spec, images, adversarial)
    found[found] = labels_of(runtime, adversarial[found]) == labels[found]
    return found


def _sources(
    runtimes: Mapping[str, Runtime], crafted_on: Sequence[str] | None
) -> dict[str, Runtime]:
    """Return the runtimes to craft on, by name."""
    if not runtimes:
        raise UsageError("No network was given.", "Open at least one runtime.")
    names = runtimes if crafted_on is None else crafted_on
    sources = {name: named("network", name, runtimes) for name in names}
    for name, source in sources.items():
        if not source.differentiable:
            raise RuntimeUnavailableError(
                f"{name} ({source.spec.target}) gives no gradients of its own to craft images on.",
                "Leave it out of crafted_on, and it is only tested on; or export it again without "
                "--no-gradient.",
            )
    return sources


def _check(runtimes: Mapping[str, Runtime], images: Array, labels: Array, spec: AttackSpec) -> None:
    if spec.epsilon is None or spec.stages:
        why = "stages" if spec.stages else "no bound"
        raise UsageError(
            f"{spec.title} cannot be transferred: it has {why}.",
            "Take an attack with an epsilon, such as FGSM or PGD.",
        )
    if not len(images) or labels.shape != (len(images),):
        raise UsageError(
            f"{len(images)} images have labels of shape {list(labels.shape)}.",
            "Give at least one image, and one label for each.",
        )
    one, *others = ((name, r.spec.input_shape, r.spec.classes) for name, r in runtimes.items())
    for other in others:
        if one[1:] != other[1:]:
            raise UsageError(
                f"{one[0]} takes images {list(one[1])} for {one[2]} classes, {other[0]} "
                f"{list(other[1])} for {other[2]}.",
                "Compare networks of the same images and classes.",
            )
