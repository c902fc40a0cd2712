"""Evidence written by hand, with right digests, is found out by asking the runtime again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.data import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import IntegrityError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.robustness import (
    Evidence,
    Measurement,
    RobustnessRequest,
    Sample,
    collect,
    judge,
    recheck,
)
from ccn_deploy.robustness.attack_job import AttackJob, attack, distances, relative
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession
from ccn_deploy.robustness.evidence import NO_LABEL, writing
from ccn_deploy.robustness.kept_images import images_path
from ccn_deploy.robustness.recheck import default_count
from ccn_deploy.robustness.row_checks import check_rows
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.targets import Target
from ccn_deploy.verdict import Verdict
from tests.networks import as_run, random_network

EPSILON = 0.01
(FGSM,) = suite(["fgsm"], [EPSILON])
DEEPFOOL = suite(["deepfool"])[0]
STAGES = (
    replace(FGSM, epsilon=EPSILON / 4),
    replace(suite(["pgd"], [EPSILON])[0], part=20),
    DEEPFOOL,
    AttackSpec("transfer", "linf", EPSILON),
)
AUDIT = AttackSpec("audit", "linf", EPSILON, stages=STAGES)
ONNX = Target("onnxruntime-cpu")
N = 40

Images = NDArray[np.float32]
Forge = Callable[[Evidence, Images], tuple[list[Sample], Images]]


@dataclass(frozen=True)
class Measured:
    bundle: Bundle
    request: RobustnessRequest

    @property
    def data(self) -> Dataset:
        return self.request.dataset

    def collect(self, *attacks: AttackSpec) -> Measurement:
        return collect(self.bundle, replace(self.request, attacks=attacks or (FGSM,)))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A network of random weights on images that it calls as it does, every second one fooled."""
    path = tmp_path_factory.mktemp("recheck") / "bundle"
    export_bundle(as_run(random_network("mnist-cnn", "sm")), path)
    bundle = open_bundle(path)
    images = 0.1 + 0.8 * np.random.default_rng(0).random((N, 1, 28, 28), np.float32) ** 2
    options = RuntimeOptions(threads=1)
    with open_runtime(bundle, "onnxruntime-cpu", "fp32", options) as runtime:
        labels = runtime.logits(images).argmax(axis=1)
    data = dataset_from_arrays("own", images, labels, [str(k) for k in range(10)])
    request = RobustnessRequest(data, samples=N, batch=20, options=options)
    measured = Measured(bundle, request)
    measured.collect(FGSM, DEEPFOOL, AUDIT)
    return measured


@pytest.fixture
def copied(honest: Measured, tmp_path: Path) -> Measured:
    shutil.copytree(honest.bundle.path, tmp_path / "bundle")
    return replace(honest, bundle=open_bundle(tmp_path / "bundle"))


def samples_of(evidence: Evidence) -> list[Sample]:
    """Read rows back from the file."""
    assert evidence.path is not None
    lines = evidence.path.read_bytes().splitlines()[1:]
    return [msgspec.json.decode(x, type=Sample) for x in lines if not x.startswith(b'{"images"')]


def forge(evidence: Evidence, made: Forge) -> None:
    """Write evidence anew, as the project itself does."""
    samples, images = made(evidence, evidence.adversarial(np.arange(len(evidence))))
    path = evidence.path
    assert path is not None
    path.unlink()
    images_path(path).unlink()
    with writing(path, evidence.header) as writer:
        for at in range(0, len(samples), 20):
            writer.append(samples[at : at + 20], images[at : at + 20], seconds=1.0)


def held(samples: list[Sample], clean: Images, images: Images) -> list[Sample]:
    """Rows that say of legal images that none fools anything."""
    linf, l2 = distances(clean, images)
    return [
        msgspec.structs.replace(
            s,
            status="held",
            adversarial=s.clean,
            rho=None,
            linf=float(linf[at]),
            l2=float(l2[at]),
        )
        for at, s in enumerate(samples)
    ]


def moved(evidence: Evidence, clean: Images, images: Images) -> list[Sample]:
    """The same rows with the distances of other images."""
    linf, l2 = distances(clean, images)
    rho = relative(clean, l2)
    return [
        msgspec.structs.replace(
            s,
            linf=float(linf[at]),
            l2=float(l2[at]),
            rho=None if s.rho is None else float(rho[at]),
        )
        for at, s in enumerate(samples_of(evidence))
    ]


def test_true_evidence_stands(honest: Measured) -> None:
    measurement = honest.collect(FGSM, DEEPFOOL, AUDIT)
    assert {pair.origin for pair in measurement.pairs} == {"read"}
    assert default_count(measurement) == N // 10
    found = recheck(honest.bundle, honest.request, measurement, "all")
    assert (found.images, found.evidence, found.scored) == (N, 6, 6 * N)
    assert found.reference
    assert 6 * 8 <= found.repeated <= 6 * 32
    assert found.moved <= 3
    few = recheck(honest.bundle, honest.request, measurement, 3, np.random.default_rng(1))
    again = recheck(honest.bundle, honest.request, measurement, 3, np.random.default_rng(1))
    assert few == again
    assert (few.images, few.scored) == (3, 18)
    assert few.seed != found.seed


def test_what_was_just_measured_is_not_asked_again(copied: Measured) -> None:
    shutil.rmtree(copied.bundle.evidence)
    measurement = copied.collect()
    assert measurement.pairs[0].origin == "measured"
    assert default_count(measurement) == 0
    assert recheck(copied.bundle, copied.request, measurement, "all").evidence == 0
    extended = collect(copied.bundle, replace(copied.request, attacks=(FGSM,), samples=N - 1))
    assert extended.pairs[0].origin == "read"


@pytest.mark.parametrize("noise", [0.0, 0.9 * EPSILON])
def test_images_that_fool_nothing_are_no_attack(copied: Measured, noise: float) -> None:
    evidence = copied.collect().pairs[0].runtime
    clean = copied.data.images(evidence.index)
    near = np.random.default_rng(3).uniform(-noise, noise, clean.shape).astype(np.float32)
    images = np.clip(clean + near, 0, 1)
    with open_runtime(copied.bundle, "onnxruntime-cpu", "fp32") as runtime:
        assert (runtime.logits(images).argmax(axis=1) == evidence.label).all()
    forge(evidence, lambda e, _: (held(samples_of(e), clean, images), images))

    measurement = copied.collect()  # nothing contradicts itself
    assert judge(measurement).bounded[0].runtime.count == N
    with pytest.raises(IntegrityError, match=r"image \d+ does not end as it did"):
        recheck(copied.bundle, copied.request, measurement, 20)


def test_a_reference_that_is_made_to_look_weak_is_found_out(copied: Measured) -> None:
    evidence = copied.collect().pairs[0].reference
    clean = copied.data.images(evidence.index)

    def low(e: Evidence, images: Images) -> tuple[list[Sample], Images]:
        away = clean + np.float32(EPSILON / 2)
        linf, l2 = distances(clean, away)
        rho = relative(clean, l2)
        return [
            msgspec.structs.replace(
                s,
                status="fooled",
                adversarial=((s.label + 1) % 10,) * 2,
                linf=float(linf[at]),
                l2=float(l2[at]),
                rho=float(rho[at]),
            )
            for at, s in enumerate(samples_of(e))
        ], away

    forge(evidence, low)
    measurement = copied.collect()
    assert judge(measurement).verdict is not Verdict.FAIL
    with pytest.raises(IntegrityError, match=r"image \d+ has another label of its kept image"):
        recheck(copied.bundle, copied.request, measurement, 4)


def test_a_weaker_attack_than_the_one_named_is_found_out(copied: Measured) -> None:
    pair = copied.collect().pairs[0]
    weak = replace(FGSM, epsilon=EPSILON / 4)
    with AttackSession(copied.bundle, copied.request.options) as session:
        samples, images = attack(
            session,
            AttackJob(weak, ONNX, "native"),
            copied.data,
            pair.runtime.index,
            positions=np.arange(N),
            seed=0,
            reference=pair.reference,
        )
    rows = [
        msgspec.structs.replace(weaker, transferred=true.transferred)
        for weaker, true in zip(samples, samples_of(pair.runtime), strict=True)
    ]
    forge(pair.runtime, lambda *_: (rows, images))
    with pytest.raises(IntegrityError, match="under the same attack"):
        recheck(copied.bundle, copied.request, copied.collect(), 20)


def test_distances_that_are_made_larger_are_found_out(copied: Measured) -> None:
    evidence = copied.collect(DEEPFOOL).pairs[0].runtime
    clean = copied.data.images(evidence.index)
    far = np.clip(clean + 1.5 * (evidence.adversarial(np.arange(N)) - clean), 0, 1)
    with open_runtime(copied.bundle, "onnxruntime-cpu", "fp32") as runtime:
        assert (runtime.logits(far).argmax(axis=1) == evidence.adversarial_runtime).all()
    forge(evidence, lambda e, _: (moved(e, clean, far), far))
    with pytest.raises(IntegrityError, match="does not end as it did"):
        recheck(copied.bundle, copied.request, copied.collect(DEEPFOOL), 20)


@pytest.mark.parametrize("what", ["l2", "rho", "transferred", "image", "reference"])
def test_a_row_that_its_image_contradicts_is_named(copied: Measured, what: str) -> None:
    pair = copied.collect().pairs[0]
    row = int(np.flatnonzero(pair.runtime.status == "fooled")[2])

    def one(e: Evidence, images: Images) -> tuple[list[Sample], Images]:
        samples = samples_of(e)
        s = samples[row]
        assert s.l2 is not None and s.rho is not None and s.transferred is not None
        changed = {
            "l2": {"l2": s.l2 * 1.1},
            "rho": {"rho": s.rho * 2},
            "transferred": {"transferred": (s.transferred + 1) % 10},
            "reference": {"adversarial": (s.adversarial[0], s.label)},
        }
        samples[row] = msgspec.structs.replace(s, **changed.get(what, {}))
        if what == "image":
            images[row] = images[row - 1]
        return samples, images

    forge(pair.runtime, one)
    with pytest.raises(IntegrityError, match=rf"image {pair.runtime.index[row]} "):
        recheck(copied.bundle, copied.request, copied.collect(), "all")


# Stages


def test_an_audit_is_the_union_of_its_stages(honest: Measured) -> None:
    data, request = honest.data, honest.request
    pair = honest.collect(AUDIT).pairs[0]
    for target, evidence, reference in (
        (REFERENCE, pair.reference, None),
        (ONNX, pair.runtime, pair.reference),
    ):
        clean = data.images(evidence.index)
        fooling = {}
        with AttackSession(honest.bundle, request.options) as session:
            runtime = session.runtime(target)
            for stage in STAGES[:3]:
                job = AttackJob(stage, target, "native")
                _, images = attack(
                    session, job, data, evidence.index, positions=np.arange(N), seed=0
                )
                linf, _ = distances(clean, images)
                changed = runtime.logits(images).argmax(axis=1) != evidence.label
                fooling[stage.name] = changed & (linf <= EPSILON + 1e-6)
            fooling["pgd"][20:] = False
            fooling["transfer"] = np.zeros(N, dtype=bool)
            if reference is not None:
                transferred = runtime.logits(reference.adversarial(np.arange(N))).argmax(axis=1)
                np.testing.assert_array_equal(evidence.transferred, transferred)
                fooling["transfer"] = transferred != evidence.label
            kept = runtime.logits(evidence.adversarial(np.arange(N))).argmax(axis=1)

        expected = np.full(N, "", dtype="<U8")
        for name in reversed(fooling):
            expected[fooling[name]] = name
        np.testing.assert_array_equal(evidence.stage, expected)
        np.testing.assert_array_equal(evidence.status == "fooled", expected != "")
        np.testing.assert_array_equal(evidence.status == "held", expected == "")
        assert {"fgsm", "pgd", ""} <= set(expected)
        np.testing.assert_array_equal(kept, evidence.adversarial_runtime)
        linf, _ = distances(clean, evidence.adversarial(np.arange(N)))
        assert (linf <= EPSILON + 1e-6).all()

        asked = evidence.stage_queries[:, :, 0] > 0
        later = expected != "fgsm"
        assert asked[:, 0].all()
        np.testing.assert_array_equal(asked[:, 1], later & (np.arange(N) < 20))
        np.testing.assert_array_equal(asked[:, 2], later & (expected != "pgd"))
        last = (expected == "") | (expected == "transfer")
        np.testing.assert_array_equal(asked[:, 3], last & (reference is not None))
        np.testing.assert_array_equal(evidence.stage_queries.sum(axis=1)[:, 0], evidence.forward)


def staged(
    honest: Measured, monkeypatch: pytest.MonkeyPatch, returned: dict[str, float]
) -> tuple[list[Sample], Images]:
    """Run stages that return the clean image, moved by so much."""

    def perform(  # type: ignore[no-untyped-def]
        spec, model, images, labels, seeds
    ):
        return images + np.float32(returned[spec.name])

    monkeypatch.setattr("ccn_deploy.attacks.perform.perform", perform)
    spec = replace(AUDIT, stages=STAGES[:3])
    index = honest.data.order(0)[:4]
    with AttackSession(honest.bundle, honest.request.options) as session:
        job = AttackJob(spec, ONNX, "native")
        return attack(session, job, honest.data, index, positions=np.arange(4), seed=0)


def test_a_stage_that_returns_rubbish_leaves_the_image_to_the_next(
    honest: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = honest.data.images(honest.data.order(0)[:4])
    for returned, status, kept in (
        ({"fgsm": np.nan, "pgd": np.nan, "deepfool": np.nan}, "invalid", None),
        ({"fgsm": np.nan, "pgd": 0.001, "deepfool": np.nan}, "held", 0.001),
        ({"fgsm": 0.001, "pgd": 0.002, "deepfool": 2.0}, "held", 0.001),
        # Nothing within the bound was shown.
        ({"fgsm": np.nan, "pgd": 2.0, "deepfool": 0.05}, "invalid", None),
    ):
        samples, images = staged(honest, monkeypatch, returned)
        assert {s.status for s in samples} == {status}
        assert all(s.stage is None for s in samples)
        if kept is None:
            assert np.isnan(images).all() and all(s.l2 is None for s in samples)
        else:
            np.testing.assert_allclose(images, clean + np.float32(kept))


# Rows against themselves


RIGHT = {
    "index": 0, "label": 1, "clean": (1, 1), "adversarial": (0, 0), "status": "fooled",
    "linf": 0.1, "l2": 0.3, "rho": 0.25, "queries": (3, 2), "transferred": 0,
}  # fmt: skip
PLAIN = AttackJob(AttackSpec("pgd", "linf", 0.1), ONNX, "native")
SMALLEST = AttackJob(AttackSpec("deepfool", "l2"), ONNX, "native")
OWN = AttackJob(PLAIN.spec, REFERENCE, "native")
IN_STAGES = AttackJob(
    AttackSpec(
        "audit", "linf", 0.1, stages=(*STAGES[:1], replace(STAGES[1], part=0), *STAGES[2:])
    ),
    ONNX,
    "native",
)  # fmt: skip
STAGED = {"stage": "deepfool", "stages": ((1, 1), (0, 0), (2, 1), (0, 0))}
HELD = {"status": "held", "adversarial": (1, 1), "rho": None}
WRONG = {"status": "already-wrong", "clean": (2, 1), "linf": None, "l2": None, "rho": None}
UNTOUCHED = {"adversarial": (None, None), "queries": (0, 0)}
INVALID = {
    "status": "invalid", "adversarial": (None, None), "linf": None, "l2": None, "rho": None
}  # fmt: skip


def checked(job: AttackJob, fields: dict[str, object], second: dict[str, object]) -> None:
    images = np.full((2, 1, 4, 4), 0.5, np.float32)
    data = dataset_from_arrays("two", images, np.array([1, 1]), ["a", "b", "c"])
    first, other = data.order(0)
    rows = [{**RIGHT, "index": int(first), **fields}, {**RIGHT, "index": int(other), **second}]
    check_rows(Evidence.of([Sample(**row) for row in rows]), job, data, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "fields"),
    [
        (PLAIN, {}),
        (PLAIN, HELD),
        (PLAIN, INVALID),
        (PLAIN, {**INVALID, "linf": 0.9, "l2": 1.0}),
        (PLAIN, {**WRONG, **UNTOUCHED}),
        (PLAIN, {"adversarial": (None, 1)}),  # logits that are not finite are no label kept
        (SMALLEST, {**WRONG, "linf": 0.1, "l2": 0.3, "rho": 0.25}),
        (SMALLEST, {"linf": 1.0, "l2": 4.0, "rho": 1.0}),
        (OWN, {"transferred": None}),
        (IN_STAGES, STAGED),
        (IN_STAGES, {**STAGED, "stage": "transfer", "stages": ((1, 1), (0, 0), (1, 1), (1, 0))}),
        (IN_STAGES, {**HELD, "stages": ((1, 1), (0, 0), (1, 1), (1, 0))}),
        (IN_STAGES, {**WRONG, **UNTOUCHED, "stages": ((0, 0),) * 4}),
    ],
)
def test_rows_that_can_be_are_taken(job: AttackJob, fields: dict[str, object]) -> None:
    other = STAGED if job is IN_STAGES else {"transferred": None} if job is OWN else {}
    checked(job, fields, other)
    checked(job, other, fields)


@pytest.mark.parametrize(
    ("job", "fields"),
    [
        (PLAIN, {"index": "the other's"}),
        (PLAIN, {"label": 2, "clean": (2, 2)}),
        (PLAIN, {"clean": (1, 3)}),
        (PLAIN, {"transferred": 3}),
        (PLAIN, {"status": "held"}),  # its label changed
        (PLAIN, {**HELD, "status": "fooled"}),
        (PLAIN, {**HELD, "rho": 0.25}),
        (PLAIN, {"adversarial": (1, 0)}),
        (PLAIN, {"rho": None}),
        (PLAIN, {"l2": None}),
        (PLAIN, {"linf": None, "l2": None}),
        (PLAIN, {"linf": 0.9, "l2": 1.5}),
        (PLAIN, {"linf": 0.1, "l2": 0.05}),
        (PLAIN, {"rho": 0.05}),  # no image is that long
        (PLAIN, {"linf": 0.1, "l2": 0.41}),
        (PLAIN, {"queries": (0, 0)}),
        (PLAIN, {**HELD, "queries": (0, 5)}),
        (PLAIN, {"status": "already-wrong"}),
        (PLAIN, {**WRONG, "status": "held", **UNTOUCHED}),
        (PLAIN, {**WRONG, "adversarial": (None, None)}),  # queries
        (PLAIN, {**WRONG, **UNTOUCHED, "linf": 0.1, "l2": 0.3}),
        (PLAIN, {**INVALID, "adversarial": (1, None)}),
        (PLAIN, {"stage": "deepfool"}),
        (PLAIN, {"stages": ((3, 2),)}),
        (SMALLEST, {"linf": 1.5, "l2": 4.0, "rho": 1.0}),
        (OWN, {}),
        (OWN, {"transferred": None, "adversarial": (0, 2)}),
        (OWN, {"transferred": None, "clean": (1, 2)}),
        (IN_STAGES, {}),
        (IN_STAGES, {**STAGED, "stage": None}),
        (IN_STAGES, {**STAGED, "stage": "cw"}),
        (IN_STAGES, {**STAGED, **HELD}),
        (IN_STAGES, {**STAGED, "queries": (4, 2)}),
        (IN_STAGES, {**STAGED, "stages": ((3, 2), (0, 0), (0, 0), (0, 0))}),
        (IN_STAGES, {**STAGED, "stages": ((1, 1), (0, 0), (1, 1), (1, 0))}),
        (IN_STAGES, {**STAGED, "stages": ((1, 1), (1, 0), (1, 1), (0, 0))}),
        (IN_STAGES, {**STAGED, "stages": ((0, 0), (0, 0), (3, 2), (0, 0))}),
        (IN_STAGES, {**STAGED, "stages": ((1, 1), (2, 1))}),
        (IN_STAGES, {**HELD, "stages": ((1, 1), (0, 0), (2, 1), (0, 0))}),  # transferred
        (
            IN_STAGES,
            {
                "stage": "transfer",
                "stages": ((1, 1), (0, 0), (1, 1), (1, 0)),
                "transferred": 2,
            },
        ),
    ],
)
def test_a_row_that_cannot_be_is_named(job: AttackJob, fields: dict[str, object]) -> None:
    other: dict[str, object] = {}
    if job is IN_STAGES:
        other = dict(STAGED)
    elif job is OWN:
        other = {"transferred": None}
    order = dataset_from_arrays(
        "two", np.full((2, 1, 4, 4), 0.5, np.float32), np.array([1, 1]), ["a", "b", "c"]
    ).order(0)
    if "index" in fields:
        fields = {"index": int(order[0])}
    with pytest.raises(
        IntegrityError, match=rf"image {order[1] if 'index' not in fields else order[0]} "
    ):
        checked(job, other, fields)


def test_no_label_stands_for_none() -> None:
    assert Evidence.of([Sample(**{**RIGHT, "transferred": None})]).transferred == NO_LABEL  # type: ignore[arg-type]
