"""What an attack asks for, image by image, against runtimes that count for themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from ccn_deploy.attacks import ATTACKS, AttackSpec, suite
from ccn_deploy.attacks.foolbox_model import NativeModel, reference_model
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.robustness import RobustnessRequest, collect
from ccn_deploy.runtimes import RuntimeOptions

Array = NDArray[np.float32]
SINGLE = [name for name, kind in ATTACKS.items() if not kind.stages]
QUICK = {
    **{name: {"steps": 7} for name in SINGLE if name.startswith("pgd")},
    **{name: {"steps": 9} for name in SINGLE if name.startswith("apgd")},
    "deepfool": {"steps": 6},
    "deepfool-fast": {"steps": 6},
    "cw": {"steps": 45, "binary_search_steps": 3},
}


class Line:
    """A linear classifier that notes about whom it is asked.

    The last pixel says so: it has no weight, so that no attack has a reason to change it.
    """

    differentiable = True

    def __init__(self, images: Array, weights: Array, biases: Array) -> None:
        self.images, self.weights, self.biases = images, weights, biases
        self.forward = np.zeros(len(images), int)
        self.backward = np.zeros(len(images), int)

    def logits(self, images: Array) -> Array:
        np.add.at(self.forward, self.who(images), 1)
        return self.answer(images)

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        np.add.at(self.backward, self.who(images), cotangents.shape[1])
        shape = (*cotangents.shape[:2], *images.shape[1:])
        return self.answer(images), (cotangents @ self.weights).reshape(shape)

    def answer(self, images: Array) -> Array:
        return images.reshape(len(images), -1) @ self.weights.T + self.biases

    def who(self, images: Array) -> NDArray[np.int64]:
        names = self.images[:, 0, 0, -1]
        return np.abs(images[:, 0, 0, -1, None] - names).argmin(axis=1)


def line(seed: int, n: int = 6, classes: int = 4) -> tuple[Line, NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    images = generator.uniform(0.3, 0.7, (n, 1, 1, 5)).astype(np.float32)
    images[:, 0, 0, -1] = np.linspace(0.1, 0.9, n)
    weights = generator.standard_normal((classes, 5)).astype(np.float32)
    weights[:, -1] = 0
    runtime = Line(images, weights, (0.2 * generator.standard_normal(classes)).astype(np.float32))
    return runtime, runtime.answer(images).argmax(axis=1)


def counted(
    runtime: Line, labels: NDArray[np.int64], spec: AttackSpec
) -> tuple[Array, QueryCounter]:
    model = QueryCounter(NativeModel(runtime), len(labels))  # type: ignore[arg-type]
    n = np.arange(len(labels))[:, None]
    return perform(spec, model, runtime.images, labels, seeds=n), model


def quick(name: str, epsilon: float = 0.05, **more: float) -> AttackSpec:
    spec = suite([name], [epsilon], l2_epsilons=[epsilon])[0]
    parameters = {**spec.parameters, **QUICK.get(name, {}), **more}
    return AttackSpec(spec.name, spec.norm, spec.epsilon, spec.clip, parameters)


@pytest.mark.parametrize("name", SINGLE)
@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=6)
def test_every_query_is_counted_for_the_image_it_is_about(name: str, seed: int) -> None:
    runtime, labels = line(seed)
    _, model = counted(runtime, labels, quick(name))
    np.testing.assert_array_equal(model.queries.forward, runtime.forward)
    np.testing.assert_array_equal(model.queries.backward, runtime.backward)
    assert (runtime.forward > 0).all()


def test_one_step_is_one_query_each_way() -> None:
    runtime, labels = line(0)
    _, model = counted(runtime, labels, quick("fgsm"))
    assert model.queries.forward.tolist() == [1] * 6
    assert model.queries.backward.tolist() == [1] * 6


def test_forty_steps_are_forty_where_the_image_holds_and_fewer_where_it_does_not() -> None:
    runtime, labels = line(0)
    wrong = labels.copy()
    wrong[2] = (labels[2] + 1) % 4  # misclassified before the first step
    _, model = counted(runtime, wrong, quick("pgd", 1e-6, steps=40))
    expected = [40, 40, 0, 40, 40, 40]
    assert model.queries.backward.tolist() == expected
    assert model.queries.forward.tolist() == [40, 40, 1, 40, 40, 40]


def test_every_candidate_is_a_query_back() -> None:
    runtime, labels = line(0)
    for candidates in (2, 3, 4):
        spec = quick("deepfool", candidates=candidates, steps=1)
        _, model = counted(runtime, labels, spec)
        assert model.queries.forward.tolist() == [1] * 6
        assert model.queries.backward.tolist() == [candidates - 1] * 6


def test_a_restart_asks_again_of_those_that_hold() -> None:
    runtime, labels = line(0)
    _, model = counted(runtime, labels, quick("pgd", 1e-6, steps=3, restarts=2))
    assert model.queries.backward.tolist() == [6] * 6
    assert model.queries.forward.tolist() == [7] * 6  # between them one more: who holds?


def test_counting_changes_nothing() -> None:
    for name in SINGLE:
        runtime, labels = line(3)
        found, _ = counted(runtime, labels, quick(name))
        plain = NativeModel(runtime)  # type: ignore[arg-type]
        again = perform(
            quick(name), plain, runtime.images, labels, seeds=np.arange(len(labels))[:, None]
        )
        np.testing.assert_array_equal(found, again)


def test_on_a_torch_network_they_are_its_own_passes() -> None:
    class Counting(nn.Module):
        forwards = backwards = 0

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.forwards += len(x)
            total = self.scale * x.flatten(1).sum(1)
            logits = torch.stack([total, 2 - total], dim=1)

            def note(gradient: torch.Tensor) -> None:
                self.backwards += int((gradient != 0).any(dim=1).sum())

            if logits.requires_grad:
                logits.register_hook(note)
            return logits

    network = Counting().eval()
    model = QueryCounter(reference_model(network), 3)
    images = np.full((3, 1, 2, 2), 0.6, np.float32)
    perform(
        quick("pgd", 0.01, steps=5),
        model,
        images,
        np.zeros(3, np.int64),
        seeds=np.eye(3, dtype=int),
    )
    assert (network.forwards, network.backwards) == (15, 15)
    assert model.queries.forward.tolist() == model.queries.backward.tolist() == [5, 5, 5]


def test_evidence_has_the_queries_of_every_image(ccn_bundle: Bundle) -> None:
    pgd = quick("pgd", 0.15, steps=4)
    request = RobustnessRequest(
        dataset=load_dataset("mnist5k", "test"),
        attacks=(quick("fgsm"), pgd),
        samples=40,
        options=RuntimeOptions(threads=1),
        batch=16,
    )
    one, many = collect(ccn_bundle, request).pairs
    for evidence in (one.reference, one.runtime):
        attacked = (evidence.status != "already-wrong").astype(int)
        assert 0 < attacked.sum() < 40
        np.testing.assert_array_equal(evidence.forward, attacked)
        np.testing.assert_array_equal(evidence.backward, attacked)
    for evidence in (many.reference, many.runtime):
        held, fooled = evidence.status == "held", evidence.status == "fooled"
        assert (evidence.forward[held] == 4).all() and (evidence.backward[held] == 4).all()
        # Seen to be fooled at the next step's forward pass, if there is a next step.
        early = fooled & (evidence.backward < 4)
        assert (evidence.forward[early] == evidence.backward[early] + 1).all()
        assert (evidence.forward[fooled & ~early] == 4).all()
