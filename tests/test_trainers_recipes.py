from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.errors import UsageError
from ccn_deploy.trainers import RECIPES, Recipe, recipe_named


@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        # Section 5: "0.1 for the first thirty epochs, and decreased by a factor of 0.1 after
        # every ten epochs ... fifty epochs".
        ("paper-mnist", 50, {0: 0.1, 29: 0.1, 30: 0.01, 39: 0.01, 40: 0.001, 49: 0.001}),
        # "0.1 which is decreased by a factor of 0.2 after 60, 120 and 160 epochs ... 200 epochs".
        (
            "paper-cifar10",
            200,
            {
                0: 0.1,
                59: 0.1,
                60: 0.02,
                119: 0.02,
                120: 0.004,
                159: 0.004,
                160: 0.0008,
                199: 0.0008,
            },
        ),
    ],
)
def test_the_papers_schedules(name: str, epochs: int, rates: dict[int, float]) -> None:
    recipe, per_epoch = recipe_named(name), 469
    assert recipe.epochs == epochs
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
    for epoch, rate in rates.items():
        last_step = (epoch + 1) * per_epoch - 1
        assert recipe.learning_rate_at(last_step, per_epoch) == pytest.approx(rate)
        if epoch:  # the first steps of all are the warm-up
            assert recipe.learning_rate_at(epoch * per_epoch, per_epoch) == pytest.approx(rate)


def test_the_warm_up_is_a_line_to_the_full_rate() -> None:
    recipe = recipe_named("quick")
    rates = [recipe.learning_rate_at(step, 32) for step in range(70)]
    assert rates[:64] == pytest.approx([0.1 * (step + 1) / 64 for step in range(64)])
    assert rates[64:] == pytest.approx([0.1] * 6)


def test_quick_drops_at_60_and_80_percent() -> None:
    recipe, per_epoch = recipe_named("quick"), 50
    rates = [recipe.learning_rate_at(step, per_epoch) for step in range(6 * per_epoch)]
    drops = [step for step in range(65, len(rates)) if rates[step] < rates[step - 1]]
    assert drops == [180, 240]


@settings(deadline=None, max_examples=50)
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    epochs=st.integers(1, 300),
    rate=st.floats(1e-6, 10.0),
    per_epoch=st.integers(1, 500),
)
def test_other_epochs_stretch_the_schedule(
    recipe: str, epochs: int, rate: float, per_epoch: int
) -> None:
    before = recipe_named(recipe)
    after = before.override(epochs=epochs, learning_rate=rate)
    assert [d / after.epochs for d in after.drops] == pytest.approx(
        [d / before.epochs for d in before.drops]
    )
    steps = epochs * per_epoch
    rates = [after.learning_rate_at(step, per_epoch) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) <= rate
    if steps > after.warmup_steps:
        floor = rate * after.drop_factor ** len(after.drops)
        assert rates[-1] >= floor * (1 - 1e-9)
        assert rates[-1] < rate or per_epoch < len(rates) - steps * max(after.drops) / epochs


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
    ],
)
def test_numbers_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        recipe_named("quick").override(**wrong)  # type: ignore[arg-type]


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="'quick'"):
        recipe_named("qick")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    document = json.loads(json.dumps(recipe.to_document()))
    assert Recipe(**{**document, "drops": tuple(document["drops"])}) == Recipe(
        **{**recipe.to_document(), "drops": tuple(recipe.drops)}
    )
