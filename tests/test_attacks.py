"""Attacks against independent truth: equations by hand, Foolbox's own, closed forms."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import foolbox as fb
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ccn_deploy.attacks import AttackSpec, parse_epsilons, settings_of, suite
from ccn_deploy.attacks.deepfool import L2DeepFool
from ccn_deploy.attacks.fgsm import LinfFGSM
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.passes import QueryCounter, forward
from ccn_deploy.attacks.perform import perform
from ccn_deploy.attacks.pgd import LinfPGD
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import RuntimeUnavailableError, UsageError
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference
from tests.networks import random_network

ONE_THREAD = RuntimeOptions(threads=1)


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    dataset = load_dataset("mnist5k", "test")
    chosen = dataset.order(0)[:n]
    return dataset.images(chosen), dataset.labels[chosen]


def seeds(n: int) -> np.ndarray:
    return np.stack([np.zeros(n, np.int64), np.arange(n)], axis=1)


@pytest.fixture(params=["sm", "ccn"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(f"{request.param}_bundle")


# What the user asks for


def test_default_suite_runs_pgd_beside_fgsm_and_deepfool_in_and_out_of_the_box() -> None:
    labels = [spec.label for spec in suite(epsilons=[0.3, 0.1])]
    assert labels == [
        "linf-0.1-fgsm",
        "linf-0.3-fgsm",
        "linf-0.1-pgd",
        "linf-0.3-pgd",
        "l2-deepfool",
        "l2-deepfool-unclipped",
    ]


def test_specs_with_different_settings_have_different_documents() -> None:
    (weak,) = suite(["pgd"], [0.1])
    strong = AttackSpec("pgd", "linf", 0.1, True, {**weak.parameters, "steps": 100})
    assert weak.document() != strong.document()


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True))
@settings(deadline=None, max_examples=30)
def test_epsilons_are_read_as_written(hundredths: list[int]) -> None:
    values = [n / 100 for n in hundredths]
    assert parse_epsilons(",".join(map(str, values))) == tuple(values)
    assert parse_epsilons(" , ".join(f"{n}/100" for n in hundredths)) == tuple(values)


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("0.1,two", "'two'"),
        ("0.1,,0.2", "''"),
        ("", "''"),
        ("0.1,-0.2", "'-0.2'"),
        ("0", "'0'"),
        ("1.01", "'1.01'"),
        ("nan", "'nan'"),
        ("inf", "'inf'"),
        ("1/0", "'1/0'"),
        ("0.1,1e-1", "'1e-1'"),
    ],
)
def test_bad_epsilons_are_named(text: str, item: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_epsilons(text)
    assert item in raised.value.what


def test_unknown_attack_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="deepfool"):
        suite(["deepfol"], [0.1])


def test_l2_epsilons_are_any_number_above_0_and_go_to_the_attacks_in_l2() -> None:
    assert parse_epsilons("0.5, 12", "l2") == (0.5, 12.0)
    with pytest.raises(UsageError, match="--epsilons-l2: 'inf'"):
        parse_epsilons("inf", "l2")
    specs = suite(["fgsm", "audit-l2"], [0.1], l2_epsilons=[2.0, 0.5])
    assert [spec.label for spec in specs] == ["linf-0.1-fgsm", "l2-0.5-audit-l2", "l2-2-audit-l2"]


def test_an_audit_is_its_stages_and_its_document_has_them() -> None:
    (spec,) = suite(["audit"], [0.2])
    assert {stage.name for stage in spec.stages} >= {"square", "hopskipjump", "transfer"}
    assert spec.stages[0].name == "apgd" and spec.stages[-1].name == "transfer"
    assert all(stage.epsilon in (0.2, None) and not stage.stages for stage in spec.stages)
    parts = {stage.name: stage.part for stage in spec.stages}
    assert parts["apgd"] is None and parts["square"] == 100 and parts["hopskipjump"] == 20
    stages = spec.document()["stages"]
    assert [stage["name"] for stage in stages] == [stage.name for stage in spec.stages]
    assert [stage["part"] for stage in stages] == [stage.part for stage in spec.stages]


def test_options_reach_the_attacks_that_take_them() -> None:
    names = ["fgsm", "PGD"]
    settings = settings_of(names, steps=7, step_size=0.125, restarts=3)
    (_, pgd) = suite(names, [0.1], settings=settings)
    chosen = {"steps": 7, "rel_stepsize": 0.125, "decay": False, "restarts": 3}
    assert pgd.parameters == {"random_start": True, **chosen}
    with pytest.raises(UsageError, match="--restarts: none of the attacks takes it"):
        settings_of(["fgsm", "audit"], restarts=2)
    with pytest.raises(UsageError, match="--step-size"):
        settings_of(["pgd"], step_size=0.0)
    with pytest.raises(UsageError, match="--steps"):
        settings_of(["pgd"], steps=0)
    with pytest.raises(UsageError, match="FGSM has no setting 'steps'"):
        suite(["fgsm"], [0.1], settings={"fgsm": {"steps": 2}})


def test_naming_attacks_loads_no_heavy_library() -> None:
    code = "import sys, ccn_deploy.attacks; print({'torch', 'foolbox', 'scipy'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# FGSM


def test_fgsm_is_equation_7(bundle: Bundle) -> None:
    images, labels = digits(16)
    (spec,) = suite(["fgsm"], [0.2])
    found = perform(spec, reference_model(load_reference(bundle)), images, labels, seeds=seeds(16))

    exact = load_reference(bundle, torch.float64)
    x = torch.from_numpy(images).double().requires_grad_()
    picked = torch.log_softmax(exact(x), dim=1)[range(16), torch.from_numpy(labels)]
    (gradient,) = torch.autograd.grad(-picked.sum(), x)
    expected = (x.detach() + 0.2 * gradient.sign()).clamp(0, 1).numpy()

    # Float32 cannot tell the sign of a gradient that is zero but for rounding.
    size = gradient.abs().flatten(1)
    clear = (size > 1e-5 * size.amax(1, keepdim=True)).reshape(images.shape).numpy()
    assert clear.mean() > 0.5
    np.testing.assert_allclose(found[clear], expected[clear], atol=1e-6)
    assert np.abs(found - images).max() <= 0.2 + 1e-6


# PGD


def test_pgd_takes_foolbox_steps_and_loses_no_image_again(bundle: Bundle) -> None:
    images, labels = map(torch.from_numpy, digits(24))
    model = reference_model(load_reference(bundle))
    settings = {"steps": 10, "rel_stepsize": 0.1, "random_start": False}
    _, ours, fooled = LinfPGD(**settings)(model, images, labels, epsilons=0.2)
    _, theirs, fooled_too = fb.attacks.LinfPGD(**settings)(model, images, labels, epsilons=0.2)
    assert (fooled | ~fooled_too).all()
    held = ~fooled
    assert held.any()
    np.testing.assert_allclose(ours[held].numpy(), theirs[held].numpy(), atol=1e-6)


def test_pgd_stays_in_the_box_and_within_epsilon(ccn_bundle: Bundle) -> None:
    images, labels = digits(8)
    spec = AttackSpec("pgd", "linf", 0.3, True, {"steps": 5, "rel_stepsize": 0.5, "restarts": 2})
    found = perform(
        spec, reference_model(load_reference(ccn_bundle)), images, labels, seeds=seeds(8)
    )
    assert found.min() >= 0 and found.max() <= 1
    assert np.abs(found - images).max() <= 0.3 + 1e-6


def test_a_random_start_belongs_to_the_image(ccn_bundle: Bundle) -> None:
    images, labels = digits(6)
    model = reference_model(load_reference(ccn_bundle))

    def start(chosen: list[int]) -> np.ndarray:
        spec = AttackSpec("pgd", "linf", 0.1, True, {"steps": 0, "random_start": True})
        return perform(spec, model, images[chosen], labels[chosen], seeds=seeds(6)[chosen])

    everything = start(list(range(6)))
    torch.manual_seed(1)
    np.testing.assert_array_equal(start([4, 1]), everything[[4, 1]])
    assert np.abs(everything[0] - images[0]).max() > 0.05
    other = everything - images
    assert not np.array_equal(other[0] > 0, other[1] > 0)


def test_a_restart_keeps_what_an_earlier_start_fooled(sm_bundle: Bundle) -> None:
    images, labels = map(torch.from_numpy, digits(32))
    model = reference_model(load_reference(sm_bundle))
    settings = {"steps": 1, "rel_stepsize": 0.1, "seeds": seeds(32)}
    _, _, once = LinfPGD(**settings)(model, images, labels, epsilons=0.4)
    _, _, often = LinfPGD(**settings, restarts=8)(model, images, labels, epsilons=0.4)
    assert (often | ~once).all()
    assert often.sum() > once.sum()


# DeepFool


def test_deepfool_finds_the_images_that_foolbox_finds(bundle: Bundle) -> None:
    images = torch.from_numpy(digits(16)[0])
    reference = load_reference(bundle)
    model, labels = reference_model(reference), reference(images).argmax(dim=1)
    _, ours, fooled = L2DeepFool()(model, images, labels, epsilons=None)
    _, theirs, fooled_too = fb.attacks.L2DeepFoolAttack()(model, images, labels, epsilons=None)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)
    assert torch.equal(fooled, fooled_too)
    assert fooled.all()


@pytest.mark.parametrize(("steps", "candidates", "overshoot"), [(2, 10, 0.02), (8, 3, 0.5)])
def test_deepfool_options_mean_what_they_mean_in_foolbox(
    ccn_bundle: Bundle, steps: int, candidates: int, overshoot: float
) -> None:
    images, labels = map(torch.from_numpy, digits(8))
    model = reference_model(load_reference(ccn_bundle))
    settings = {"steps": steps, "candidates": candidates, "overshoot": overshoot}
    _, ours, _ = L2DeepFool(**settings)(model, images, labels, epsilons=None)
    _, theirs, _ = fb.attacks.L2DeepFoolAttack(**settings)(model, images, labels, epsilons=None)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 6))
@settings(deadline=None, max_examples=20)
def test_unclipped_deepfool_on_a_linear_classifier_is_the_projection(
    seed: int, classes: int
) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((classes, 12))
    x = generator.random((1, 1, 3, 4))
    margins = weights @ x.ravel()
    first = int(margins.argmax())
    others = [k for k in range(classes) if k != first]
    rows = weights[others] - weights[first]
    norms = np.linalg.norm(rows, axis=1)
    distances = (margins[first] - margins[others]) / norms
    nearest = int(distances.argmin())
    step = (distances[nearest] + 1e-4) * rows[nearest] / norms[nearest]

    layer = nn.Linear(12, classes, bias=False)
    layer.weight.data = torch.from_numpy(weights).float()
    network = nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)
    images = torch.from_numpy(x).float()
    attack = L2DeepFool(clip=False, steps=1)
    _, found, _ = attack(reference_model(network), images, torch.tensor([first]), epsilons=None)
    np.testing.assert_allclose(found.numpy(), x + 1.02 * step.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("slack", [np.inf, 2.0])
def test_deepfool_does_not_see_the_scale_of_the_logits(scale: float, slack: float) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 1, 4, 4, generator=generator)
    found = []
    for factor in (1.0, scale):
        layers = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
        with torch.no_grad():
            for at, layer in enumerate((layers[0], layers[2])):
                own = torch.Generator().manual_seed(at)
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=own))
                layer.bias.zero_()
            layers[2].weight.mul_(factor)
        network = nn.Sequential(nn.Flatten(), *layers).eval().requires_grad_(False)
        labels = network(images).argmax(dim=1)
        attack = L2DeepFool(slack=slack)
        found.append(attack(reference_model(network), images, labels, epsilons=None)[1])
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_unclipped_deepfool_leaves_the_box_and_clipped_does_not(ccn_bundle: Bundle) -> None:
    images = torch.from_numpy(digits(8)[0])
    reference = load_reference(ccn_bundle)
    model, labels = reference_model(reference), reference(images).argmax(dim=1)
    _, inside, _ = L2DeepFool()(model, images, labels, epsilons=None)
    _, outside, fooled = L2DeepFool(clip=False)(model, images, labels, epsilons=None)
    assert inside.min() >= 0 and inside.max() <= 1
    assert outside.min() < 0 and outside.max() > 1
    assert fooled.all()


def test_fgsm_is_foolboxs(bundle: Bundle) -> None:
    images, labels = map(torch.from_numpy, digits(16))
    model = reference_model(load_reference(bundle))
    _, ours, _ = LinfFGSM()(model, images, labels, epsilons=0.2)
    _, theirs, _ = fb.attacks.LinfFastGradientAttack()(model, images, labels, epsilons=0.2)
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 1e-3  # signs of nothing but rounding


# Attacking a runtime


@pytest.fixture
def runtime(bundle: Bundle):  # type: ignore[no-untyped-def]
    with open_runtime(bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as opened:
        yield opened


def test_logits_are_the_runtimes_and_gradients_the_reference(bundle: Bundle, runtime) -> None:  # type: ignore[no-untyped-def]
    images, _ = digits(5)
    cotangents = np.random.default_rng(0).standard_normal((5, 3, 10)).astype(np.float32)
    reference = load_reference(bundle)
    x = torch.from_numpy(images).requires_grad_()
    logits = foolbox_model(runtime, reference)(x)
    np.testing.assert_array_equal(logits.detach().numpy(), runtime.logits(images))

    leaf = torch.from_numpy(images).requires_grad_()
    truth = reference(leaf)
    for row in torch.from_numpy(cotangents).unbind(1):
        (ours,) = torch.autograd.grad(logits, x, row, retain_graph=True)
        (expected,) = torch.autograd.grad(truth, leaf, row, retain_graph=True)
        np.testing.assert_array_equal(ours.numpy(), expected.numpy())


def test_native_gradients_are_those_of_the_runtime(bundle: Bundle) -> None:
    images, _ = digits(3)
    with open_runtime(bundle, "torch", "fp64", ONE_THREAD) as exact:
        x = torch.from_numpy(images).requires_grad_()
        logits = foolbox_model(exact, None, gradient="native")(x)
        (gradient,) = torch.autograd.grad(logits[:, 3].sum(), x)
        cotangents = np.zeros((3, 1, 10), np.float32)
        cotangents[:, :, 3] = 1
        _, expected = exact.vjp(images, cotangents)
    np.testing.assert_allclose(gradient.numpy(), expected[:, 0], rtol=1e-6)


def test_a_pass_on_a_runtime_asks_no_autograd_and_gives_the_same(bundle: Bundle) -> None:
    images = torch.from_numpy(digits(6)[0])
    rows = torch.tensor([4, 1, 5])
    cotangents = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0))
    with open_runtime(bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as opened:
        native = forward(foolbox_model(opened, None, gradient="native"), images)
        by_reference = forward(foolbox_model(opened, load_reference(bundle)), images)
        assert torch.equal(native.logits, by_reference.logits)
        ours, theirs = (p.gradients(rows, cotangents) for p in (native, by_reference))
        assert ours.shape == (3, 2, 1, 28, 28)
        assert not ours.requires_grad
        size = theirs.flatten(2).norm(dim=-1)
        assert ((ours - theirs).flatten(2).norm(dim=-1) <= 1e-3 * size).all()


def test_few_rows_of_a_pass_have_the_gradients_of_all(ccn_bundle: Bundle) -> None:
    images = torch.from_numpy(digits(12)[0])
    here = forward(reference_model(load_reference(ccn_bundle)), images)
    cotangents = torch.randn(12, 2, 10, generator=torch.Generator().manual_seed(0))
    whole = here.gradients(torch.arange(12), cotangents)
    few = torch.tensor([7, 2])
    np.testing.assert_allclose(here.gradients(few, cotangents[few]), whole[few], atol=1e-5)


def test_deepfool_agrees_on_the_runtime_and_on_the_reference(bundle: Bundle, runtime) -> None:  # type: ignore[no-untyped-def]
    images, labels = digits(12)
    reference = load_reference(bundle)
    spec = suite(["deepfool"])[0]
    here = perform(spec, foolbox_model(runtime, reference), images, labels, seeds=seeds(12))
    there = perform(spec, reference_model(reference), images, labels, seeds=seeds(12))
    close = np.abs(here - there).reshape(12, -1).max(axis=1) < 1e-3
    assert close.sum() >= 11  # rounding may choose another class now and then


def test_without_a_source_of_gradients_there_is_nothing_to_attack(ccn_bundle: Bundle) -> None:
    # On a NumPy model over ONNX Runtime, Foolbox's C&W reports black images as success.
    files = tuple(file for file in ccn_bundle.manifest.files if file.role != "gradient")
    served = replace(ccn_bundle, manifest=msgspec.structs.replace(ccn_bundle.manifest, files=files))
    with open_runtime(served, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime:
        with pytest.raises(RuntimeUnavailableError, match="no reference was given"):
            foolbox_model(runtime, None)
        with pytest.raises(RuntimeUnavailableError, match="no gradients of its own"):
            foolbox_model(runtime, load_reference(ccn_bundle), gradient="native")


def test_carlini_wagner_through_the_runtime_returns_no_black_image(sm_bundle: Bundle) -> None:
    images, _ = digits(4)
    with open_runtime(sm_bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime:
        labels = runtime.logits(images).argmax(axis=1)
        attack = fb.attacks.L2CarliniWagnerAttack(
            binary_search_steps=2, steps=40, stepsize=0.1, initial_const=10.0
        )
        model = foolbox_model(runtime, load_reference(sm_bundle))
        tensors = torch.from_numpy(images), torch.from_numpy(labels)
        _, found, fooled = attack(model, *tensors, epsilons=None)
        chosen = found[fooled].numpy()
        assert len(chosen)
        assert (runtime.logits(chosen).argmax(axis=1) != labels[fooled.numpy()]).all()
        assert chosen.reshape(len(chosen), -1).max(axis=1).min() > 0.1


def test_a_network_that_would_learn_or_drop_out_is_refused() -> None:
    reference = random_network("mnist-cnn", "sm")
    with pytest.raises(ValueError, match="eval"):
        reference_model(reference.train())
    with pytest.raises(ValueError, match="requires_grad"):
        reference_model(reference.eval().requires_grad_())


def test_a_gpu_in_the_machine_does_not_take_the_model(
    ccn_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reference = load_reference(ccn_bundle)
    assert reference_model(reference).device == torch.device("cpu")
    with open_runtime(ccn_bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime:
        assert foolbox_model(runtime, reference).device == torch.device("cpu")


def test_fast_deepfool_skips_candidates_and_finds_the_same(bundle: Bundle) -> None:
    images, _ = digits(40)
    reference = load_reference(bundle)
    labels = reference(torch.from_numpy(images)).argmax(dim=1).numpy()
    asked, rho = {}, {}
    for name in ("deepfool", "deepfool-fast"):
        counted = QueryCounter(reference_model(reference), 40)
        found = perform(suite([name])[0], counted, images, labels, seeds=seeds(40))
        assert (reference(torch.from_numpy(found)).argmax(dim=1).numpy() != labels).all()
        asked[name] = counted.queries.backward.sum()
        sizes = np.linalg.norm(images.reshape(40, -1), axis=1)
        rho[name] = (np.linalg.norm((found - images).reshape(40, -1), axis=1) / sizes).mean()
    assert asked["deepfool-fast"] < 0.5 * asked["deepfool"]
    assert rho["deepfool-fast"] == pytest.approx(rho["deepfool"], rel=0.01)


def test_a_slack_that_skips_nothing_changes_nothing(ccn_bundle: Bundle) -> None:
    images = torch.from_numpy(digits(12)[0])
    reference = load_reference(ccn_bundle)
    model, labels = reference_model(reference), reference(images).argmax(dim=1)
    exact = L2DeepFool().run(model, images, labels)
    loose = L2DeepFool(slack=1e9).run(model, images, labels)
    np.testing.assert_allclose(loose.numpy(), exact.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="slack"):
        L2DeepFool(slack=0.9)


def test_a_model_without_gradients_is_refused_by_every_attack(ccn_bundle: Bundle) -> None:
    images, labels = digits(2)
    reference = load_reference(ccn_bundle)

    def answer(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return reference(torch.from_numpy(x)).numpy()

    blind = fb.NumPyModel(answer, bounds=(0, 1))
    for attack, epsilon in ((LinfFGSM(), 0.1), (LinfPGD(), 0.1), (L2DeepFool(), None)):
        with pytest.raises(RuntimeUnavailableError, match="no gradients"):
            attack(blind, images, labels, epsilons=epsilon)

    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reference(x).detach()

    detached = fb.PyTorchModel(Detached().eval(), bounds=(0, 1), device="cpu")
    with pytest.raises(RuntimeUnavailableError, match="no gradients"):
        LinfFGSM()(detached, torch.from_numpy(images), torch.from_numpy(labels), epsilons=0.1)
