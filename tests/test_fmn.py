"""FMN against its algorithm written out in float64, Foolbox's in Linf, and exact distances."""

from __future__ import annotations

import math

import foolbox as fb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ccn_deploy.attacks import suite
from ccn_deploy.attacks.fmn import L2FastMinimumNorm, LinfFastMinimumNorm
from ccn_deploy.attacks.foolbox_model import NativeModel, foolbox_model, reference_model
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference
from tests.rowwise import Rowwise, images_of, model_of

SHAPE = (1, 4, 4)
NORMS = {2: (L2FastMinimumNorm, 0.5), torch.inf: (LinfFastMinimumNorm, 0.5)}


def distances(found: Tensor, images: Tensor, order: float) -> Tensor:
    return (found - images).flatten(1).norm(order, dim=1)


def digits(n: int) -> Tensor:
    dataset = load_dataset("mnist5k", "test")
    return torch.from_numpy(dataset.images(dataset.order(0)[:n]))


def algorithm(network: Rowwise, image: Tensor, label: Tensor, steps: int, order: float) -> Tensor:
    """The paper's algorithm 1 for one image; epsilon grows until something is found."""
    size = 2 if order == 2 else np.inf

    def norm(x: np.ndarray, order: float = size) -> float:
        return float(np.linalg.norm(x.ravel(), order))

    x0 = image.double().numpy()
    delta, epsilon = np.zeros_like(x0), 0.0
    best: np.ndarray | None = None
    for step in range(steps):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        alpha, gamma = 0.005 + 0.495 * cosine, 0.001 + 0.049 * cosine
        x = torch.from_numpy(x0 + delta).requires_grad_()
        logits = network.one(x)
        rival = int(logits.detach().index_fill(0, label, -torch.inf).argmax())
        loss = logits[rival] - logits[label]
        (slope,) = torch.autograd.grad(loss, x)
        g = slope.numpy()
        if loss.item() > 0:
            if best is None or norm(delta) < norm(best):
                best = delta
            epsilon = min((1 - gamma) * epsilon, norm(best))
        elif best is not None:
            epsilon *= 1 + gamma
        else:
            reach = norm(delta) - loss.item() / norm(g, 2 if size == 2 else 1)
            epsilon = max((1 + gamma) * epsilon, reach)
        epsilon = min(epsilon, norm(np.maximum(x0, 1 - x0)))
        delta = delta + alpha * g / norm(g, 2)
        if size == 2:
            delta = delta * min(1.0, epsilon / norm(delta))
        else:
            delta = np.clip(delta, -epsilon, epsilon)
        delta = np.clip(x0 + delta, 0, 1) - x0
    return torch.from_numpy(x0 if best is None else x0 + best)


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
def test_it_takes_the_steps_of_the_algorithm(order: float, steps: int) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 12)
    attack, stepsize = NORMS[order]
    found = attack(steps=steps, stepsize=stepsize).run(model_of(network), images, labels)
    expected = torch.stack(
        [algorithm(network, *pair, steps, order) for pair in zip(images, labels, strict=True)]
    )
    near = (found - expected).flatten(1).abs().amax(dim=1) < 1e-5
    assert near.sum() >= 11  # of an iterate on the boundary, rounding says on which side it is
    np.testing.assert_allclose(
        distances(found, images, order), distances(expected, images, order), rtol=1e-2
    )


def test_in_linf_it_finds_no_farther_images_than_foolboxs(sm_bundle: Bundle) -> None:
    small = Rowwise(SHAPE)
    network = load_reference(sm_bundle)
    cases = ((small, *images_of(small, SHAPE, 12), 0.3), (network, digits(16), None, 10.0))
    for module, images, given_labels, stepsize in cases:
        labels = module(images).argmax(dim=1) if given_labels is None else given_labels
        same = {"steps": 40, "gamma": 0.05}
        model = model_of(module)
        ours = LinfFastMinimumNorm(stepsize=stepsize, **same).run(model, images, labels)
        theirs = fb.attacks.LInfFMNAttack(max_stepsize=stepsize, **same).run(model, images, labels)
        assert (module(ours).argmax(dim=1) != labels).all()
        far, far_too = (distances(found, images, torch.inf).mean() for found in (ours, theirs))
        assert far <= 1.01 * far_too


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_on_a_linear_classifier_it_finds_the_exact_distance(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.uniform(0.4, 0.6, (1, 1, 4, 4))
    weights = generator.standard_normal(16)
    margin = generator.uniform(0.1, 0.4)
    layer = nn.Linear(16, 2)
    layer.weight.data = torch.from_numpy(np.stack([weights, np.zeros(16)])).float()
    layer.bias.data = torch.tensor([margin - float(weights @ x.ravel()), 0.0])
    network = nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)
    model, images = reference_model(network), torch.from_numpy(x).float()
    for order, (attack, stepsize) in NORMS.items():
        exact = margin / np.linalg.norm(weights, 2 if order == 2 else 1)
        found = attack(steps=150, stepsize=stepsize).run(model, images, torch.tensor([0]))
        assert int(network(found).argmax()) == 1
        distance = float(distances(found, images, order))
        assert exact - 1e-5 <= distance <= 1.03 * exact


def test_in_l2_it_finds_every_digit_and_nearer_than_foolboxs(sm_bundle: Bundle) -> None:
    images = digits(16)
    network = load_reference(sm_bundle)
    labels, model = network(images).argmax(dim=1), reference_model(network)
    ours = L2FastMinimumNorm(steps=40, stepsize=1.0).run(model, images, labels)
    theirs = fb.attacks.L2FMNAttack(steps=40).run(model, images, labels)
    assert (network(ours).argmax(dim=1) != labels).all()
    assert distances(ours, images, 2).mean() < 0.8 * distances(theirs, images, 2).mean()


@pytest.mark.parametrize("order", NORMS)
def test_an_image_is_attacked_the_same_in_every_batch(order: float) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 10)
    attack, stepsize = NORMS[order]
    made = attack(steps=30, stepsize=stepsize)
    together = made.run(model_of(network), images, labels)
    each = [
        made.run(model_of(network), images[at : at + 1], labels[at : at + 1]) for at in range(10)
    ]
    assert torch.equal(together, torch.cat(each))


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_logits_changes_nothing(order: float, scale: float) -> None:
    plain = Rowwise(SHAPE)
    scaled = Rowwise(SHAPE, answer=lambda logits: scale * logits)
    images, labels = images_of(plain, SHAPE, 6)
    attack, stepsize = NORMS[order]
    made = attack(steps=25, stepsize=stepsize)
    expected, found = (made.run(model_of(net), images, labels) for net in (plain, scaled))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)
    assert (plain(found).argmax(dim=1) != labels).all()


@pytest.mark.parametrize("order", NORMS)
def test_a_failure_returns_the_image_and_nothing_shown_is_nan(order: float) -> None:
    attack, stepsize = NORMS[order]
    images, _ = images_of(Rowwise(SHAPE), SHAPE, 4)
    zeros = torch.zeros(4, dtype=torch.int64)

    def run(answer: object) -> Tensor:
        network = Rowwise(SHAPE, answer=answer)  # type: ignore[arg-type]
        found: Tensor = attack(steps=12, stepsize=stepsize).run(model_of(network), images, zeros)
        return found

    first = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    assert torch.equal(run(lambda logits: 0.01 * logits + 100 * first), images)
    assert run(lambda logits: 0 * logits + first).isnan().all()  # no slope
    assert run(lambda logits: (logits * 0).sqrt() + first).isnan().all()  # NaN for a slope
    wrong = run(lambda logits: 0 * logits - first)  # fooled as it is
    assert torch.equal(wrong, images)


def test_a_step_is_a_query_each_way_but_the_last() -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 3)
    counter = QueryCounter(model_of(network), 3)
    L2FastMinimumNorm(steps=7, stepsize=1.0).run(counter, images, labels)
    assert counter.queries.forward.tolist() == [7] * 3
    assert counter.queries.backward.tolist() == [6] * 3


def test_on_a_runtime_with_gradients_of_its_own(sm_bundle: Bundle) -> None:
    images = digits(6)
    reference = load_reference(sm_bundle)
    labels = reference(images).argmax(dim=1).numpy()
    for name in ("fmn", "fmn-linf"):
        (spec,) = suite([name], settings={name: {"steps": 30}})
        with open_runtime(
            sm_bundle, "onnxruntime-cpu", "fp32", RuntimeOptions(threads=1)
        ) as runtime:
            native = foolbox_model(runtime, None, gradient="native")
            assert isinstance(native, NativeModel)
            found = perform(spec, native, images.numpy(), labels, seeds=np.arange(6)[:, None])
            assert (runtime.logits(found).argmax(axis=1) != labels).all()
        order = 2 if name == "fmn" else torch.inf
        truth = perform(
            spec, reference_model(reference), images.numpy(), labels, seeds=np.arange(6)[:, None]
        )
        here, there = (distances(torch.from_numpy(x), images, order) for x in (found, truth))
        np.testing.assert_allclose(here.numpy(), there.numpy(), rtol=0.1)


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"steps": 0}, {"stepsize": 0.0}, {"gamma": 1.0}):
        with pytest.raises(ValueError, match="FMN"):
            L2FastMinimumNorm(**{"stepsize": 1.0, **wrong})
