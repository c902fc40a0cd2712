"""No fake passes, and nothing honest is undermined.

The fakes are of one briefly trained network each; what a finding rests on is measured, not made
up. Findings that rest on rows alone are checked on rows made by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_changed
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from ccn_deploy.attacks import suite
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import Dataset, dataset_from_arrays, load_dataset
from ccn_deploy.errors import IntegrityError
from ccn_deploy.robustness import Pair, RobustnessRequest, RobustnessResult, collect, judge
from ccn_deploy.robustness.diagnostics import DataFacts, Diagnostics, Held, Planted, Slopes
from ccn_deploy.robustness.sanity import SanityFinding, sanity_findings
from ccn_deploy.runtimes import RuntimeOptions
from ccn_deploy.statistics import sign_test
from ccn_deploy.verdict import Verdict
from tests import fakes
from tests.faults import drop_delta
from tests.test_robustness_judge import bounded, measured

SAMPLES = 60
TEST = load_dataset("mnist5k", "test")


def looked_at(
    bundle: Bundle, dataset: Dataset = TEST, *names: str, epsilon: float = 0.2, **more: object
) -> tuple[RobustnessResult, list[SanityFinding]]:
    request = RobustnessRequest(
        dataset,
        attacks=suite(names or ("fgsm", "pgd"), [epsilon]),
        samples=SAMPLES,
        options=RuntimeOptions(threads=1),
        **more,  # type: ignore[arg-type]
    )
    measurement = collect(bundle, request)
    result = judge(measurement, max_drop=0.05)
    return result, sanity_findings(
        measurement, result.clean, result.bounded, result.minimal, result.max_drop
    )


def undermining(found: list[SanityFinding]) -> set[str]:
    return {finding.code for finding in found if finding.undermines}


# Honest


@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_nothing_undermines_an_honest_network(
    copy_bundle: Callable[[str], Bundle], defense: str
) -> None:
    bundle = copy_bundle(defense)
    assert undermining(looked_at(bundle)[1]) == set()
    assert undermining(looked_at(bundle, TEST, "fgsm", gradient="reference")[1]) == set()
    assert undermining(looked_at(bundle, TEST, "fgsm", runtime="torch")[1]) == set()


# Fakes: each must not pass, and say why


GRADIENTS: dict[str, tuple[Callable[[Bundle, Path], Bundle], set[str]]] = {
    "true near the images that are looked at": (
        lambda bundle, path: fakes.zero_far_from(bundle, path, TEST.images(TEST.order(0)[:64])),
        {"no-legal-image", "zero-gradients", "planted-not-found", "transfer-below-native"},
    ),
    "signs of their own": (
        fakes.random_signs,
        {"gain", "gradients-disagree", "transfer-below-native", "planted-not-found"},
    ),
    "NaN": (lambda bundle, path: fakes.times(bundle, path, np.nan), {"zero-gradients"}),
    "zero": (
        lambda bundle, path: fakes.times(bundle, path, 0.0),
        {"zero-gradients", "large-epsilon-not-chance"},
    ),
    "far too short": (
        lambda bundle, path: fakes.times(bundle, path, 1e-12),
        {"gradients-disagree"},
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_mislead(sm_bundle: Bundle, tmp_path: Path, name: str) -> None:
    make, expected = GRADIENTS[name]
    attacks = ("pgd",) if name.startswith("true near") else ("fgsm",)
    _, found = looked_at(make(sm_bundle, tmp_path / "fake"), TEST, *attacks)
    assert expected <= undermining(found)


def test_a_network_that_is_blind_in_a_band_of_strengths(sm_bundle: Bundle, tmp_path: Path) -> None:
    _, found = looked_at(fakes.zero_in_band(sm_bundle, tmp_path / "fake"), TEST, "pgd", epsilon=0.4)
    codes = {"no-legal-image", "larger-epsilon-weaker", "transfer-below-native"}
    assert codes <= undermining(found)


@pytest.mark.parametrize("factor", [100.0, 1e4])
def test_logits_so_large_that_the_softmax_is_blind(
    sm_bundle: Bundle, tmp_path: Path, factor: float
) -> None:
    _, found = looked_at(fakes.scaled(sm_bundle, tmp_path / "fake", factor), TEST, "fgsm")
    assert "saturated-logits" in undermining(found)
    assert not {"gain", "gradients-disagree"} & undermining(found)  # both sides are as blind


def test_slopes_that_are_rounded_away(sm_bundle: Bundle, tmp_path: Path) -> None:
    _, found = looked_at(fakes.in_steps(sm_bundle, tmp_path / "fake"), TEST, "fgsm")
    assert {"zero-gradients", "planted-not-found"} <= undermining(found)


def test_a_graph_that_draws_numbers_is_not_measured(sm_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="draws random numbers"):
        looked_at(fakes.noisy(sm_bundle, tmp_path / "fake"), TEST, "fgsm")


def test_random_weights_under_a_good_card(tmp_path: Path) -> None:
    result, found = looked_at(fakes.untrained(tmp_path / "fake"), TEST, "fgsm")
    assert {"reference-accuracy", "chance-accuracy"} <= undermining(found)
    assert result.verdict is not Verdict.FAIL  # the two agree


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", set()),
        ("shifted", {"reference-accuracy", "chance-accuracy"}),
        ("inverted", {"reference-accuracy"}),
        ("transposed", {"reference-accuracy"}),
        ("repeated", {"duplicates-in-data"}),
        ("trained", {"training-data-overlap"}),
    ],
)
def test_data_that_say_nothing(sm_bundle: Bundle, change: str, expected: set[str]) -> None:
    _, found = looked_at(sm_bundle, fakes.digits(change, 100), "fgsm")
    found_codes = undermining(found)
    assert expected <= found_codes
    assert found_codes <= expected | {"chance-accuracy", "nothing-right"}


def test_the_training_split_is_told(sm_bundle: Bundle) -> None:
    _, found = looked_at(sm_bundle, load_dataset("mnist5k", "train"), "fgsm")
    assert undermining(found) == {"training-data-overlap"}


def test_logits_that_are_not_finite_stop_nothing(ccn_bundle: Bundle, tmp_path: Path) -> None:
    broken = drop_delta(ccn_bundle, tmp_path / "broken")
    gray = np.full((4, 1, 28, 28), 128, np.uint8)
    dataset = dataset_from_arrays("gray", gray, np.arange(4), TEST.class_names)
    _, found = looked_at(broken, dataset, "fgsm")
    assert "nothing-right" in undermining(found)


# Kept


def test_what_was_seen_is_kept_and_read_back(sm_bundle: Bundle) -> None:
    first, _ = looked_at(sm_bundle, TEST, "fgsm")
    (path,) = sm_bundle.evidence.rglob("diagnostics-*.json")
    before = path.stat().st_mtime_ns
    again, _ = looked_at(sm_bundle, TEST, "fgsm")
    assert again.measurement.diagnostics == first.measurement.diagnostics
    assert path.stat().st_mtime_ns == before


def test_a_changed_file_is_an_integrity_error(tmp_path: Path) -> None:
    path, setting = tmp_path / "a.json", {"seed": 0}
    HONEST.write(path, setting)
    assert Diagnostics.read(path, setting) == HONEST
    with pytest.raises(IntegrityError, match="another setting"):
        Diagnostics.read(path, {"seed": 1})
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(IntegrityError):
            Diagnostics.read(path, setting)


# Rows made by hand


def of_rows(
    *pairs: Pair, max_drop: float = 0.01, gradient: str = "native"
) -> dict[str, SanityFinding]:
    measurement = with_changed(measured(*pairs), gradient=gradient)  # type: ignore[arg-type]
    result = judge(measurement, max_drop)
    found = sanity_findings(
        measurement, result.clean, result.bounded, result.minimal, result.max_drop
    )
    return {finding.code: finding for finding in found}


def test_the_sign_test_is_the_binomial() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(7, 0) == pytest.approx(2**-7)
    assert sign_test(2, 1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("gained", "lost", "max_drop", "expected"),
    [(7, 0, 0.01, True), (6, 0, 0.01, False), (20, 15, 0.01, False), (7, 0, 0.05, False)],
)
def test_a_gain_is_as_suspicious_as_a_loss(
    gained: int, lost: int, max_drop: float, expected: bool
) -> None:
    rest = 200 - gained - lost
    pair = bounded("f" * gained + "h" * (lost + rest), "h" * gained + "f" * lost + "h" * rest)
    found = of_rows(pair, max_drop=max_drop)
    assert ("gain" in found) is expected
    if expected:
        assert found["gain"].undermines
        assert found["gain"].figures["gain"] == pytest.approx((gained - lost) / 200)
    assert "gain" not in of_rows(pair, max_drop=max_drop, gradient="reference")


def test_more_steps_and_larger_epsilons_that_leave_more() -> None:
    held, fallen = "h" * 100, "f" * 10 + "h" * 90
    found = of_rows(bounded(fallen, fallen, "fgsm"), bounded(held, held, "pgd"))
    assert found["more-steps-weaker"].undermines
    found = of_rows(bounded(fallen, fallen, "pgd", 0.1), bounded(held, held, "pgd", 0.2))
    assert found["larger-epsilon-weaker"].undermines
    found = of_rows(bounded(held, held, "pgd", 0.1), bounded(fallen, fallen, "pgd", 0.2))
    assert not {"larger-epsilon-weaker", "more-steps-weaker"} & found.keys()


def test_fgsm_alone_flatters_and_that_undermines_nothing() -> None:
    found = of_rows(bounded("h" * 50, "h" * 50, "fgsm"))
    assert not found["one-attack-only"].undermines
    found = of_rows(bounded("h" * 50, "h" * 50, "fgsm"), bounded("f" * 50, "f" * 50, "pgd"))
    assert not found["fgsm-above-apgd"].undermines


def test_an_image_that_is_no_legal_one_undermines() -> None:
    assert of_rows(bounded("h" * 50, "i" + "h" * 49))["no-legal-image"].undermines


HONEST = Diagnostics(
    epsilon=0.2,
    clean=Slopes(64, 0, 0, 0.1, 3.0),
    attacked=Slopes(32, 0, 0, 2.0, 4.0),
    native=None,
    saturated=0.0,
    gap_median=5.0,
    repeats=0.0,
    batches=1e-6,
    background=0.1,
    held=Held(*([(False,) * 32] * 7)),
    planted=Planted(16, 16),
    data=DataFacts(100, 100, 0, 0.97),
)


def left(usual: int, margin: int, scores: int) -> Held:
    """Of 32 images, how many PGD leaves, PGD on the margin does, and Square after PGD."""
    usual_, margin_, scores_ = ((True,) * n + (False,) * (32 - n) for n in (usual, margin, scores))
    return replace(HONEST.held, usual=usual_, margin=margin_, scores=scores_)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, None),
        ({"attacked": Slopes(32, 0, 0, 2.0, 1e6)}, "exploding-gradients"),
        ({"planted": Planted(16, 9)}, "planted-not-found"),
        ({"planted": Planted(0, 0)}, None),
        ({"held": left(4, 0, 4)}, "margin-below-cross-entropy"),
        ({"held": left(3, 0, 3)}, None),
        ({"held": left(4, 4, 0)}, "black-box-below-white-box"),
        ({"held": left(2, 2, 0)}, None),
        ({"saturated": 0.4}, "saturated-logits"),
        ({"batches": 0.2}, "random-answers"),
        ({"data": DataFacts(100, 80, None, None)}, "duplicates-in-data"),
    ],
)
def test_a_look_at_the_target_is_judged(changed: dict[str, object], code: str | None) -> None:
    pair = bounded("h" * 100, "h" * 100)
    measurement = with_changed(measured(pair), diagnostics=replace(HONEST, **changed))
    result = judge(measurement)
    found = sanity_findings(measurement, result.clean, result.bounded, result.minimal, 0.01)
    assert undermining(found) - {"chance-accuracy"} == ({code} if code else set())
