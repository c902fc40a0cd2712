from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.data import Images
from ccn_deploy.errors import IntegrityError, UsageError
from ccn_deploy.parity.collect import measure_inputs
from ccn_deploy.parity.comparison import compare_logits
from ccn_deploy.parity.evidence import InputRow, LayerRow, ParityEvidence
from ccn_deploy.parity.inputs import Probe
from ccn_deploy.parity.invariance import Claim, batch_sizes, measure_invariance
from ccn_deploy.parity.judge import ParityResult, judge
from ccn_deploy.parity.tolerances import tolerance_for
from ccn_deploy.verdict import Verdict

POLICY = tolerance_for("fp32")
SETTING = {"runtime": {"name": "made-up", "precision": "fp32", "versions": {}}}
SAMPLES = 16
WEIGHTS = np.random.default_rng(0).standard_normal((4, 5))
IMAGES = np.random.default_rng(1).random((SAMPLES, 1, 2, 2), dtype=np.float32)


def reference(images: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(images.reshape(len(images), -1).astype(np.float64) @ WEIGHTS)


def evidence(error: float, *, unit: float) -> ParityEvidence:
    """A float64 runtime whose every logit is off by the same amount, up and down in turn."""

    def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
        return reference(images) + error * np.array([1, -1, 1, -1, 1])

    probe = Probe("clean", IMAGES)
    rows = measure_inputs(run, probe, reference(IMAGES), unit=unit, samples=SAMPLES)
    return ParityEvidence(SETTING, tuple(rows), ())


SCALE = float(np.abs(reference(IMAGES)).max())


@pytest.mark.parametrize(("factor", "verdict"), [(0.99, Verdict.PASS), (1.01, Verdict.FAIL)])
class TestTheBoundIsWhereThePolicySays:
    def test_of_the_scale(self, factor: float, verdict: Verdict) -> None:
        allowed = POLICY.max_relative * SCALE
        result = judge(evidence(factor * allowed, unit=allowed / 2))
        assert result.verdict is verdict
        assert [f.verdict for f in result.inputs] == [verdict] * 3

    def test_what_rounding_explains_wholly_is_no_fault(
        self, factor: float, verdict: Verdict
    ) -> None:
        """As where logits cancel: one unit is more than the policy's part of the scale."""
        unit = 3 * POLICY.max_relative * SCALE
        assert judge(evidence(factor * unit, unit=unit)).verdict is verdict

    def test_in_units_of_rounding(self, factor: float, verdict: Verdict) -> None:
        unit = 1e-9 * SCALE
        assert judge(evidence(factor * POLICY.max_units * unit, unit=unit)).verdict is verdict

    def test_for_a_flip(self, factor: float, verdict: Verdict) -> None:
        """The margin may be up to the stated error, not more."""
        stated = POLICY.stated_error(1.0)
        expected = np.array([[1.0, 1.0 - factor * stated]])
        found = expected.copy()
        found[0, 1] = 1.0 + 1e-9
        deviation = compare_logits(found, expected, scale=1.0, unit=1.0)
        (finding,) = judge(ParityEvidence(SETTING, (InputRow("clean", 1, deviation),), ())).inputs
        assert deviation.argmax_flips == 1
        assert any("flip" in reason for reason in finding.reasons) == (verdict is Verdict.FAIL)


def test_batches_are_one_an_odd_number_and_all() -> None:
    seen: list[int] = []

    def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
        seen.append(len(images))
        return reference(images)

    probe = Probe("clean", IMAGES)
    rows = measure_inputs(run, probe, reference(IMAGES), unit=1.0, samples=SAMPLES)
    assert [(row.batch, row.deviation.n) for row in rows] == [(1, 8), (7, 14), (16, 16)]
    assert seen == [1] * 8 + [7] * 2 + [16]


def invariant(run: Callable[[Images], NDArray[np.float64]]) -> ParityResult:
    sizes = batch_sizes(256, 48)
    claims = measure_invariance(run, IMAGES, reference(IMAGES), unit=1e-3, seed=0, sizes=sizes)
    return judge(ParityEvidence(SETTING, (), tuple(claims)))


def invariance(run: Callable[[Images], NDArray[np.float64]]) -> dict[str, Verdict]:
    return {finding.subject: finding.verdict for finding in invariant(run).invariance}


def test_sizes_are_what_programs_choose_kernels_by() -> None:
    assert batch_sizes(4, 2) == (2, 3, 4, 5)
    assert batch_sizes(20, 12) == (2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 19, 20, 21)
    sizes = batch_sizes(256, 48)
    assert {1 << exponent for exponent in range(1, 9)} | {47, 48, 49, 63, 255, 257} <= set(sizes)
    assert sizes[-1] == 257


class TestInvariance:
    def test_holds_for_a_function_of_the_image(self) -> None:
        assert set(invariance(reference).values()) == {Verdict.PASS}
        assert list(invariance(reference)) == [
            "alone", "duplicated", "permuted", "sizes", "neighbours", "deterministic"
        ]  # fmt: skip

    def test_rows_in_another_order_are_seen(self) -> None:
        found = invariance(lambda images: reference(images)[::-1])
        assert {name for name, verdict in found.items() if verdict is Verdict.PASS} == {
            "deterministic"
        }

    def test_an_answer_that_depends_on_the_company_is_seen(self) -> None:
        def normalised(images: NDArray[np.float32]) -> NDArray[np.float64]:
            return reference(images - images.mean(axis=0, keepdims=True))

        assert invariance(normalised)["neighbours"] is Verdict.FAIL

    def test_one_wrong_batch_size_is_seen(self) -> None:
        def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
            return reference(images) + 0.01 * (len(images) == 13)

        found = invariance(run)
        assert [name for name, verdict in found.items() if verdict is Verdict.FAIL] == ["sizes"]

    @pytest.mark.parametrize("size", [5, 47, 48, 64, 128, 255, 257])
    @pytest.mark.parametrize("by", [1, len(IMAGES)])
    def test_rows_that_move_at_one_batch_size_are_seen(self, size: int, by: int) -> None:
        def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
            return np.roll(reference(images), by * (len(images) == size), axis=0)

        failed = [f for f in invariant(run).invariance if f.verdict is Verdict.FAIL]
        assert [finding.name for finding in failed] == [f"sizes (batch of {size})"]

    def test_another_answer_after_a_large_batch_is_seen(self) -> None:
        largest = 0

        def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
            nonlocal largest
            largest = max(largest, len(images))
            return reference(images) + 1e-12 * (largest > 200)

        assert invariance(run)["deterministic"] is Verdict.FAIL

    def test_another_answer_once_in_thirty_calls_is_seen(self) -> None:
        calls = 0

        def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
            nonlocal calls
            calls += len(images) == 8
            return reference(images) + 1e-12 * (calls == 30)

        assert invariance(run)["deterministic"] is Verdict.FAIL

    def test_the_last_bit_may_depend_on_the_batch_and_not_on_the_run(self) -> None:
        calls = 0

        def run(images: NDArray[np.float32]) -> NDArray[np.float64]:
            nonlocal calls
            calls += 1
            return np.nextafter(reference(images), np.inf if calls % 2 else -np.inf)

        found = invariance(run)
        assert [name for name, verdict in found.items() if verdict is Verdict.FAIL] == [
            "deterministic"
        ]


def test_nothing_measured_is_inconclusive() -> None:
    assert judge(ParityEvidence(SETTING, (), ())).verdict is Verdict.INCONCLUSIVE


def test_nan_fails_and_the_document_stays_json() -> None:
    found = reference(IMAGES)
    found[3, 1] = np.nan
    deviation = compare_logits(found, reference(IMAGES), scale=SCALE, unit=1e-6)
    result = judge(ParityEvidence(SETTING, (InputRow("clean", 16, deviation),), ()))
    assert result.verdict is Verdict.FAIL
    (row,) = json.loads(json.dumps(result.document(), allow_nan=False))["inputs"]
    assert (row["max_abs"], row["relative"], row["nonfinite"]) == (None, None, 1)
    assert row["argmax_flips"] == 1


def test_the_first_layer_to_depart_is_the_first_in_the_network_not_the_worst() -> None:
    def row(layer: str, kind: str, error: float) -> LayerRow:
        values = np.ones((1, 4))
        deviation = compare_logits(values + error, values, scale=1.0, unit=1e-7)
        return LayerRow(layer, kind, deviation)

    rows = (
        row("conv1", "clean", 1e-8), row("conv1", "zero", 0.0),
        row("conv2", "clean", 1e-8), row("conv2", "zero", 1e-3),
        row("fc1", "clean", 1.0), row("fc1", "zero", 1.0),
    )  # fmt: skip
    result = judge(ParityEvidence(SETTING, (), (), layers=rows))
    assert result.first_departure is not None
    assert result.first_departure.name == "conv2 (zero)"
    assert result.document()["first_departure"] == "conv2"
    healthy = judge(ParityEvidence(SETTING, (), (), layers=rows[:3]))
    assert healthy.first_departure is None
    assert healthy.document()["first_departure"] is None


class TestEvidenceFile:
    def test_comes_back_as_it_was(self, tmp_path: Path) -> None:
        deviation = compare_logits(np.full((1, 2), np.inf), np.eye(1, 2), scale=1.0, unit=0.0)
        written = ParityEvidence(
            SETTING,
            (InputRow("zero", 7, deviation),),
            (Claim("alone", deviation, 2),),
            layers=(
                LayerRow("fc3", "one", compare_logits(np.eye(1, 2), np.eye(1, 2), scale=1, unit=1)),
            ),
        )
        written.write(tmp_path / "evidence.json")
        assert ParityEvidence.read(tmp_path / "evidence.json", SETTING) == written
        with pytest.raises(IntegrityError, match="another bundle or setting"):
            ParityEvidence.read(tmp_path / "evidence.json", {**SETTING, "bundle": "1" * 64})

    def test_any_flipped_byte_is_an_integrity_error(self, tmp_path: Path) -> None:
        path = tmp_path / "evidence.json"
        evidence(1e-9, unit=1e-9).write(path)
        healthy = path.read_bytes()
        for at in range(0, len(healthy), 7):
            path.write_bytes(healthy[:at] + bytes([healthy[at] ^ 1]) + healthy[at + 1 :])
            with pytest.raises(IntegrityError, match="--fresh"):
                ParityEvidence.read(path, SETTING)


def test_an_unknown_precision_names_those_known() -> None:
    with pytest.raises(UsageError, match="fp32"):
        tolerance_for("fp23")


def blank(kind: str, found: float) -> ParityEvidence:
    """Logits of a reference that gives nothing but 0."""
    deviation = compare_logits(
        np.full((3, 4), found), np.zeros((3, 4)), scale=0.0, unit=0.0, margins=np.zeros(3)
    )
    return ParityEvidence(SETTING, (InputRow(kind, 1, deviation),), ())


@pytest.mark.parametrize(
    ("kind", "found", "verdict", "words"),
    [
        ("clean", 0.0, Verdict.INCONCLUSIVE, "an untrained head"),
        ("zero", 0.0, Verdict.PASS, ""),  # as a network without biases answers a black image
        ("clean", 1e-9, Verdict.FAIL, "1e-09 where the reference gives nothing but 0"),
    ],
)
def test_logits_of_nothing_but_zero_are_said_to_be_so(
    kind: str, found: float, verdict: Verdict, words: str
) -> None:
    result = judge(blank(kind, found))
    assert result.verdict is verdict
    assert words in "".join(result.inputs[0].reasons)
    json.dumps(result.document(), allow_nan=False)
