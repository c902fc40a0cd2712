from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.defenses import DEFENSES, defense_named
from ccn_deploy.errors import ExitCode, UsageError

SMOOTH = {"ls", "ccn+ls"}


def test_they_are_the_papers_six_and_the_two_of_table_9() -> None:
    assert [defense.title for defense in DEFENSES.values()] == [
        "SM", "LS", "BReLU", "L2SM", "CCN", "CCN+LS", "BN", "LRN",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_smoothed_targets_of_ten_classes_are_the_papers(name: str) -> None:
    targets = DEFENSES[name].targets(np.array([3, 0]), 10)
    assert set(np.unique(targets)) == {np.float32(1 / 90), np.float32(0.9)}
    assert targets.argmax(axis=1).tolist() == [3, 0]


@pytest.mark.parametrize("name", sorted(set(DEFENSES) - SMOOTH))
def test_the_others_have_hard_targets(name: str) -> None:
    targets = DEFENSES[name].targets(np.array([3, 0]), 10)
    assert np.array_equal(targets, np.eye(10, dtype=np.float32)[[3, 0]])


@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from(sorted(DEFENSES)),
    classes=st.integers(2, 1000),
    data=st.data(),
)
def test_every_row_is_a_distribution_that_names_its_class(
    name: str, classes: int, data: st.DataObject
) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=5)))
    targets = DEFENSES[name].targets(labels, classes)
    assert targets.shape == (len(labels), classes)
    assert targets.dtype == np.float32
    assert (targets >= 0).all()
    np.testing.assert_allclose(targets.sum(axis=1, dtype=np.float64), 1.0, atol=1e-6)
    if name in SMOOTH:
        off = Fraction(1, 10) / (classes - 1)
        rest = targets[np.arange(classes) != labels[:, np.newaxis]]
        np.testing.assert_allclose(rest, float(off), rtol=1e-6)
        assert (targets[np.arange(len(labels)), labels] == np.float32(0.9)).all()


@pytest.mark.parametrize(
    ("typed", "meant"), [("CCN", "ccn"), ("Ccn+LS", "ccn+ls"), ("BReLU", "brelu")]
)
def test_case_is_ignored(typed: str, meant: str) -> None:
    assert defense_named(typed).name == meant


@pytest.mark.parametrize(
    ("typed", "meant"), [("cnn", "ccn"), ("ccn-ls", "ccn+ls"), ("relu", "brelu"), ("l2", "l2sm")]
)
def test_an_unknown_defense_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        defense_named(typed)
    assert caught.value.exit_code == ExitCode.USAGE
    assert f"Did you mean {meant!r}?" in caught.value.hint
    assert all(name in caught.value.hint for name in DEFENSES)
