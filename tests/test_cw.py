"""C&W against equations 11 and 12, closed forms, Foolbox's own, and the traps of Foolbox's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import foolbox as fb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ccn_deploy.attacks import suite
from ccn_deploy.attacks.cw import L2CarliniWagner
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import RuntimeUnavailableError
from ccn_deploy.robustness import RobustnessRequest, collect, judge
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference

ONE_THREAD = RuntimeOptions(threads=1)
SHORT = {"steps": 60, "binary_search_steps": 3, "stepsize": 0.1}


def digits(n: int) -> torch.Tensor:
    dataset = load_dataset("mnist5k", "test")
    return torch.from_numpy(dataset.images(dataset.order(0)[:n]))


def distances(found: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return (found - images).flatten(1).norm(dim=1)


def linear(weights: np.ndarray, biases: np.ndarray) -> fb.PyTorchModel:
    layer = nn.Linear(weights.shape[1], len(weights))
    layer.weight.data, layer.bias.data = map(torch.from_numpy, (weights, biases))
    return reference_model(nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False))


class Terms(nn.Module):
    """Notes what the attack looks at."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        result: torch.Tensor = self.inner(x)
        return result


def test_the_first_steps_are_adam_on_equation_11(ccn_bundle: Bundle) -> None:
    images = digits(3)
    reference = load_reference(ccn_bundle)
    watched = Terms(reference).eval()
    labels = reference(images).argmax(dim=1)
    settings = {"steps": 4, "binary_search_steps": 1, "stepsize": 0.01, "initial_const": 5.0}
    L2CarliniWagner(**settings).run(reference_model(watched), images, labels)
    *_, final = watched.seen

    second = reference(images).argsort(dim=1)[:, -2]
    w = ((2 * images - 1) * 0.999999).arctanh().requires_grad_()
    origin = (0.5 * (w.detach().tanh() + 1)).clone()
    adam = torch.optim.Adam([w], lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        x = 0.5 * (w.tanh() + 1)
        logits = reference(x)
        others = logits.clone()
        others[range(3), second] = -torch.inf
        margin = (others.max(dim=1).values - logits[range(3), second]).clamp(min=0)
        ((x - origin).square().sum() + 5.0 * margin.sum()).backward()
        adam.step()
    expected = 0.5 * (w.detach().tanh() + 1)
    np.testing.assert_allclose(final.numpy(), expected.numpy(), atol=2e-5)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=8)
def test_between_two_linear_classes_it_finds_the_projection(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.uniform(0.35, 0.65, (1, 1, 4, 4))
    normal = generator.standard_normal(16)
    normal /= np.linalg.norm(normal)
    away = generator.uniform(0.05, 0.2)
    weights = np.stack([normal, np.zeros(16)])
    biases = np.array([away - normal @ x.ravel(), 0.0])
    model = linear(weights.astype(np.float32), biases.astype(np.float32))
    images = torch.from_numpy(x).float()
    attack = L2CarliniWagner(steps=400, stepsize=0.01)
    _, found, fooled = attack(model, images, torch.tensor([0]), epsilons=None)
    assert fooled.all()
    moved = float(distances(found, images))
    assert moved >= away - 1e-5
    assert moved <= 1.02 * away
    np.testing.assert_allclose(found.numpy() - x, -away * normal.reshape(x.shape), atol=0.1 * away)


def test_any_other_label_is_a_success_on_the_way_to_the_second_class() -> None:
    # Class 1 is second at the start; on the way to it class 2 comes first, after 0.8 / 5.
    weights = np.zeros((3, 4), np.float32)
    weights[1, 0], weights[2, 0] = 0.5, 5.0
    biases = np.array([1.0, 0.4, 0.2], np.float32) - weights @ np.full(4, 0.5, np.float32)
    model = linear(weights, biases)
    images = torch.full((1, 1, 2, 2), 0.5)
    for follow in (False, True):
        found = L2CarliniWagner(steps=200, follow=follow).run(model, images, torch.tensor([0]))
        assert int(model(found).argmax()) == 2
        assert float(distances(found, images)) == pytest.approx(0.16, rel=0.02)


# Enough for every image, and too short for half of them.
@pytest.mark.parametrize(("defense", "stepsize"), [("sm", 0.1), ("ccn", 0.02)])
def test_it_finds_no_fewer_and_no_farther_images_than_foolboxs(
    defense: str, stepsize: float, copy_bundle: Callable[[str], Bundle]
) -> None:
    images = digits(10)
    reference = load_reference(copy_bundle(defense))
    labels = reference(images).argmax(dim=1)
    model = reference_model(reference)
    same = {"steps": 60, "binary_search_steps": 3, "stepsize": stepsize, "initial_const": 1.0}
    _, ours, fooled = L2CarliniWagner(**same, follow=True)(model, images, labels, epsilons=None)
    _, theirs, claimed = fb.attacks.L2CarliniWagnerAttack(**same)(
        model, images, labels, epsilons=None
    )
    black = theirs.flatten(1).amax(dim=1) == 0  # Foolbox's way to say that it found nothing
    theirs_fooled = claimed & ~black
    assert theirs_fooled.any()
    assert (fooled | ~theirs_fooled).all()
    assert (ours.flatten(1).amax(dim=1) > 0).all()
    assert torch.equal(ours[~fooled], images[~fooled])
    means = [float(distances(x, images)[theirs_fooled].mean()) for x in (ours, theirs)]
    assert means[0] <= 1.01 * means[1]  # what rounding does to a hundred steps


def test_targets_are_reached(sm_bundle: Bundle) -> None:
    images = digits(4)
    reference = load_reference(sm_bundle)
    wanted = (reference(images).argmax(dim=1) + 3) % 10
    goal = fb.criteria.TargetedMisclassification(wanted)
    _, found, fooled = L2CarliniWagner(**SHORT)(
        reference_model(reference), images, goal, epsilons=None
    )
    assert fooled.all()
    assert torch.equal(reference(found).argmax(dim=1), wanted)


def test_confidence_is_a_margin_of_the_logits(sm_bundle: Bundle) -> None:
    images = digits(4)
    reference = load_reference(sm_bundle)
    labels = reference(images).argmax(dim=1)
    attack = L2CarliniWagner(**SHORT, confidence=2.0, follow=True)
    found = attack.run(reference_model(reference), images, labels)
    logits = reference(found)
    mine = logits[range(4), labels].clone()
    logits[range(4), labels] = -torch.inf
    assert (logits.max(dim=1).values - mine > 2.0 - 1e-4).all()


# What a failure is


def unbeatable() -> fb.PyTorchModel:
    """Says 1 of everything but the darkest images, whatever the attack does within reach."""
    weights = np.zeros((2, 16), np.float32)
    weights[1] = 1e-6
    return linear(weights, np.array([0.0, 1.0], np.float32))


def test_a_failure_is_the_image_as_it_came() -> None:
    images = torch.rand((3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.ones(3, dtype=torch.int64)
    attack = L2CarliniWagner(steps=20, binary_search_steps=2)
    _, found, fooled = attack(unbeatable(), images, labels, epsilons=None)
    assert not fooled.any()
    assert torch.equal(found, images)


def test_foolbox_calls_black_images_a_success_and_this_does_not(ccn_bundle: Bundle) -> None:
    images = digits(8)
    reference = load_reference(ccn_bundle)
    labels = reference(images).argmax(dim=1)
    model = reference_model(reference)
    # Too little of everything for either to find something.
    hopeless = {"steps": 3, "binary_search_steps": 1, "stepsize": 1e-4, "initial_const": 1e-3}
    _, theirs, fooled = fb.attacks.L2CarliniWagnerAttack(**hopeless)(
        model, images, labels, epsilons=None
    )
    assert (theirs == 0).all()
    assert fooled.any(), "a black image has another label than some of the digits"
    _, ours, fooled = L2CarliniWagner(**hopeless)(model, images, labels, epsilons=None)
    assert not fooled.any()
    assert torch.equal(ours, images)


def test_it_refuses_a_model_without_gradients_where_foolbox_reports_success(
    ccn_bundle: Bundle,
) -> None:
    images = digits(4)
    with open_runtime(ccn_bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime:
        labels = torch.from_numpy(runtime.logits(images.numpy()).argmax(axis=1))

        class Blind(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(runtime.logits(x.detach().numpy()))

        arrays = images.numpy(), labels.numpy()
        blind = fb.NumPyModel(runtime.logits, bounds=(0, 1))
        with pytest.raises(RuntimeUnavailableError, match="no gradients"):
            L2CarliniWagner(**SHORT)(blind, *arrays, epsilons=None)
        detached = fb.PyTorchModel(Blind().eval(), bounds=(0, 1), device="cpu")
        with pytest.raises(RuntimeUnavailableError, match="no gradients"):
            L2CarliniWagner(**SHORT)(detached, images, labels, epsilons=None)


def test_a_failure_is_an_image_that_held(ccn_bundle: Bundle) -> None:
    dataset = load_dataset("mnist5k", "test")
    (spec,) = suite(["cw"])
    hopeless = {"steps": 2, "binary_search_steps": 1, "stepsize": 1e-4}
    request = RobustnessRequest(
        dataset=dataset,
        attacks=(replace(spec, parameters={**spec.parameters, **hopeless}),),
        samples=10,
        options=ONE_THREAD,
    )
    measurement = collect(ccn_bundle, request)
    for evidence in (measurement.pairs[0].reference, measurement.pairs[0].runtime):
        right = evidence.clean_runtime == evidence.label
        assert right.any()
        assert (evidence.status[right] == "held").all()
        assert np.isnan(evidence.rho).all()
        assert (evidence.l2 == 0).all()
        kept = evidence.adversarial(np.arange(len(evidence)))
        np.testing.assert_array_equal(kept, dataset.images(evidence.index))
    (row,) = judge(measurement).minimal
    assert row.runtime.found.value == 0
    assert row.runtime.l2_mean is None and row.runtime.rho_adv is None
    assert row.runtime.failed == 10


def test_where_there_is_no_finite_gradient_nothing_is_shown() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dark = x.flatten(1).mean(dim=1) - 0.5
            return torch.stack([10 + dark.clamp(min=0).sqrt(), dark], dim=1)  # infinite slope at 0

    images = torch.full((1, 1, 2, 2), 0.5)
    model = fb.PyTorchModel(Broken().eval(), bounds=(0, 1), device="cpu")
    found = L2CarliniWagner(**SHORT).run(model, images, torch.tensor([0]))
    assert found.isnan().all()


def test_nonsense_settings_are_refused() -> None:
    for bad in ({"steps": 0}, {"binary_search_steps": 0}, {"initial_const": 0.0}):
        with pytest.raises(ValueError, match="C&W"):
            L2CarliniWagner(**bad)


# On a runtime, and what it costs


def test_on_a_runtime_it_finds_what_it_finds_on_the_reference(ccn_bundle: Bundle) -> None:
    images = digits(6)
    reference = load_reference(ccn_bundle)
    with open_runtime(ccn_bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime:
        labels = torch.from_numpy(runtime.logits(images.numpy()).argmax(axis=1))
        native = foolbox_model(runtime, None, gradient="native")
        here = L2CarliniWagner(**SHORT).run(native, images, labels)
        assert (runtime.logits(here.numpy()).argmax(axis=1) != labels.numpy()).all()
    there = L2CarliniWagner(**SHORT).run(reference_model(reference), images, labels)
    ratio = distances(here, images) / distances(there, images)
    assert (ratio - 1).abs().median() < 0.05


def test_no_gradient_is_asked_where_the_margin_is_won(sm_bundle: Bundle) -> None:
    images = digits(8)
    reference = load_reference(sm_bundle)
    labels = reference(images).argmax(dim=1)
    counted = QueryCounter(reference_model(reference), 8)
    L2CarliniWagner(**SHORT, initial_const=100.0).run(counted, images, labels)
    assert counted.queries.backward.sum() < 0.8 * counted.queries.forward.sum()


def test_a_sample_at_rest_leaves_by_itself(sm_bundle: Bundle) -> None:
    images = digits(4)
    reference = load_reference(sm_bundle)
    labels = reference(images).argmax(dim=1)
    counted = QueryCounter(reference_model(reference), 4)
    L2CarliniWagner(steps=1000, binary_search_steps=1, stepsize=0.1).run(counted, images, labels)
    assert (counted.queries.forward < 0.7 * 1000).all()


def test_it_can_be_asked_for_by_name(sm_bundle: Bundle) -> None:
    (spec,) = suite(["cw"])
    assert (spec.label, spec.epsilon, spec.clip) == ("l2-cw", None, True)
    assert spec.parameters["steps"] == 1000 and spec.parameters["binary_search_steps"] == 6
    assert "cw" not in {s.name for s in suite()}
    quick = type(spec)(spec.name, spec.norm, None, True, {**spec.parameters, **SHORT})
    images = digits(2).numpy()
    reference = load_reference(sm_bundle)
    labels = reference(torch.from_numpy(images)).argmax(dim=1).numpy()
    found = perform(
        quick, reference_model(reference), images, labels, seeds=np.zeros((2, 1), np.int64)
    )
    assert (reference(torch.from_numpy(found)).argmax(dim=1).numpy() != labels).all()
    assert found.min() >= 0 and found.max() <= 1
