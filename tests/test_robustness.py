"""Attacking a deployed runtime for real: evidence, resuming, planted faults, the command."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.attacks.passes import forward
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import dataset_from_arrays, load_dataset
from ccn_deploy.errors import ExitCode, IntegrityError, UsageError
from ccn_deploy.robustness import Measurement, RobustnessRequest, collect, collect_all, judge
from ccn_deploy.robustness.attack_job import is_legal
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference
from ccn_deploy.verdict import Verdict
from tests.faults import drop_delta, edited, reorder_classes

ONE_THREAD = RuntimeOptions(threads=1)
PGD = AttackSpec(
    "pgd", "linf", 0.2, True, {"steps": 5, "rel_stepsize": 0.3, "random_start": True, "restarts": 1}
)
(FGSM,) = suite(["fgsm"], [0.2])
DEEPFOOL = suite(["deepfool"])


def request(samples: int = 20, *attacks: AttackSpec, **more: object) -> RobustnessRequest:
    return RobustnessRequest(
        dataset=load_dataset("mnist5k", "test"),
        attacks=attacks or (FGSM,),
        samples=samples,
        options=ONE_THREAD,
        batch=10,
        **more,  # type: ignore[arg-type]
    )


def files(bundle: Bundle, suffix: str = ".jsonl") -> dict[str, bytes]:
    found = sorted(bundle.evidence.rglob(f"*{suffix}"))
    return {str(f.relative_to(bundle.evidence)): f.read_bytes() for f in found}


def sample_lines(data: bytes) -> list[bytes]:
    return [line for line in data.splitlines() if b'"sealed"' not in line]


# What the evidence says


def test_evidence_is_what_the_attacked_images_do_to_the_runtime(ccn_bundle: Bundle) -> None:
    measurement = collect(ccn_bundle, request(20, FGSM, *DEEPFOOL))
    dataset = load_dataset("mnist5k", "test")
    reference = load_reference(ccn_bundle)
    with open_runtime(ccn_bundle, "onnxruntime-cpu", "fp32", ONE_THREAD) as runtime:
        for pair in measurement.pairs:
            evidence = pair.runtime
            np.testing.assert_array_equal(evidence.index, dataset.order(0)[:20])
            np.testing.assert_array_equal(evidence.label, dataset.labels[evidence.index])
            images = dataset.images(evidence.index)
            clean = runtime.logits(images).argmax(axis=1)
            np.testing.assert_array_equal(evidence.clean_runtime, clean)
            wrong = clean != evidence.label
            np.testing.assert_array_equal(evidence.status == "already-wrong", wrong)
            changed = evidence.adversarial_runtime != evidence.label
            np.testing.assert_array_equal((evidence.status == "fooled")[~wrong], changed[~wrong])
            assert (evidence.status != "invalid").all()

    # The FGSM images made again by hand, scored on the reference, measured in float64.
    evidence = measurement.pairs[0].runtime
    images, labels = dataset.images(evidence.index), torch.from_numpy(evidence.label)
    x = torch.from_numpy(images).requires_grad_()
    loss = torch.nn.functional.cross_entropy(reference(x), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    attacked = (x.detach() + 0.2 * gradient.sign()).clamp(0, 1)
    right = evidence.status != "already-wrong"
    labels_there = reference(attacked).argmax(dim=1).numpy()
    assert (labels_there == evidence.adversarial_reference)[right].mean() > 0.9
    moved = (attacked.double() - x.detach().double()).abs().flatten(1).amax(1).numpy()
    np.testing.assert_allclose(evidence.linf[right], moved[right], atol=1e-6)
    assert np.isnan(evidence.linf[~right]).all()


def test_rho_is_the_perturbation_over_the_image(ccn_bundle: Bundle) -> None:
    measurement = collect(ccn_bundle, request(10, *DEEPFOOL))
    inside, outside = (pair.runtime for pair in measurement.pairs)
    images = load_dataset("mnist5k", "test").images(inside.index).astype(np.float64)
    sizes = np.sqrt((images**2).reshape(len(images), -1).sum(axis=1))
    for evidence in (inside, outside):
        found = np.isfinite(evidence.rho)
        assert found.all()
        np.testing.assert_allclose(evidence.rho, evidence.l2 / sizes)
        kept = evidence.adversarial(np.arange(10)).astype(np.float64)
        moved = np.sqrt(((kept - images) ** 2).sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(moved, evidence.l2)
    assert not np.array_equal(inside.rho, outside.rho)


def test_deepfool_attacks_the_label_given_even_where_it_is_wrong(ccn_bundle: Bundle) -> None:
    dataset = load_dataset("mnist5k", "test")
    lying = replace(dataset, labels=(dataset.labels + 1) % 10, digest="lies")
    measurement = collect(ccn_bundle, replace(request(6, *DEEPFOOL), dataset=lying))
    for pair in measurement.pairs:
        assert (pair.runtime.status == "already-wrong").sum() >= 5
        assert np.isfinite(pair.runtime.rho).all()
        assert (pair.runtime.adversarial_runtime != pair.runtime.clean_runtime).all()


def test_reference_and_runtime_agree_on_a_healthy_bundle(sm_bundle: Bundle) -> None:
    result = judge(collect(sm_bundle, request(40, FGSM, PGD)), max_drop=0.1)
    assert result.verdict is Verdict.PASS
    assert sum(row.flips for row in result.bounded) <= 2


@pytest.mark.parametrize(
    ("what", "legal"),
    [("fine", True), ("nan", False), ("above", False), ("below", False), ("far", False)],
)
def test_only_legal_images_count(what: str, legal: bool) -> None:
    image = np.full((1, 1, 2, 2), 0.5, np.float32)
    adversarial = image.copy()
    adversarial[0, 0, 1, 1] += 0.21 if what == "far" else 0.2
    adversarial[0, 0, 0, 0] = {"nan": np.nan, "above": 1.001, "below": -0.001}.get(what, 0.5)
    wide = replace(FGSM, epsilon=FGSM.epsilon if what == "far" else 0.51)
    assert is_legal(wide, image, adversarial).tolist() == [legal]


def test_an_attack_that_returns_rubbish_is_invalid_and_not_held(
    ccn_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rubbish = {"nan": np.nan, "dark": -1.0}

    for name, value in rubbish.items():

        def perform(  # type: ignore[no-untyped-def]
            spec, model, images, labels, seeds, value=value
        ):
            assert forward(model, torch.from_numpy(images)).logits.isfinite().all()
            return np.full_like(images, value)

        monkeypatch.setattr("ccn_deploy.attacks.perform.perform", perform)
        measurement = collect(ccn_bundle, request(4, replace(FGSM, parameters={name: 1})))
        evidence = measurement.pairs[0].runtime
        assert (evidence.status[evidence.status != "already-wrong"] == "invalid").all()
        result = judge(measurement, max_drop=0.99)
        assert result.bounded[0].runtime.count == 0
        assert result.verdict is Verdict.INCONCLUSIVE


# The verdict comes from the runtime


def test_a_changed_class_order_fails(ccn_bundle: Bundle, tmp_path: Path) -> None:
    broken = reorder_classes(ccn_bundle, tmp_path / "broken")
    measurement = collect(broken, request(60))
    evidence = measurement.pairs[0].runtime
    swapped = (evidence.label < 2) & (evidence.clean_reference == evidence.label)
    assert swapped.any()
    assert (evidence.clean_runtime[swapped] == 1 - evidence.label[swapped]).all()
    assert (evidence.status[swapped] == "already-wrong").all()
    result = judge(measurement, max_drop=0.01)
    assert result.verdict is Verdict.FAIL
    assert result.clean.gate.verdict is Verdict.FAIL
    assert any("clean images different verdicts" in f.sentence for f in result.findings)


def test_logits_that_are_not_finite_are_no_right_answer(ccn_bundle: Bundle, tmp_path: Path) -> None:
    broken = drop_delta(ccn_bundle, tmp_path / "broken")
    gray = np.full((4, 1, 28, 28), 0.5, np.float32)
    names = [str(k) for k in range(10)]
    dataset = dataset_from_arrays("gray", gray, np.arange(4), names)
    evidence = collect(broken, replace(request(4, *DEEPFOOL), dataset=dataset)).pairs[0].runtime
    assert (evidence.clean_runtime == -1).all()
    assert (evidence.clean_reference >= 0).all()
    assert (evidence.status == "already-wrong").all()


# Keeping evidence


def test_evidence_is_measured_once(ccn_bundle: Bundle) -> None:
    calls: list[str] = []
    first = collect(ccn_bundle, request(), lambda what, done, total: calls.append(what))
    assert set(calls) == {
        "linf-0.2-fgsm on torch-fp32",
        "linf-0.2-fgsm on onnxruntime-cpu-fp32",
    }
    before = files(ccn_bundle)
    calls.clear()
    second = collect(ccn_bundle, request(), lambda what, done, total: calls.append(what))
    assert calls == []
    assert files(ccn_bundle) == before
    told = [{**judge(one).document(), "evidence": None} for one in (first, second)]
    assert told[0] == told[1]
    assert [p.origin for p in (*first.pairs, *second.pairs)] == ["measured", "read"]


def test_what_requests_share_is_collected_once_and_not_called_read(ccn_bundle: Bundle) -> None:
    requests = [replace(request(), gradient=gradient) for gradient in ("native", "reference")]
    first, second = collect_all(ccn_bundle, requests)
    assert first.pairs[0].reference is second.pairs[0].reference
    assert judge(second).origin == "All evidence was measured by this run."
    third = collect(ccn_bundle, replace(requests[0], gradient="transfer"))
    assert judge(third).origin.startswith("linf-0.2-fgsm on the reference were read, not measured")


def test_progress_rises_to_its_total(ccn_bundle: Bundle) -> None:
    seen: list[tuple[float, float]] = []
    collect(
        ccn_bundle, request(20, FGSM, PGD), lambda what, done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_the_reference_is_shared_by_all_runtimes(ccn_bundle: Bundle) -> None:
    collect(ccn_bundle, request())
    before = files(ccn_bundle)
    measurement = collect(ccn_bundle, request(runtime="torch"))
    assert files(ccn_bundle) == before
    pair = measurement.pairs[0]
    np.testing.assert_array_equal(pair.reference.status, pair.runtime.status)


def test_more_images_extend_and_fewer_read_the_first(ccn_bundle: Bundle) -> None:
    collect(ccn_bundle, request(10, PGD))
    small = files(ccn_bundle)
    longer = collect(ccn_bundle, request(25, PGD))
    for name, data in files(ccn_bundle).items():
        assert data.startswith(small[name])
    shorter = collect(ccn_bundle, request(15, PGD))
    for side in ("reference", "runtime"):
        few, many = getattr(shorter.pairs[0], side), getattr(longer.pairs[0], side)
        assert len(few) == 15
        np.testing.assert_array_equal(few.status, many.status[:15])


def test_what_the_numbers_depend_on_has_evidence_of_its_own(ccn_bundle: Bundle) -> None:
    collect(ccn_bundle, request(2))
    stronger = replace(FGSM, epsilon=0.3)
    for changed in (request(2, stronger), request(2, seed=1), replace(request(2), batch=2)):
        before = len(files(ccn_bundle))
        collect(ccn_bundle, changed)
        assert len(files(ccn_bundle)) == before + 2


def test_another_graph_has_evidence_of_its_own(ccn_bundle: Bundle, tmp_path: Path) -> None:
    collect(ccn_bundle, request(2))
    other = edited(ccn_bundle, tmp_path / "other", lambda graph: setattr(graph, "name", "other"))
    collect(other, request(2))
    shared = {path.split("/")[-2] for path in set(files(ccn_bundle)) & set(files(other))}
    assert shared == {"torch-fp32"}  # the reference is still the same


def test_a_changed_file_is_an_integrity_error(ccn_bundle: Bundle) -> None:
    collect(ccn_bundle, request())
    path = next(ccn_bundle.evidence.rglob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"fooled"', b'"held"', 1))
    with pytest.raises(IntegrityError) as raised:
        collect(ccn_bundle, request())
    assert str(path) in raised.value.hint


KILLED = """
import sys
from ccn_deploy.bundle import open_bundle
sys.path.insert(0, {tests!r})
from tests.test_robustness import PGD, collect, request

def tell(what, done, total):
    print(what, done, flush=True)

collect(open_bundle({bundle!r}), request(40, PGD), tell)
"""


def test_a_killed_evaluation_continues_to_the_same_evidence(ccn_bundle: Bundle) -> None:
    code = KILLED.format(bundle=str(ccn_bundle.path), tests=str(Path(__file__).parents[1]))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        # The second line of the second target: its first batch is sealed, its second under way.
        lines = iter(child.stdout.readline, "")
        onnx = (line for line in lines if "onnxruntime" in line)
        next(onnx), next(onnx)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    interrupted = {name: len(sample_lines(data)) for name, data in files(ccn_bundle).items()}
    assert any(1 < count < 41 for count in interrupted.values())
    # As if killed between images and rows.
    for path in ccn_bundle.evidence.glob("robustness/onnxruntime-cpu-fp32/*.images"):
        path.write_bytes(path.read_bytes() + b"no block")

    resumed = collect(ccn_bundle, request(40, PGD))
    continued, images = files(ccn_bundle), files(ccn_bundle, ".images")
    shutil.rmtree(ccn_bundle.evidence)
    whole = collect(ccn_bundle, request(40, PGD))
    uninterrupted = files(ccn_bundle)
    assert continued.keys() == uninterrupted.keys()
    for name, data in continued.items():
        assert sample_lines(data) == sample_lines(uninterrupted[name])
    assert len(images) == 2
    assert images == files(ccn_bundle, ".images")
    assert verdicts(resumed) == verdicts(whole)


def verdicts(measurement: Measurement) -> list[object]:
    document = judge(measurement).document()
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "effort")}
        for row in document["attacks"]
    ]


def test_cached_evidence_is_judged_without_torch(ccn_bundle: Bundle) -> None:
    collect(ccn_bundle, request())
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from ccn_deploy.attacks import suite
from ccn_deploy.bundle import open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.robustness import RobustnessRequest, collect, judge
request = RobustnessRequest(
    load_dataset("mnist5k", "test"), attacks=suite(["fgsm"], [0.2]), samples=20, batch=10
)
print(judge(collect(open_bundle({str(ccn_bundle.path)!r}), request)).verdict.value)
print({{"torch", "foolbox", "onnxruntime", "onnx"}} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["inconclusive", "set()"]


# Requests that make no sense


def test_a_data_set_that_does_not_fit_is_refused(ccn_bundle: Bundle) -> None:
    names = [str(k) for k in range(10)]
    wide = dataset_from_arrays(
        "wide", np.zeros((2, 1, 28, 30), np.float32), np.zeros(2, int), names
    )
    few = dataset_from_arrays("few", np.zeros((2, 1, 28, 28), np.float32), np.zeros(2, int), "ab")
    for dataset, word in ((wide, "Images"), (few, "classes")):
        with pytest.raises(UsageError, match=word):
            collect(ccn_bundle, replace(request(), dataset=dataset))
    for bad in (request(0), request(runtime="onnxruntime-cpux")):
        with pytest.raises(UsageError):
            collect(ccn_bundle, bad)
    assert not ccn_bundle.evidence.exists()


# The command


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ccn_deploy.cli.main", "verify-robustness", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_a_table_or_one_document(ccn_bundle: Bundle) -> None:
    given = (ccn_bundle.path, "--attack", "fgsm", "--attack", "deepfool", "--epsilons", "0.1,0.3")
    given = (*given, "--samples", 12, "--threads", 1, "--max-drop", 0.49)
    result = command(*given, "--no-report")
    assert result.returncode == ExitCode.PASS, result.stderr
    assert "FGSM 0.3" in result.stdout and "DeepFool 0.5" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("PASS")
    assert max(map(len, result.stdout.splitlines()[:12])) <= 80

    quiet = command(*given, "--json")
    document = json.loads(quiet.stdout)
    assert document["verdict"] == "pass"
    assert [(row["attack"], row["epsilon"]) for row in document["attacks"]] == [
        ("fgsm", 0.1),
        ("fgsm", 0.3),
        ("deepfool", None),
    ]
    assert (ccn_bundle.path / "report.html").is_file()
    doubtful = command(*given[:-2], "--no-report")
    assert doubtful.returncode == ExitCode.INCONCLUSIVE


def test_the_command_fails_a_runtime_that_is_worse(ccn_bundle: Bundle, tmp_path: Path) -> None:
    broken = reorder_classes(ccn_bundle, tmp_path / "broken")
    result = command(broken.path, "--attack", "fgsm", "--samples", 40, "--threads", 1, "--json")
    assert result.returncode == ExitCode.GATE_FAILED, result.stderr
    document = json.loads(result.stdout)
    assert document["verdict"] == "fail"
    assert document["clean"]["verdict"] == "fail"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attack", "dipfool"], "deepfool"),
        (["--epsilons", "0.1,high"], "'high'"),
        (["--runtime", "onnxruntim-cpu"], "onnxruntime-cpu"),
        (["--dataset", "mnist6k"], "mnist5k"),
    ],
)
def test_a_wrong_argument_is_two_lines(
    ccn_bundle: Bundle, arguments: list[str], words: str
) -> None:
    result = command(ccn_bundle.path, *arguments)
    assert result.returncode == ExitCode.USAGE
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    assert result.stdout == ""
