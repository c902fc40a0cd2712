"""Comparing gradients: what ties may move, what kinks may change, and what neither excuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.parity.evidence import ParityEvidence
from ccn_deploy.parity.gradients import (
    CANDIDATES,
    GradientEvidence,
    GradientProbe,
    KinkRow,
    make_cotangents,
    measure_gradients,
    untied,
)
from ccn_deploy.parity.judge import LEAST_NEAR, MAX_NEAR, ParityResult, judge
from ccn_deploy.parity.kinks import measure_shifts
from ccn_deploy.parity.tolerances import tolerance_for
from ccn_deploy.verdict import Verdict
from tests.networks import random_graph, random_network
from tests.test_gradient_graph import autograd, even_handed, noise, slopes, tied_images

POLICY = tolerance_for("fp32")
ALLOWED = POLICY.max_gradient
SETTING = {"runtime": {"name": "made-up", "precision": "fp32", "versions": {}}}


# Ties


@settings(deadline=None, max_examples=30)
@given(colours=st.integers(1, 5), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_untied_is_the_projection_onto_directions_of_one_change_a_colour(
    colours: int, channels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    palette = rng.random((colours, channels)).astype(np.float32)
    chosen = rng.integers(0, colours, (1, 4, 5))
    images = palette[chosen].transpose(0, 3, 1, 2)
    gradients = rng.standard_normal((1, 2, channels, 4, 5))
    basis = []  # orthonormal, one vector a colour and channel, by the definition
    for index in np.unique(chosen):
        for channel in range(channels):
            vector = np.zeros((channels, 4, 5))
            vector[channel] = chosen[0] == index
            basis.append(vector.ravel() / np.linalg.norm(vector))
    wanted = gradients.reshape(2, -1) @ np.array(basis).T
    got = untied(gradients, images)[0]
    assert np.linalg.norm(got, axis=1) == pytest.approx(np.linalg.norm(wanted, axis=1))
    assert np.sort(got[got != 0.0]) == pytest.approx(np.sort(wanted.ravel()))


def test_without_equal_pixels_nothing_is_taken_away() -> None:
    images, gradients = noise(2), np.random.default_rng(0).standard_normal((2, 3, 1, 28, 28))
    got = untied(gradients, images)
    assert np.sort(got, axis=2) == pytest.approx(np.sort(gradients.reshape(2, 3, -1), axis=2))


@pytest.mark.parametrize("defense", ["sm", "brelu", "ccn"])
def test_two_ways_of_breaking_ties_differ_and_agree_once_untied(defense: str) -> None:
    """Rounding by place breaks ties, as PyTorch's float64 convolution does on some processors."""
    model = random_network("mnist-cnn", defense).double()
    images, cotangents = tied_images(), slopes(5, 2)
    rounding = 1e-13 * torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0))
    rounded = autograd(lambda x: even_handed(model, x + rounding), images, cotangents)
    by_hand = autograd(lambda x: even_handed(model, x), images, cotangents)
    scale = np.abs(by_hand).max()
    assert np.abs(rounded - by_hand)[:3].max() > 0.1 * scale  # constant images
    assert np.abs(untied(rounded, images) - untied(by_hand, images)).max() < 1e-9 * scale


# Kinks


def shifts(model: GraphModule, images: NDArray[np.float32]) -> NDArray[np.float64]:
    cotangents = slopes(len(images), 1, model.graph.classes)
    truth = autograd(model, images, cotangents)
    return measure_shifts(model, images, cotangents, truth, POLICY).largest


@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_ties_are_no_kinks(defense: str) -> None:
    assert (shifts(random_graph("mnist-cnn", defense), tied_images()[:3]) < ALLOWED).all()


def unit(distance: float, weight: float = 1.0) -> GraphModule:
    """One active and one all but dead unit behind a pool whose two candidates are as close."""
    builder = GraphBuilder()
    first = np.array([[1, 1, -1, -1], [1, 1, 1, 1]], dtype=np.float32)
    second = np.array([[weight, 0.5], [-weight, 0.7]], dtype=np.float32)
    builder.node("Flatten", ["images"], "flatten", axis=1)
    for name, x, y, value, bias in (
        ("fc1", "flatten", "fc1", first, [distance, 0]),
        ("fc2", "act1", "logits", second, [0, 0]),
    ):
        constants = (f"{name}.weight", value), (f"{name}.bias", np.array(bias, dtype=np.float32))
        names = [builder.constant(*constant) for constant in constants]
        builder.node("Gemm", [x, *names], name, output=y, transB=1)
        if name == "fc1":
            builder.node("Relu", ["fc1"], "act1")
    shapes = {"images": ["batch", 1, 2, 2]}, {"logits": ["batch", 2]}
    return GraphModule(Graph(builder.model("unit", *shapes)), torch.float64)


@pytest.mark.parametrize(
    ("distance", "near"), [(0.0, True), (3e-8, True), (-1e-7, True), (1e-4, False), (-0.1, False)]
)
def test_an_activation_within_rounding_of_its_bend_is_a_kink(distance: float, near: bool) -> None:
    image = np.array([0.3, 0.7, 0.6, 0.4], dtype=np.float32).reshape(1, 1, 2, 2)
    (shift,) = shifts(unit(distance), image)  # 0.3 + 0.7 - 0.6 - 0.4 is 0 to within rounding
    assert (shift > 0.1) == near
    assert near or shift < ALLOWED


def test_a_kink_of_a_unit_on_which_nothing_depends_is_none() -> None:
    model = unit(0.0, weight=0.0)
    image = np.array([0.3, 0.7, 0.6, 0.4], dtype=np.float32).reshape(1, 1, 2, 2)
    assert shifts(model, image)[0] < ALLOWED


def test_a_kink_of_opposite_logits_is_found_though_a_random_row_is_nearly_their_sum() -> None:
    """The unit near its bend pulls the two logits apart and leaves their sum as it is."""
    model = unit(3e-8)
    image = np.array([0.3, 0.7, 0.6, 0.4], dtype=np.float32).reshape(1, 1, 2, 2)
    rows = np.array([[[1, -1], [1, 1.00001]]], dtype=np.float32)  # of five
    truth = autograd(model, image, rows)
    random, both = (
        measure_shifts(model, image, rows[:, used], truth[:, used], POLICY).largest[0]
        for used in ([1], [0, 1])
    )
    assert random < ALLOWED
    assert both > 0.1


# The comparison


COUNT = 9
IMAGES = noise(COUNT, (1, 3, 3))
WEIGHTS = np.random.default_rng(0).standard_normal((4, 9))
Runtime = Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[np.ndarray, np.ndarray]]


def forward(images: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(images.reshape(len(images), -1).astype(np.float64) @ WEIGHTS.T)


def vjp(
    images: NDArray[np.float32], cotangents: NDArray[np.float32]
) -> tuple[np.ndarray, np.ndarray]:
    """The float64 gradients of the linear map."""
    gradients = (cotangents.astype(np.float64) @ WEIGHTS).reshape(*cotangents.shape[:2], 1, 3, 3)
    return forward(images), gradients


def result(run: Runtime, shifts: float | NDArray[np.float64] = 1e-6) -> ParityResult:
    cotangents = make_cotangents(forward(IMAGES), 0)
    probe = GradientProbe(
        kind="clean",
        images=IMAGES,
        cotangents=cotangents,
        truth=vjp(IMAGES, cotangents)[1],
        shifts=np.broadcast_to(shifts, COUNT).astype(np.float64),
        typical=np.broadcast_to(shifts, COUNT).astype(np.float64),
        unit=1e-3,
        scale=float(np.abs(forward(IMAGES)).max()),
    )
    rows, ratios = measure_gradients(run, forward, probe, allowed=ALLOWED)
    gradients = GradientEvidence(tuple(rows), KinkRow.of(ratios))
    return judge(ParityEvidence(SETTING, (), (), gradients))


def verdicts(judged: ParityResult) -> list[bool]:
    assert judged.gradients is not None
    return [not finding.reasons for finding in judged.gradients]


SCALE = float(np.abs(vjp(IMAGES, make_cotangents(forward(IMAGES), 0))[1]).max())


def test_cotangents_are_one_hot_their_difference_and_random() -> None:
    logits = np.array([[1.0, 5.0, 3.0], [0.0, 0.0, 0.0]])
    found = make_cotangents(logits, 0)
    assert found.shape == (2, CANDIDATES, 3) and found.dtype == np.float32
    assert found[0, :3].tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, -1]]
    assert np.array_equal(found, make_cotangents(logits, 0))
    assert not np.array_equal(found[:, 3:], make_cotangents(logits, 1)[:, 3:])


def test_every_image_is_run_alone_with_one_candidate_and_together_with_all() -> None:
    asked: list[tuple[int, int]] = []

    def run(images: NDArray[np.float32], cotangents: NDArray[np.float32]) -> object:
        asked.append((len(images), cotangents.shape[1]))
        return vjp(images, cotangents)

    judged = result(run)  # type: ignore[arg-type]
    assert asked == [(1, 1)] * COUNT + [(COUNT, CANDIDATES)]
    assert judged.verdict is Verdict.PASS
    assert verdicts(judged) == [True, True]


@pytest.mark.parametrize(("factor", "passes"), [(0.99, True), (1.01, False)])
class TestTheBoundIsWhereThePolicySays:
    def off_by(self, error: float) -> Runtime:
        def run(images: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, gradients = vjp(images, cotangents)
            gradients[0, 0, 0, 0, 0] += error
            return logits, gradients

        return run

    def test_of_the_largest_slope(self, factor: float, passes: bool) -> None:
        judged = result(self.off_by(factor * ALLOWED * SCALE), shifts=0.9 * ALLOWED)
        assert verdicts(judged) == [passes, passes]

    def test_in_what_rounding_made(self, factor: float, passes: bool) -> None:
        shift = 1e-7
        judged = result(self.off_by(factor * POLICY.max_units * shift * SCALE), shifts=shift)
        assert verdicts(judged) == [passes, passes]

    def test_of_the_median_near_kinks(self, factor: float, passes: bool) -> None:
        def run(images: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, gradients = vjp(images, cotangents)
            gradients[..., 0, 0] += factor * MAX_NEAR * 0.3 * SCALE
            return logits, gradients

        judged = result(run, shifts=0.3)
        assert judged.kinks is not None
        assert judged.kinks.row.n == COUNT
        assert (judged.kinks.verdict is Verdict.PASS) == passes
        assert verdicts(judged) == [True, True]  # no image is left for them


def test_a_gradient_of_another_direction_fails_however_short_it_is() -> None:
    """Every fifth row is too short for its error to show in the scale; its direction does."""
    truth = make_cotangents(forward(IMAGES), 0)
    truth[:, 4] *= 2e-2
    probe = GradientProbe(
        "clean", IMAGES, truth, vjp(IMAGES, truth)[1], np.full(COUNT, 0.9e-4), np.zeros(COUNT), 1, 1
    )

    def run(images: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, gradients = vjp(images, cotangents)
        gradients[:, 4:] *= -1.0
        return logits, gradients

    rows, _ = measure_gradients(run, forward, probe, allowed=ALLOWED)
    assert rows[1].slopes.cosine == pytest.approx(-1.0)


def test_what_kinks_excuse_is_one_image_and_not_most() -> None:
    near = np.full(COUNT, 1e-6)
    near[:LEAST_NEAR] = 0.05

    def wrong(images: int) -> Runtime:
        def run(x: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, gradients = vjp(x, cotangents)
            if len(x) > 1:
                gradients[:images] *= -1.0
            return logits, gradients

        return run

    assert result(wrong(1), near).verdict is Verdict.PASS
    assert result(wrong(LEAST_NEAR), near).verdict is Verdict.FAIL


def test_if_no_gradient_could_be_judged_that_is_said() -> None:
    row = KinkRow.of([0.1] * (LEAST_NEAR - 1))
    judged = result(vjp, shifts=0.1)
    evidence = judged.evidence.gradients
    assert evidence is not None and judged.verdict is Verdict.PASS
    few = replace(judged.evidence, gradients=replace(evidence, kinks=row))
    assert judge(few).verdict is Verdict.INCONCLUSIVE


def test_other_logits_than_the_forward_graphs_fail() -> None:
    def run(images: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, gradients = vjp(images, cotangents)
        return logits + 1e-2, gradients

    judged = result(run)
    assert judged.gradients is not None
    assert all("logits beside" in f.reasons[0] for f in judged.gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shift", [1e-6, 0.1])
def test_a_slope_that_is_not_finite_fails_near_kinks_too(
    bad: float, shift: float, tmp_path: Path
) -> None:
    def run(images: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, gradients = vjp(images, cotangents)
        gradients[-1, -1, 0, 2, 2] = bad
        return logits, gradients

    judged = result(run, shifts=shift)
    assert judged.verdict is Verdict.FAIL
    json.dumps(judged.document(), allow_nan=False)
    judged.evidence.write(tmp_path / "evidence.json")
    assert judge(ParityEvidence.read(tmp_path / "evidence.json", judged.evidence.setting)) == judged


def test_the_median_is_of_ratios_that_occurred() -> None:
    assert KinkRow.of([]) == KinkRow(0, 0.0, 0.0)
    assert KinkRow.of([3.0, 1.0, math.inf, 2.0]) == KinkRow(4, 2.0, math.inf)
