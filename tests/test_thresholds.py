"""Absolute thresholds, against binomial tails by definition; and what users type of them."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest

from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.errors import UsageError
from ccn_deploy.robustness import Pair, judge
from ccn_deploy.robustness.non_inferiority import Proportion
from ccn_deploy.robustness.options import AttackOptions
from ccn_deploy.robustness.thresholds import (
    Threshold,
    ThresholdTest,
    parse_max_drop,
    parse_min_robust,
    parse_share,
    thresholds_of,
)
from ccn_deploy.statistics import share_lower_bound, trials_needed
from ccn_deploy.verdict import Verdict
from tests.test_robustness_judge import bounded, deepfool, evidence, measured


def tail(successes: int, trials: int, share: Fraction) -> Fraction:
    """Chance of so many successes or more, exactly."""
    return sum(
        (
            math.comb(trials, k) * share**k * (1 - share) ** (trials - k)
            for k in range(successes, trials + 1)
        ),
        Fraction(0),
    )


@pytest.mark.parametrize(("successes", "trials"), [(1, 1), (3, 10), (57, 90), (60, 60), (299, 300)])
def test_the_lower_bound_is_where_so_many_would_be_a_surprise(successes: int, trials: int) -> None:
    bound = Fraction(share_lower_bound(successes, trials))
    assert float(tail(successes, trials, bound)) == pytest.approx(0.05, rel=1e-6)


def test_nothing_shows_nothing() -> None:
    assert share_lower_bound(0, 10) == 0.0
    assert share_lower_bound(0, 0) == 0.0


@pytest.mark.parametrize(
    ("successes", "trials", "share"),
    [(57, 100, 0.55), (90, 100, 0.6), (100, 100, 0.95), (3, 5, 0.5)],
)
def test_as_many_trials_as_are_said_would_do(successes: int, trials: int, share: float) -> None:
    needed = trials_needed(successes, trials, share)
    assert needed is not None
    count = successes * needed // trials
    assert float(tail(count, needed, Fraction(share))) <= 0.05
    if successes == trials:
        assert float(tail(needed - 1, needed - 1, Fraction(share))) > 0.05


def test_no_number_shows_what_is_not_there() -> None:
    assert trials_needed(55, 100, 0.55) is None
    assert trials_needed(5, 5, 1.0) is None


@pytest.mark.parametrize(
    ("held", "n", "share", "expected"),
    [
        (54, 100, 0.55, Verdict.FAIL),
        (55, 100, 0.55, Verdict.INCONCLUSIVE),
        (63, 100, 0.55, Verdict.INCONCLUSIVE),  # P(X >= 63 | 0.55) = 0.066
        (64, 100, 0.55, Verdict.PASS),  # 0.043
        (58, 59, 0.95, Verdict.INCONCLUSIVE),
        (59, 59, 0.95, Verdict.PASS),  # 0.95**59 = 0.0485
        (58, 58, 0.95, Verdict.INCONCLUSIVE),  # 0.95**58 = 0.0510
    ],
)
def test_a_threshold_passes_if_it_is_shown_and_fails_if_it_is_missed(
    held: int, n: int, share: float, expected: Verdict
) -> None:
    exact = float(tail(held, n, Fraction(share)))
    assert (exact <= 0.05) is (expected is Verdict.PASS)
    threshold = Threshold(share, "pgd", 0.1)
    pair = bounded("h" * held + "f" * (n - held), "h" * held + "f" * (n - held))
    result = judge(measured(pair), 0.4, [threshold])
    (test,) = result.thresholds
    assert test.verdict is expected
    assert (test.reached.count, test.reached.n) == (held, n)
    assert bool(test.reason) is (expected is not Verdict.PASS)
    if expected is Verdict.INCONCLUSIVE and held > share * n:
        assert f"about {test.needed} images would" in test.reason


def test_the_whole_passes_only_with_its_thresholds() -> None:
    pair = bounded("h" * 64 + "f" * 36, "h" * 64 + "f" * 36)
    for share, verdict in ((0.55, Verdict.PASS), (0.6, Verdict.INCONCLUSIVE), (0.65, Verdict.FAIL)):
        result = judge(measured(pair), 0.4, [Threshold(share, "pgd", 0.1)])
        assert result.verdict is verdict
        assert judge(measured(pair), 0.4).verdict is Verdict.PASS
        assert any("PGD at epsilon 0.1" in reason for reason in result.reasons) is (
            verdict is not Verdict.PASS
        )


def test_accuracy_without_an_attack_is_a_threshold_too() -> None:
    word = "f" * 95 + "w" * 5
    for share, verdict in (
        (0.89, Verdict.PASS),
        (0.94, Verdict.INCONCLUSIVE),
        (0.96, Verdict.FAIL),
    ):
        result = judge(measured(bounded(word, word)), 0.4, thresholds_of((), f"{share}"))
        assert (result.thresholds[0].verdict, result.verdict) == (verdict, verdict)
        assert result.thresholds[0].threshold.where == "no attack"


def test_an_image_of_which_nothing_was_shown_neither_passes_nor_fails() -> None:
    threshold = Threshold(0.5, "pgd", 0.1)
    assert ThresholdTest(threshold, Proportion(90, 100), invalid=1).verdict is Verdict.INCONCLUSIVE
    assert ThresholdTest(threshold, Proportion(45, 100), invalid=5).verdict is Verdict.INCONCLUSIVE
    assert ThresholdTest(threshold, Proportion(44, 100), invalid=5).verdict is Verdict.FAIL


def test_a_distance_of_its_own_gets_a_row() -> None:
    (test,) = (
        result := judge(measured(deepfool()), 0.4, parse_min_robust(["deepfool@0.22=0.1"]))
    ).thresholds
    assert 0.22 in result.minimal[0].gates
    # Right, and not fooled within d = 0.22: held, 0.25 and 0.6 of seven images.
    assert (test.reached.count, test.reached.n) == (3, 7)
    assert test.threshold.where == "DeepFool at d = 0.22"


def test_a_threshold_of_what_was_not_run_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"pgd@0\.2"):
        judge(measured(bounded("h", "h")), 0.1, [Threshold(0.5, "pgd", 0.2)])


def test_a_pass_says_what_was_shown_and_no_more() -> None:
    pair = bounded("f" * 400, "f" * 400)  # nothing is left on either side
    plain = judge(measured(pair), 0.01)
    assert plain.verdict is Verdict.PASS
    assert plain.headline == "Pass: no worse than the reference"
    assert "no worse than torch-fp32 by more than 1 point under PGD" in plain.shown
    assert "no accuracy was required" in plain.shown
    held = judge(measured(bounded("h" * 400, "h" * 400)), 0.01, parse_min_robust(["pgd@0.1=55%"]))
    assert "the required accuracy is left" in held.headline
    assert "at least 55 % under PGD at epsilon 0.1" in held.shown
    assert "no accuracy was required" not in held.shown


def test_the_document_has_the_threshold_and_its_bound() -> None:
    pair = bounded("h" * 63 + "f" * 37, "h" * 63 + "f" * 37)
    result = judge(measured(pair), 0.4, parse_min_robust(["pgd@0.1=0.55"]))
    (row,) = json.loads(json.dumps(result.document(), allow_nan=False))["thresholds"]
    assert (row["attack"], row["strength"], row["share"]) == ("pgd", 0.1, 0.55)
    assert (row["robust_accuracy"], row["verdict"]) == (0.63, "inconclusive")
    assert row["lower95"] == pytest.approx(share_lower_bound(63, 100))
    assert row["needed"] > 100 and str(row["needed"]) in row["reason"]


# What users type


@pytest.mark.parametrize(
    ("text", "attack", "strength", "share"),
    [
        ("apgd@0.1=0.55", "apgd", 0.1, 0.55),
        ("APGD@8/255=55%", "apgd", 8 / 255, 0.55),
        ("apgd-ce@0.3=.5", "apgd", 0.3, 0.5),
        ("pgd-l2@1.5=40 %", "pgd-l2", 1.5, 0.4),
        ("deepfool@0.2=0.1", "deepfool", 0.2, 0.1),
        ("audit@2/255=9e-1", "audit", 2 / 255, 0.9),
    ],
)
def test_a_threshold_is_read(text: str, attack: str, strength: float, share: float) -> None:
    (found,) = parse_min_robust([text])
    assert (found.attack, found.strength) == (attack, strength)
    assert found.share == pytest.approx(share)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["apgd=0.55"], ["'apgd=0.55'", "ATTACK@STRENGTH=SHARE"]),
        (["apgd@0.1"], ["'apgd@0.1'", "ATTACK@STRENGTH=SHARE"]),
        (["agpd@0.1=0.55"], ["'agpd'", "Did you mean 'apgd'"]),
        (["apgd@big=0.55"], ["'big'", "number above 0"]),
        (["apgd@-1=0.55"], ["'-1'"]),
        (["apgd@nan=0.55"], ["'nan'"]),
        (["apgd@1/0=0.55"], ["'1/0'"]),
        (["apgd@1.5=0.55"], ["above 1"]),
        (["apgd@0.1=55"], ["more than all images", "apgd@0.1=55%", "apgd@0.1=0.55"]),
        (["apgd@0.1=0"], ["cannot fail"]),
        (["apgd@0.1=1"], ["never be shown"]),
        (["apgd@0.1=half"], ["'half'"]),
        (["apgd@0.1=0.5", "apgd@0.10=0.6"], ["two thresholds"]),
    ],
)
def test_what_is_no_threshold_is_told_with_what_to_write(
    texts: list[str], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_min_robust(texts)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("0.01", 0.01), ("0.5%", 0.005), (" 2 % ", 0.02), ("49%", 0.49)],
)
def test_an_allowed_drop_is_a_share_or_a_percentage(text: str, share: float) -> None:
    assert parse_max_drop(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1", ["100 points", "--max-drop 1%", "--max-drop 0.01"]),
        ("0.5", ["50 points", "--max-drop 0.5%", "--max-drop 0.005"]),
        ("5", ["--max-drop 5%", "--max-drop 0.05"]),
        ("50%", ["50 points", "less than 50"]),
        ("0", ["--max-drop 0 ", "1%"]),
        ("-0.01", ["--max-drop -0.01"]),
        ("nan", ["--max-drop nan"]),
        ("inf%", ["--max-drop inf%"]),
        ("a point", ["--max-drop a point", "1%"]),
    ],
)
def test_a_drop_that_is_a_slip_is_told_with_what_to_write(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_max_drop(text)
    for word in words:
        assert word in str(caught.value)


def test_a_required_accuracy_names_its_option() -> None:
    with pytest.raises(UsageError, match="--ccn-min-accuracy 97%"):
        thresholds_of((), "97", "--ccn-")
    assert parse_share("97%", "--min-accuracy") == pytest.approx(0.97)


# Which attacks are run


def test_a_threshold_adds_the_attack_that_it_is_about() -> None:
    options = AttackOptions(["pgd", "fgsm"], "0.1,0.2")
    thresholds = parse_min_robust(["pgd@0.15=0.5", "fgsm@0.2=0.5", "deepfool@0.7=0.1"])
    specs = options.suite(thresholds)
    assert [(s.name, s.epsilon) for s in specs] == [
        ("pgd", 0.1), ("pgd", 0.15), ("pgd", 0.2), ("fgsm", 0.1), ("fgsm", 0.2), ("deepfool", None),
    ]  # fmt: skip
    assert [s.label for s in options.added(thresholds)] == ["linf-0.15-pgd", "l2-deepfool"]
    assert options.suite() == suite(["pgd", "fgsm"], [0.1, 0.2])
    assert options.added(()) == ()


def test_settings_reach_the_attacks_that_thresholds_add() -> None:
    options = AttackOptions(["fgsm"], steps=7, restarts=2)
    *_, spec = options.suite(parse_min_robust(["pgd@0.1=0.5"]))
    assert (spec.parameters["steps"], spec.parameters["restarts"]) == (7, 2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (AttackOptions(["deepfool"], epsilons="0.1"), "--epsilons"),
        (AttackOptions(["pgd"], epsilons_l2="1"), "--epsilons-l2"),
        (AttackOptions(["fgsm"], steps=10), "--steps"),
        (AttackOptions(["fgsm"], step_size=0.1), "--step-size"),
        (AttackOptions(["deepfool"], restarts=2), "--restarts"),
    ],
)
def test_an_option_that_no_attack_takes_is_refused(options: AttackOptions, word: str) -> None:
    with pytest.raises(UsageError, match=f"{word}: none of the attacks takes it"):
        options.suite()


# What finds the smallest perturbation in Linf


def test_the_smallest_change_of_a_pixel_is_judged_at_the_epsilons() -> None:
    word = evidence("hfffw")  # every perturbation is 0.1 in Linf
    pair = Pair(AttackSpec("fmn-linf", "linf"), word, word)
    (row,) = judge(measured(pair), 0.4, epsilons=[0.05, 0.1]).minimal
    assert {d: share.count for d, share in row.runtime.accuracy_at.items()} == {0.05: 4, 0.1: 1}
    (again,) = judge(measured(bounded("hfffw", "hfffw", epsilon=0.05), pair), 0.4).minimal
    assert list(again.gates) == [0.05]
