"""Attacks with the runtime's own gradients, with its reference's, and crafted on the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from ccn_deploy.attacks import ATTACKS, AttackSpec, suite
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.cli.main import app
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import RuntimeUnavailableError, UsageError
from ccn_deploy.robustness import Evidence, RobustnessRequest, collect, judge
from ccn_deploy.robustness.agreement import Agreement, compare_gradients
from ccn_deploy.robustness.attack_session import AttackSession
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference
from ccn_deploy.targets import Target
from tests.faults import drop_delta, reorder_classes

ONE_THREAD = RuntimeOptions(threads=1)
TARGET = Target("onnxruntime-cpu")
(FGSM,) = suite(["fgsm"], [0.2])


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    dataset = load_dataset("mnist5k", "test")
    chosen = dataset.order(0)[:n]
    return dataset.images(chosen), dataset.labels[chosen]


def seeds(n: int) -> np.ndarray:
    return np.arange(n)[:, None]


def request(samples: int, *attacks: AttackSpec, **more: object) -> RobustnessRequest:
    return RobustnessRequest(
        dataset=load_dataset("mnist5k", "test"),
        attacks=attacks or (FGSM,),
        samples=samples,
        options=ONE_THREAD,
        batch=10,
        **more,  # type: ignore[arg-type]
    )


def without_gradient(bundle: Bundle) -> Bundle:
    files = tuple(file for file in bundle.manifest.files if file.role != "gradient")
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, files=files))


@pytest.fixture(params=["sm", "ccn"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(f"{request.param}_bundle")


# Which gradients are used


def test_native_is_used_where_the_graph_is_there_and_the_reference_elsewhere(
    ccn_bundle: Bundle,
) -> None:
    assert collect(ccn_bundle, request(2)).gradient == "native"
    assert collect(without_gradient(ccn_bundle), request(2)).gradient == "reference"
    assert collect(ccn_bundle, request(2, gradient="reference")).gradient == "reference"
    assert collect(ccn_bundle, request(2, runtime="torch")).gradient == "native"


def test_native_without_a_graph_is_refused_before_anything_is_measured(ccn_bundle: Bundle) -> None:
    names = [name for name, kind in ATTACKS.items() if kind.knowledge == "gradients"]
    for spec in suite(names, [0.1]):
        with pytest.raises(RuntimeUnavailableError, match="no gradients of its own"):
            collect(without_gradient(ccn_bundle), request(2, spec, gradient="native"))
    with pytest.raises(UsageError, match="native"):
        collect(ccn_bundle, request(2, gradient="nativ"))
    assert not ccn_bundle.evidence.exists()


def test_every_source_has_evidence_of_its_own_and_one_reference(ccn_bundle: Bundle) -> None:
    for gradient in ("native", "reference", "transfer"):
        measurement = collect(ccn_bundle, request(2, gradient=gradient))
        assert measurement.pairs[0].runtime.header["gradient"] == gradient
        assert measurement.pairs[0].reference.header["gradient"] == "native"
    kept = [p.parent.name for p in ccn_bundle.evidence.rglob("*.jsonl")]
    assert sorted(kept) == [*["onnxruntime-cpu-fp32"] * 3, "torch-fp32"]


def test_native_evidence_never_asks_the_reference_for_a_gradient(
    ccn_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference was asked")

    collect(ccn_bundle, request(4, runtime="torch"))  # the reference, attacked with its own
    monkeypatch.setattr("ccn_deploy.attacks.foolbox_model.AutogradPass", refuse)
    collect(ccn_bundle, request(4, gradient="native"))
    with pytest.raises(AssertionError, match="asked"):
        collect(ccn_bundle, request(4, gradient="reference"))


def test_a_transferred_image_is_crafted_on_the_reference_and_scored_on_the_runtime(
    ccn_bundle: Bundle, tmp_path: Path
) -> None:
    # The runtime swaps two classes; the reference does not know.
    broken = reorder_classes(ccn_bundle, tmp_path / "broken")
    evidence = collect(broken, request(20, gradient="transfer")).pairs[0].runtime
    right = evidence.status != "already-wrong"
    images, labels = load_dataset("mnist5k", "test").images(evidence.index), evidence.label
    made = perform(FGSM, reference_model(load_reference(broken)), images, labels, seeds=seeds(20))
    with open_runtime(broken, TARGET.runtime, TARGET.precision, ONE_THREAD) as runtime:
        scored = runtime.logits(made).argmax(axis=1)
    np.testing.assert_array_equal(evidence.adversarial_runtime[right], scored[right])


def test_deepfool_to_transfer_leaves_the_label_of_the_reference(
    ccn_bundle: Bundle, tmp_path: Path
) -> None:
    broken = reorder_classes(ccn_bundle, tmp_path / "broken")
    (spec, _) = suite(["deepfool"])
    evidence = collect(broken, request(10, spec, gradient="transfer")).pairs[0].runtime
    assert (evidence.adversarial_reference != evidence.clean_reference).all()
    assert (evidence.l2 > 0).all()


# How far they agree


def test_agreement_is_cosine_and_shared_signs() -> None:
    ours = np.array([[1.0, 0.0], [1.0, -2.0], [3.0, 4.0]])
    theirs = np.array([[1.0, 1.0], [-1.0, 2.0], [6.0, 8.0]])
    found = Agreement.between(ours, theirs)
    assert found.cosine_mean == pytest.approx((2**-0.5 - 1 + 1) / 3)
    assert found.cosine_min == pytest.approx(-1)
    assert found.sign_mean == pytest.approx((0.5 + 0 + 1) / 3)
    assert (found.n, found.vanished, found.sign_min) == (3, 0, 0)


def test_a_gradient_that_vanished_or_is_not_finite_agrees_with_nothing() -> None:
    ours = np.array([[0.0, 0.0], [np.nan, 1.0], [0.0, 0.0]])
    theirs = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    found = Agreement.between(ours, theirs)
    assert found.vanished == 2
    assert (found.cosine_min, found.cosine_mean) == (0, pytest.approx(1 / 3))


def test_a_healthy_bundles_gradients_agree_with_its_reference(bundle: Bundle) -> None:
    with AttackSession(bundle, ONE_THREAD) as session:
        found = compare_gradients(session, TARGET, *digits(24))
    for at in (found.clean, found.adversarial):
        assert (at.n, at.vanished) == (24, 0)
        assert at.cosine_mean > 0.999  # rounding may turn a ReLU or a tie in a pool
        assert at.cosine_min > 0.95
        assert at.sign_mean > 0.99
        assert at.cosine_min <= at.cosine_mean <= 1


def test_gradients_of_another_function_are_seen_to_disagree(
    ccn_bundle: Bundle, tmp_path: Path
) -> None:
    broken = reorder_classes(ccn_bundle, tmp_path / "broken")
    images, labels = digits(60)
    some = labels < 2
    with AttackSession(broken, ONE_THREAD) as session:
        found = compare_gradients(session, TARGET, images[some], labels[some])
    assert found.clean.cosine_mean < 0.95


def test_agreement_is_kept_with_the_evidence_and_read_back(ccn_bundle: Bundle) -> None:
    first = collect(ccn_bundle, request(4)).agreement
    assert first is not None and first.clean.n == 4
    (path,) = ccn_bundle.evidence.rglob("diagnostics-*.json")
    before = path.stat().st_mtime_ns
    assert collect(ccn_bundle, request(4)).agreement == first
    assert path.stat().st_mtime_ns == before
    assert collect(without_gradient(ccn_bundle), request(4)).agreement is None
    assert collect(ccn_bundle, request(4, runtime="torch")).agreement is None


def test_logits_that_are_not_finite_agree_with_nothing_and_stop_nothing(
    ccn_bundle: Bundle, tmp_path: Path
) -> None:
    broken = drop_delta(ccn_bundle, tmp_path / "broken")
    gray = np.full((4, 1, 28, 28), 0.5, np.float32)
    with AttackSession(broken, ONE_THREAD) as session:
        found = compare_gradients(session, TARGET, gray, np.arange(4))
    assert found.clean.n == 4


# The command


def test_the_command_says_whose_gradients_were_used_and_how_far_they_agree(
    ccn_bundle: Bundle,
) -> None:
    given = ["verify-robustness", str(ccn_bundle.path), "--attack", "fgsm", "--epsilons", "0.2"]
    given += ["--samples", "5", "--threads", "1", "--max-drop", "0.49", "--no-report"]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 0, shown.output
    assert "native, the runtime's own" in shown.output
    assert "native and reference agree on 5 clean images" in " ".join(shown.output.split())
    for gradient in ("native", "reference", "transfer"):
        result = CliRunner().invoke(app, [*given, "--gradient", gradient, "--json"])
        document = json.loads(result.stdout)
        assert document["gradient"] == gradient
        assert document["gradient_agreement"]["clean"]["cosine_mean"] > 0.99


def test_the_judgement_keeps_the_agreement(ccn_bundle: Bundle) -> None:
    result = judge(collect(ccn_bundle, request(4)))
    assert isinstance(result.measurement.pairs[0].runtime, Evidence)
    document = result.document()["gradient_agreement"]
    assert set(document) == {"clean", "adversarial"}
    assert document["adversarial"]["sign_mean"] > 0.9


# Attacks on the runtime


def test_deepfool_with_native_gradients_is_deepfool_on_the_reference(bundle: Bundle) -> None:
    images, _ = digits(50)
    reference = load_reference(bundle)
    (spec, _) = suite(["deepfool"])
    with open_runtime(bundle, TARGET.runtime, TARGET.precision, ONE_THREAD) as runtime:
        labels = runtime.logits(images).argmax(axis=1)
        native = foolbox_model(runtime, None, gradient="native")
        here = perform(spec, native, images, labels, seeds=seeds(50))
        assert (runtime.logits(here).argmax(axis=1) != labels).all()
    there = perform(spec, reference_model(reference), images, labels, seeds=seeds(50))
    moved = [np.linalg.norm((x - images).reshape(50, -1), axis=1) for x in (here, there)]
    close = np.abs(moved[0] / moved[1] - 1) <= 0.01
    assert close.mean() >= 0.98
