"""Measuring :class:`~ccn_deploy.robustness.diagnostics.Diagnostics` on a target."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from foolbox.models.pytorch import PyTorchModel
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.attacks.passes import Pass, QueryCounter, forward, slope
from ccn_deploy.attacks.perform import perform
from ccn_deploy.attacks.source import Gradient
from ccn_deploy.attacks.spec import ATTACKS, AttackSpec
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import DATASETS, Dataset, load_dataset
from ccn_deploy.errors import CcnDeployError
from ccn_deploy.robustness.agreement import Agreement, compare_gradients, slopes
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession
from ccn_deploy.robustness.diagnostics import (
    DataFacts,
    Diagnostics,
    Held,
    Native,
    Planted,
    Slopes,
)
from ccn_deploy.runtimes.base import Array, Runtime
from ccn_deploy.storage import sha256
from ccn_deploy.targets import Target

SAMPLES = 64
"""Images whose slopes are looked at, at most; a quarter of them, and of those below, where an image
has more than :data:`LARGE` values."""

ATTACKED = 32
"""Images that are attacked, at most."""

PLANTED = 16
"""Images for which something is planted, at most."""

LARGE = 10_000
"""Values of an image from which a gradient takes a tenth of a second and more."""

QUERIES = 300
"""Of Square: enough to fool a fifth of the images of a network whose slopes are waves on pixels."""

WITNESSES = 24
"""Points inside the ball, and as many on its surface, that a planted boundary parts."""

READOUTS = 200
"""Directions among the logits that are tried for one that parts them."""

DEPTH = 0.9
"""Where the boundary lies, from the outermost of the points inside to the corner beyond it.

Near the corner: half way, PGD along slopes with random signs still found every one.
"""

REPEATS = 4
"""Times that the same images are asked for again."""

LARGEST = 1e30
"""Stands for larger and for infinite ratios, which JSON has no number for."""

Mask = NDArray[np.bool_]


def diagnose(
    session: AttackSession,
    target: Target,
    gradient: Gradient,
    dataset: Dataset,
    indices: NDArray[np.int64],
    *,
    epsilon: float,
    seed: int,
) -> Diagnostics:
    """Look at a target on the first images of an evaluation.

    Args:
        session: Has the runtimes.
        target: What is looked at.
        gradient: Where gradients of the attack come from.
        dataset: Has the images.
        indices: int64 [N] in the data set: all that are attacked.
        epsilon: Of the attacks (Linf).
        seed: Of the attacks, and of what is planted.

    Raises:
        RuntimeUnavailableError: The runtime cannot be had, or not with these gradients.
    """
    runtime, reference = session.runtime(target), session.runtime(REFERENCE)
    model = session.model(target, True, gradient)
    part = 4 if math.prod(dataset.input_shape) > LARGE else 1
    few = indices[: SAMPLES // part]
    images, labels = dataset.images(few), dataset.labels[few]
    logits = runtime.logits(images)
    whole = np.isfinite(logits).all(axis=1)
    seen = _seen(model, images[whole], labels[whole])

    chosen = np.flatnonzero(whole & (logits.argmax(axis=1) == labels))[: ATTACKED // part]
    start, truth = images[chosen], labels[chosen]
    seeds = np.stack([np.full(len(chosen), seed), few[chosen]], axis=1)

    def ends(
        of: PyTorchModel,
        strength: float = epsilon,
        name: str = "pgd",
        rows: Mask | slice = slice(None),
        **changed: int | bool,
    ) -> Array:
        spec = AttackSpec(name, "linf", strength, True, {**ATTACKS[name].parameters, **changed})
        return perform(spec, of, start[rows], truth[rows], seeds=seeds[rows])

    def held(points: Array) -> tuple[bool, ...]:
        return tuple(_holds(runtime, points, truth).tolist())

    usual = ends(model)
    left = _holds(runtime, usual, truth)
    by_scores = usual.copy()
    by_scores[left] = ends(model, name="square", rows=left, queries=QUERIES)
    steps = int(ATTACKS["pgd"].parameters["steps"])
    transferred = None if target == REFERENCE else ends(session.model(REFERENCE, True, "native"))
    native = None
    if target != REFERENCE and runtime.differentiable:
        assert transferred is not None
        crafted = np.where(np.isfinite(transferred), transferred, start)
        native = Native(
            agreement=compare_gradients(session, target, images, labels),
            crafted=Agreement.between(
                *(slopes(one, crafted, truth) for one in (runtime, reference))
            )
            if len(truth)
            else None,
            norm_ratio=_norm_ratio(runtime, reference, images, labels),
        )
    finite = _finite(usual)
    return Diagnostics(
        epsilon=epsilon,
        clean=Slopes.of(seen, _away(model, images[whole], labels[whole])),
        attacked=Slopes.of(
            _seen(model, usual[finite], truth[finite]), _away(model, usual[finite], truth[finite])
        ),
        native=native,
        saturated=_saturated(logits[whole]),
        gap_median=_gap(logits[whole]),
        repeats=_repeats(runtime, model, images, labels),
        batches=_batches(runtime, images),
        background=_background(images[whole], seen),
        held=Held(
            few_steps=held(ends(model, steps=max(steps // 4, 1))),
            usual=tuple(left.tolist()),
            half=held(ends(model, epsilon / 2)),
            everywhere=held(ends(model, 1.0, random_start=False)),
            margin=held(ends(model, name="pgd-margin")),
            scores=held(by_scores),
            transferred=() if transferred is None else held(transferred),
        ),
        planted=planted(
            runtime, model, start[: PLANTED // part], seeds[: PLANTED // part], epsilon
        ),
        data=_data_facts(session.bundle, dataset, indices),
    )


def planted(
    runtime: Runtime, model: PyTorchModel, images: Array, seeds: Array, epsilon: float
) -> Planted:
    r"""Plant an adversarial image inside the ball of each image, and let PGD look for it.

    Of points at half of epsilon and less around an image and of corners of its ball, one readout
    :math:`w` of the logits has a corner on one side and all other points, the image among them, on
    the other. The network :math:`[0, w \cdot f(x) - b]`, :math:`b` between the two, has an
    adversarial image then, whatever :math:`f` is; an attack along true slopes finds it (the
    binarization test of Zimmermann et al., section 4).

    Args:
        runtime: Says what the logits are.
        model: What PGD takes gradients from.
        images: float32 [N, C, H, W] in [0, 1].
        seeds: int64 [N, m]; the random state of each image.
        epsilon: Half-width of the ball (Linf).
    """
    readouts, biases, rows = [], [], []
    for row, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        rng = np.random.default_rng([*seed.tolist(), 1])
        shape = (WITNESSES, *image.shape)
        inner = rng.uniform(-epsilon / 2, epsilon / 2, shape)
        corners = epsilon * rng.choice([-1.0, 1.0], shape)
        points = np.concatenate([np.zeros((1, *image.shape)), inner, corners]) + image
        logits = runtime.logits(points.clip(0, 1).astype(np.float32)).astype(np.float64)
        logits -= logits[0]
        scale = np.abs(logits).max()
        if not (np.isfinite(scale) and scale > 0):
            continue
        tried = rng.standard_normal((READOUTS, logits.shape[1])) / scale
        values = logits @ tried.T
        inside, outside = values[: WITNESSES + 1].max(axis=0), values[WITNESSES + 1 :].max(axis=0)
        spread = values[: WITNESSES + 1].std(axis=0)
        gap = outside - inside
        best = int(np.argmax(gap / (spread + 1e-12)))
        if gap[best] > 0:
            readout = tried[best] / gap[best]
            here = readout @ runtime.logits(image[None])[0].astype(np.float64)
            readouts.append(readout)
            biases.append(here + inside[best] / gap[best] + DEPTH)
            rows.append(row)
    if not rows:
        return Planted(0, 0)
    network = _Planted(model, np.stack(readouts), np.array(biases))
    spec = AttackSpec("pgd", "linf", epsilon, True, ATTACKS["pgd"].parameters)
    labels = np.zeros(len(rows), dtype=np.int64)
    found = perform(spec, network, images[rows], labels, seeds=seeds[rows])
    finite = _finite(found)
    logits = runtime.logits(found[finite]).astype(np.float64)
    beyond = (np.stack(readouts)[finite] * logits).sum(axis=1) > np.array(biases)[finite]
    return Planted(len(rows), int(beyond.sum()))


class _Planted(QueryCounter):
    """A model of two classes: none, and where an image's readout exceeds its threshold.

    It is a counter because that is what an attack tells whose iterates it asks for.

    Args:
        model: Has the logits.
        readouts: float64 [N, classes].
        biases: float64 [N].
    """

    def __init__(self, model: PyTorchModel, readouts: Array, biases: Array) -> None:
        super().__init__(model, len(biases))
        self.readouts = torch.from_numpy(readouts)
        self.biases = torch.from_numpy(biases)

    def counted_pass(
        self, images: Tensor, places: Tensor | None, labels: Tensor | None = None
    ) -> Pass:
        """Begin a pass; whose images they are decides the readout."""
        places = torch.arange(len(images)) if places is None else places.cpu()
        inner = forward(self._model, images)
        return _PlantedPass(inner, self.readouts[places], self.biases[places])


class _PlantedPass:
    def __init__(self, inner: Pass, readouts: Tensor, biases: Tensor) -> None:
        self._inner, self._readouts, self._biases = inner, readouts, biases

    @property
    def logits(self) -> Tensor:
        logits = self._inner.logits
        beyond = (self._readouts.to(logits.device) * logits.double()).sum(dim=1)
        beyond = beyond - self._biases.to(logits.device)
        return torch.stack([torch.zeros_like(beyond), beyond], dim=1).float()

    def gradients(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        own = self._readouts.to(cotangents.device)[rows]
        asked = cotangents[:, :, 1:].double() * own[:, None]
        return self._inner.gradients(rows, asked.to(cotangents.dtype))

    def loss_gradient(self, rows: Tensor, labels: Tensor) -> Tensor:
        return self.gradients(rows, slope(self.logits[rows], labels)[:, None])[:, 0]


def _seen(model: PyTorchModel, images: Array, labels: Array) -> Array:
    """Return the gradients [N, C, H, W] of the cross-entropy as an attack is given them."""
    if not len(images):
        return images
    x, y = torch.from_numpy(images).to(model.device), torch.from_numpy(labels).to(model.device)
    rows = torch.arange(len(x), device=x.device)
    found: Array = forward(model, x, labels=y).loss_gradient(rows, y).cpu().numpy()
    return found


def _away(model: PyTorchModel, images: Array, labels: Array) -> Array:
    """Return the slopes [N, C, H, W] from the label to the other classes.

    These weigh as their softmax without the label: see
    :func:`ccn_deploy.robustness.agreement.slopes`.
    """
    if not len(images):
        return images
    x, y = torch.from_numpy(images).to(model.device), torch.from_numpy(labels).to(model.device)
    rows = torch.arange(len(x), device=x.device)
    here = forward(model, x)
    logits = here.logits.clone()
    logits[rows, y] = -torch.inf
    cotangents = logits.softmax(dim=1)
    cotangents[rows, y] = -1.0
    found: Array = here.gradients(rows, cotangents[:, None])[:, 0].cpu().numpy()
    return found


def _finite(points: Array) -> Mask:
    """Return which of some images are finite."""
    return np.asarray(np.isfinite(points).all(axis=(1, 2, 3)))


def _holds(runtime: Runtime, points: Array, labels: Array) -> Mask:
    """Whether images keep their labels; one that is not finite showed nothing, and so holds."""
    finite = _finite(points)
    found = np.ones(len(points), dtype=np.bool_)
    found[finite] = runtime.logits(points[finite]).argmax(axis=1) == labels[finite]
    return found


def _norm_ratio(runtime: Runtime, reference: Runtime, images: Array, labels: Array) -> float:
    """Return the median norm of the runtime's gradients over that of the reference's; 0 if none."""
    ours, theirs = (
        np.linalg.norm(slopes(one, images, labels).reshape(len(images), -1), axis=1)
        for one in (runtime, reference)
    )
    some = np.isfinite(ours + theirs) & (theirs > 0)
    return min(float(np.median(ours[some] / theirs[some])), LARGEST) if some.any() else 0.0


def _saturated(logits: Array) -> float:
    """Return the share of rows whose softmax is one and zeros in float32."""
    if not len(logits):
        return 0.0
    away = (logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    with np.errstate(under="ignore"):
        told = np.exp(away) >= np.finfo(np.float32).tiny
    return float((told.sum(axis=1) == 1).mean())


def _gap(logits: Array) -> float:
    """Return the median of the largest logit less the second; 0 if there is no second."""
    if not len(logits) or logits.shape[1] < 2:
        return 0.0
    ranked = np.sort(logits.astype(np.float64), axis=1)
    return float(np.median(ranked[:, -1] - ranked[:, -2]))


def _repeats(runtime: Runtime, model: PyTorchModel, images: Array, labels: Array) -> float:
    """Return by how much logits and gradients of the same batch differ, relative to their size."""
    some, chosen = images[:PLANTED], labels[:PLANTED]
    logits = [runtime.logits(some) for _ in range(REPEATS)]
    gradients = [_seen(model, some, chosen) for _ in range(2)]
    return max(*(_apart(logits[0], one) for one in logits[1:]), _apart(*gradients))


def _batches(runtime: Runtime, images: Array) -> float:
    """Return by how much logits differ between batches of other sizes and order."""
    some = images[:PLANTED]
    whole = runtime.logits(some)

    def others() -> Iterator[Array]:
        yield runtime.logits(np.ascontiguousarray(some[::-1]))[::-1]
        for size in (1, 3):
            yield np.concatenate(
                [runtime.logits(some[at : at + size]) for at in range(0, len(some), size)]
            )

    return max(_apart(whole, one) for one in others())


def _apart(a: Array, b: Array) -> float:
    """Return the largest difference over the median range of a row.

    :data:`LARGEST` stands for answers of which one is finite and the other is not.
    """
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    a, b = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (a, b))
    largest = np.abs(a - b).max()
    size = np.median(np.ptp(a, axis=1))
    return float(min(largest / size, LARGEST)) if np.isfinite(largest) and size > 0 else LARGEST


def _background(images: Array, gradients: Array) -> float:
    """Return the share of the gradients (L1) that lies on pixels equal in all images."""
    if len(images) < 2:
        return 0.0
    size = np.nan_to_num(np.abs(gradients.astype(np.float64)), posinf=0.0)
    constant = (images == images[0]).all(axis=0)
    total = size.sum()
    return float(size[:, constant].sum() / total) if total > 0 else 0.0


def _data_facts(bundle: Bundle, dataset: Dataset, indices: NDArray[np.int64]) -> DataFacts:
    training = bundle.card.training
    seen = _digests(dataset, indices)
    recorded = training.get("test_accuracy")
    return DataFacts(
        n=len(seen),
        distinct=len(set(seen)),
        trained_on=_trained_on(bundle, dataset, seen),
        recorded=recorded if isinstance(recorded, float) and 0 <= recorded <= 1 else None,
    )


def _trained_on(bundle: Bundle, dataset: Dataset, seen: list[str]) -> int | None:
    """Return how many of the images are among those of the training, if that can be told."""
    training = bundle.card.training
    if dataset.digest == training.get("train_digest"):
        return len(seen)
    if dataset.digest == training.get("test_digest"):
        return 0
    entry = DATASETS.get(str(training.get("dataset", "")).lower())
    if entry is None or entry.folders:
        return None
    try:
        trained = load_dataset(entry.name, "train")
    except CcnDeployError:  # it is not on this machine
        return None
    known = set(_digests(trained, np.arange(len(trained))))
    return sum(digest in known for digest in seen)


def _digests(dataset: Dataset, indices: NDArray[np.int64]) -> list[str]:
    """Return the SHA-256 of every image."""
    return [
        sha256(image.tobytes())
        for at in range(0, len(indices), SAMPLES)
        for image in dataset.images(indices[at : at + SAMPLES])
    ]
