"""Transferred attacks against linear networks in NumPy, autograd, and the evaluation itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ccn_deploy.attacks import suite
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import RuntimeUnavailableError, UsageError
from ccn_deploy.robustness import RobustnessRequest, collect
from ccn_deploy.robustness.transfer import right_under, transfer_matrix
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.base import Closing, Runtime, RuntimeSpec
from ccn_deploy.runtimes.torch_runtime import load_reference

ONE_THREAD = RuntimeOptions(threads=1)
EPSILON = 0.2
(FGSM,) = suite(["fgsm"], [EPSILON])


class Linear(Closing):
    """A linear network of three classes on images of 2 x 3, with or without true slopes."""

    def __init__(self, seed: int, *, differentiable: bool = True, slope: float = 1.0) -> None:
        draw = np.random.default_rng(seed)
        self.weights = draw.standard_normal((3, 6)).astype(np.float32)
        self.slope, self._differentiable = np.float32(slope), differentiable

    @property
    def spec(self) -> RuntimeSpec:
        return RuntimeSpec("linear", "fp32", (1, 2, 3), 3, 256, "cpu", {}, True)

    @property
    def differentiable(self) -> bool:
        return self._differentiable

    def logits(self, images: np.ndarray) -> np.ndarray:
        centred = images.reshape(-1, 6) - np.float32(0.5)
        return np.asarray(centred @ self.weights.T)

    def vjp(self, images: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.slope * (cotangents @ self.weights)
        return self.logits(images), found.reshape(*cotangents.shape[:2], 1, 2, 3)

    def close(self) -> None:
        """Hold nothing."""


def labelled(n: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Return images and the labels of a network of which those below are noisy copies."""
    images = np.random.default_rng(9).random((n, 1, 2, 3), dtype=np.float32)
    return images, Linear(0).logits(images).argmax(axis=1)


def networks(**more: Linear) -> dict[str, Linear]:
    near, far = Linear(0), Linear(1)
    near.weights += 0.3 * far.weights
    return {"near": near, "far": far, **more}


def by_hand(network: Linear, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return FGSM images of the cross-entropy, in float64."""
    w = network.weights.astype(np.float64)
    z = (images.reshape(len(images), -1).astype(np.float64) - 0.5) @ w.T
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    p[np.arange(len(p)), labels] -= 1
    moved = images.reshape(len(images), -1) + EPSILON * np.sign(p @ w)
    return np.clip(moved, 0, 1).reshape(images.shape).astype(np.float32)


def test_every_pair_is_what_the_equations_say() -> None:
    images, labels = labelled()
    known = networks()
    matrix = transfer_matrix(known, images, labels, FGSM)
    assert matrix.tested_on == matrix.crafted_on == ("near", "far")
    assert matrix.spec is FGSM and matrix.legal.all()
    regained = 0
    for row, tested in enumerate(known.values()):
        before = tested.logits(images).argmax(axis=1) == labels
        np.testing.assert_array_equal(matrix.right[row], before)
        for column, crafted in enumerate(known.values()):
            made = by_hand(crafted, images, labels)
            after = tested.logits(made).argmax(axis=1) == labels
            regained += int((after & ~before).sum())
            np.testing.assert_array_equal(matrix.held[row, column], before & after)
            assert matrix.accuracy[row, column] == (before & after).mean()
    assert regained > 0  # wrong before, right after: they count as wrong
    assert not (matrix.held & ~matrix.right[:, None]).any()


def test_batches_and_a_progress_change_nothing() -> None:
    images, labels = labelled()
    told: list[tuple[str, float, float]] = []
    whole = transfer_matrix(networks(), images, labels, FGSM, batch=1000)
    pieces = transfer_matrix(
        networks(), images, labels, FGSM, batch=7,
        progress=lambda what, done, total: told.append((what, done, total)),
    )  # fmt: skip
    np.testing.assert_array_equal(whole.held, pieces.held)
    assert told == [("FGSM on near", 1, 2), ("FGSM on far", 2, 2)]


def test_random_starts_are_those_of_the_seeds() -> None:
    images, labels = labelled(120)
    (pgd,) = suite(["pgd"], [0.05], settings={"pgd": {"steps": 1}})
    state = np.stack([np.full(120, 3), np.arange(120)], axis=1)
    same, again, other = (
        transfer_matrix(networks(), images, labels, pgd, seeds=seeds, batch=batch).held
        for seeds, batch in ((state, 120), (state, 50), (state + 9, 120))
    )
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()


def test_what_has_no_slope_shows_nothing_on_any_network() -> None:
    images, labels = labelled()
    matrix = transfer_matrix(networks(flat=Linear(0, slope=0.0)), images, labels, FGSM)
    flat = matrix.crafted_on.index("flat")
    assert not matrix.legal[flat].any() and matrix.legal[:flat].all()
    assert not matrix.held[:, flat].any() and matrix.right[flat].all()


def test_a_network_without_gradients_is_refused_by_name_and_may_be_tested_on() -> None:
    images, labels = labelled()
    known = networks(rounded=Linear(2, differentiable=False))
    with pytest.raises(RuntimeUnavailableError, match=r"rounded \(linear-fp32\) gives no gradient"):
        transfer_matrix(known, images, labels, FGSM)
    matrix = transfer_matrix(known, images, labels, FGSM, crafted_on=["far"])
    assert matrix.held.shape == (3, 1, 250) and matrix.crafted_on == ("far",)
    made = by_hand(known["far"], images, labels)
    after = known["rounded"].logits(made).argmax(axis=1) == labels
    np.testing.assert_array_equal(matrix.held[2, 0], matrix.right[2] & after)


def test_an_image_that_the_attack_may_not_return_is_wrong() -> None:
    images, labels = labelled(4)
    made = images.copy()
    made[0, 0, 0, 0] = np.nan
    made[1] += 1.0
    made[2, 0, 0, 0] += EPSILON + 0.01 if made[2, 0, 0, 0] < 0.5 else -EPSILON - 0.01
    found = right_under(Linear(0), FGSM, images, labels, made)
    assert found.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spec": suite(["deepfool"])[0]}, "DeepFool cannot be transferred: it has no bound"),
        ({"spec": suite(["audit"], [0.1])[0]}, "Audit cannot be transferred: it has stages"),
        ({"labels": np.zeros(3, np.int64)}, "250 images have labels of shape"),
        ({"images": labelled()[0][:0], "labels": labelled()[1][:0]}, "at least one image"),
        ({"runtimes": {}}, "No network was given"),
        ({"crafted_on": ["nera"]}, "nera"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str) -> None:
    images, labels = labelled()
    arguments = {"runtimes": networks(), "images": images, "labels": labels, "spec": FGSM}
    with pytest.raises(UsageError, match=said):
        transfer_matrix(**{**arguments, **change})  # type: ignore[arg-type]


class Larger(Linear):
    @property
    def spec(self) -> RuntimeSpec:
        return replace(super().spec, classes=4)


def test_networks_of_other_classes_are_refused() -> None:
    images, labels = labelled()
    with pytest.raises(UsageError, match=r"near takes images \[1, 2, 3\] for 3 classes, more"):
        transfer_matrix(networks(more=Larger(3)), images, labels, FGSM)


# On deployed networks


@pytest.fixture
def deployed(sm_bundle: Bundle, ccn_bundle: Bundle) -> Iterator[dict[str, Runtime]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(open_runtime(bundle, "onnxruntime-cpu", "fp32", ONE_THREAD))
            for name, bundle in (("sm", sm_bundle), ("ccn", ccn_bundle))
        }


def test_the_diagonal_is_the_white_box_evaluation_and_the_rest_is_autograd(
    deployed: dict[str, Runtime], sm_bundle: Bundle, ccn_bundle: Bundle
) -> None:
    dataset = load_dataset("mnist5k", "test")
    chosen = dataset.order(0)[:100]
    images, labels = dataset.images(chosen), dataset.labels[chosen]
    matrix = transfer_matrix(deployed, images, labels, FGSM)
    bundles = (sm_bundle, ccn_bundle)
    for place, bundle in enumerate(bundles):
        request = RobustnessRequest(dataset, attacks=(FGSM,), samples=100, options=ONE_THREAD)
        measured = collect(bundle, request)
        assert measured.gradient == "native"
        evidence = measured.pairs[0].runtime
        np.testing.assert_array_equal(evidence.index, chosen)
        np.testing.assert_array_equal(matrix.held[place, place], evidence.status == "held")
        np.testing.assert_array_equal(matrix.right[place], evidence.status != "already-wrong")
    for column, bundle in enumerate(bundles):
        x = torch.from_numpy(images).requires_grad_(True)
        loss = F.cross_entropy(load_reference(bundle)(x), torch.from_numpy(labels), reduction="sum")
        (slope,) = torch.autograd.grad(loss, x)
        made = np.clip(images + np.float32(EPSILON) * slope.sign().numpy(), 0, 1)
        for row, runtime in enumerate(deployed.values()):
            right = (runtime.logits(made).argmax(axis=1) == labels) & matrix.right[row]
            assert (matrix.held[row, column] != right).sum() <= 2  # slopes of rounding
    assert (matrix.accuracy.diagonal() < matrix.accuracy[[0, 1], [1, 0]]).all()


def test_a_bundle_without_a_gradient_graph_is_not_crafted_on(sm_bundle: Bundle) -> None:
    files = tuple(file for file in sm_bundle.manifest.files if file.role != "gradient")
    bare = replace(sm_bundle, manifest=msgspec.structs.replace(sm_bundle.manifest, files=files))
    dataset = load_dataset("mnist5k", "test")
    images, labels = dataset.images(np.arange(4)), dataset.labels[:4]
    with (
        open_runtime(bare, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime,
        pytest.raises(RuntimeUnavailableError, match="bare"),
    ):
        transfer_matrix({"bare": runtime}, images, labels, FGSM)
