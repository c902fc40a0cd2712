"""Adversarial training: what is crafted, what is learned of it, and that it resumes to the bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor, nn

from ccn_deploy.data import Dataset, Split, load_dataset
from ccn_deploy.defenses import soft_targets
from ccn_deploy.errors import UsageError
from ccn_deploy.models import build_model
from ccn_deploy.runs import open_run
from ccn_deploy.trainers import EpochEnded, Event, Recipe, TrainConfig, recipe_named, train
from ccn_deploy.trainers.adversary import Adversary, default_adversary
from ccn_deploy.trainers.crafting import adversarial_loss, craft
from tests.trainings import BLOCK, InterruptError, interrupt_after

KINDS = ("fgsm", "pgd", "trades")
DIGITS = (1, 28, 28)


def network() -> nn.Module:
    """A small smooth network in float64: signs of its gradients are no matter of rounding."""
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 36, 4)
    return nn.Sequential(*layers).double()


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.uniform(0, 1, (count, 1, 8, 8)))
    return x, torch.from_numpy(random.integers(0, 4, count))


def seeds(count: int, epoch: int = 0) -> NDArray[np.int64]:
    return np.array([[5, epoch, index] for index in range(count)])


def cross_entropy(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """By its definition, in NumPy."""
    p = softmax(logits.detach().numpy().astype(np.float64), axis=1)
    result: NDArray[np.float64] = -np.log(p[np.arange(len(p)), labels.numpy()])
    return result


def slopes(net: nn.Module, x: Tensor, y: Tensor, step: float = 1e-6) -> Tensor:
    """Gradients of the cross-entropy by central differences, one pixel after another."""
    result = torch.zeros_like(x)
    for pixel in np.ndindex(*x.shape[1:]):
        place = (slice(None), *pixel)
        up, down = x.clone(), x.clone()
        up[place] += step
        down[place] -= step
        rise = cross_entropy(net(up), y) - cross_entropy(net(down), y)
        result[place] = torch.from_numpy(rise / (2 * step))
    return result


def test_fgsm_is_one_step_along_the_sign_of_the_gradient() -> None:
    net, (x, y) = network(), images()
    made = craft(net, x, y, adversary=Adversary("fgsm", 0.2), epsilon=0.2, seeds=seeds(len(x)))
    expected = (x + 0.2 * slopes(net, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    assert (made == 0).any() and (made == 1).any(), "nothing was clipped: nothing shows that it is"


@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_steps_stay_in_ball_and_box_and_climb(kind: str) -> None:
    net, (x, y) = network(), images(40)
    adversary = replace(default_adversary(kind, DIGITS), epsilon=0.1)
    rise = []
    for steps in (1, 3, 12):
        change = replace(adversary, steps=steps, rel_step=0.25)
        made = craft(net, x, y, adversary=change, epsilon=0.1, seeds=seeds(len(x)))
        assert ((made - x).abs() <= 0.1 + 1e-12).all()
        assert ((made >= 0) & (made <= 1)).all()
        if kind == "pgd":
            rise.append(cross_entropy(net(made), y).mean())
        else:
            rise.append(np.mean(divergences(net(x), net(made))))
    start = cross_entropy(net(x), y).mean() if kind == "pgd" else 0.0
    assert start < rise[0] < rise[1] < rise[2]


def divergences(clean: Tensor, crafted: Tensor) -> NDArray[np.float64]:
    """KL(p(clean) || p(crafted)) by SciPy."""
    p, q = (softmax(z.detach().double().numpy(), axis=1) for z in (clean, crafted))
    result: NDArray[np.float64] = entropy(p, q, axis=1)
    return result


@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_a_random_start_belongs_to_the_image(kind: str) -> None:
    net, (x, y) = network(), images()
    adversary = replace(default_adversary(kind, DIGITS), steps=1, rel_step=0.01)
    make = partial(craft, net, adversary=adversary, epsilon=0.3)
    whole = make(x, y, seeds=seeds(6))
    parts = [make(x[at], y[at], seeds=seeds(6)[at]) for at in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    assert not torch.allclose(make(x, y, seeds=seeds(6, epoch=1)), whole, rtol=0, atol=1e-4)
    away = (whole - x).abs().flatten(1).amax(dim=1)
    # PGD starts anywhere in the box, TRADES beside the image: three thousandths and one step.
    assert (away > 0.2).all() if kind == "pgd" else (away < 0.01).all()


def test_what_is_learned_of_each_kind_is_its_formula() -> None:
    net, (x, labels) = network(), images()
    crafted = (x + 0.1).clamp(0, 1)
    targets = torch.from_numpy(soft_targets(labels.numpy(), 4, 0.9)).double()
    clean, moved = net(x), net(crafted)
    real, fake = (-(targets * torch.log(torch.softmax(z, 1))).sum(1).mean() for z in (clean, moved))
    kl = torch.nn.functional.kl_div(
        moved.log_softmax(1), clean.softmax(1), reduction="batchmean"
    )  # what the authors of TRADES call
    np.testing.assert_allclose(kl.item(), divergences(clean, moved).mean(), rtol=1e-9)
    expected = {"fgsm": (real + fake) / 2, "pgd": fake, "trades": real + 5 * kl}
    for kind, value in expected.items():
        adversary = Adversary(kind, 0.1, beta=5 if kind == "trades" else None)  # type: ignore[arg-type]
        loss, seen, held = adversarial_loss(net, x, crafted, targets, adversary)
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(seen, moved if kind == "pgd" else clean)
        torch.testing.assert_close(held, moved)
        found = torch.autograd.grad(loss, list(net.parameters()))
        hand = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
        torch.testing.assert_close(found, hand)


def test_epsilon_rises_from_zero_after_the_clean_share() -> None:
    for clean, full, expected in (
        (0.0, 0.0, [0.3] * 10),
        (0.0, 0.5, [0.06, 0.12, 0.18, 0.24, *[0.3] * 6]),
        (0.2, 0.5, [0, 0, 0.1, 0.2, *[0.3] * 6]),
        (0.4, 0.4, [0, 0, 0, 0, *[0.3] * 6]),
    ):
        adversary = Adversary("pgd", 0.3, clean=clean, full=full)
        found = [adversary.epsilon_at(step, 10) for step in range(10)]
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_at_epsilon_zero_nothing_is_crafted(kind: str) -> None:
    net, (x, y) = network(), images()
    adversary = default_adversary(kind, DIGITS)
    assert torch.equal(craft(net, x, y, adversary=adversary, epsilon=0.0, seeds=seeds(6)), x)


def test_default_strengths() -> None:
    assert default_adversary("fgsm", DIGITS) == Adversary("fgsm", 0.3)
    rise = {"clean": 0.2, "full": 0.5}
    assert default_adversary("PGD", (3, 32, 32)) == Adversary("pgd", 8 / 255, 7, 2.5 / 7, **rise)
    assert default_adversary("trades", (1, 32, 32)) == Adversary(
        "trades", 8 / 255, 10, 0.25, 6.0, **rise
    )


# Noise with a bright band whose place is the label.
def bands(split: Split, count: int) -> Dataset:
    labels = np.arange(count, dtype=np.int64) % 3
    pixels = np.random.default_rng(len(split)).uniform(0, 0.5, (count, 1, 12, 12))
    for image, label in zip(pixels, labels, strict=True):
        image[:, label * 4 : label * 4 + 4] += 0.5
    fetch = partial(np.take, pixels.astype(np.float32), axis=0)
    return Dataset("bands", split, ("a", "b", "c"), (1, 12, 12), labels, fetch, digest=split)


DATA = bands("train", 49), bands("test", 30)
RECIPE = Recipe("test", 3, 16, 0.05, (1.5,), 0.1, warmup_steps=2)
STEPS = math.ceil(49 / 16)


@pytest.fixture
def settings(tmp_path: Path) -> TrainConfig:
    """A network of one's own with batch normalisation and dropout."""
    file = tmp_path / "net.py"
    file.write_text(BLOCK)
    return TrainConfig(dataset="bands", recipe=RECIPE, threads=1, network=f"{file}:Block")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("events", [STEPS + 2, STEPS + 4, 2 * (STEPS + 1) + 1])
def test_a_resumed_run_ends_with_the_same_bits(
    kind: str, events: int, settings: TrainConfig, tmp_path: Path
) -> None:
    steps = None if kind == "fgsm" else 3
    adversary = replace(default_adversary(kind, DIGITS), clean=0.2, full=0.6)
    recipe = replace(RECIPE, adversary=adversary)
    config = replace(settings, recipe=recipe, epsilon=0.2, attack_steps=steps, label_smoothing=0.1)
    whole = train(config, *DATA, tmp_path / "whole")
    torch.rand(7)  # must not matter
    with pytest.raises(InterruptError):
        train(config, *DATA, tmp_path / "cut", watcher=interrupt_after(events))
    resumed = train(config, *DATA, tmp_path / "cut")
    assert resumed.weights == whole.weights
    lines = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("whole", "cut")]
    for one, two in zip(*lines, strict=True):
        held = [line.split(",") for line in (one, two)]
        assert held[0][:6] + held[0][7:] == held[1][:6] + held[1][7:]  # all but the seconds
    weights = load(whole.weights)
    assert weights["bn.num_batches_tracked"] == 3 * STEPS, "crafting moved the statistics"
    written = json.loads((tmp_path / "cut/run.json").read_bytes())["training"]["recipe"]
    assert written["adversary"] == whole.card.training["recipe"]["adversary"]
    assert (written["adversary"]["kind"], written["adversary"]["epsilon"]) == (kind, 0.2)
    assert weights["fc.weight"].isfinite().all()


def test_the_three_kinds_and_none_end_with_other_weights(
    settings: TrainConfig, tmp_path: Path
) -> None:
    events: list[EpochEnded] = []

    def watch(event: Event) -> None:
        if isinstance(event, EpochEnded):
            events.append(event)

    runs = {
        kind: train(
            replace(settings, adversarial=kind, epochs=1),
            *DATA,
            tmp_path / str(kind),
            watcher=watch,
        )
        for kind in (None, *KINDS)
    }
    assert len({run.weights for run in runs.values()}) == 4
    assert [event.crafted_accuracy is None for event in events] == [True, False, False, False]
    assert events[2].crafted_accuracy == events[2].train_accuracy  # pgd sees nothing else


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    """33 images in batches of 16: shares of 8 and 8, twice, then 1 and none.

    Signs of slopes that are all but zero follow the rounding, so not to the last digits. Other
    random starts are another matter: they change the weights by half of how far they moved.
    """
    data = digits(33), digits(15, "test")
    config = TrainConfig("ccn", "mnist5k", RECIPE, epochs=1, threads=1, adversarial=kind)
    config = replace(config, attack_steps=None if kind == "fgsm" else 2)
    pair = load(train(replace(config, devices=2), *data, tmp_path / "pair").weights)
    alone = load(train(config, *data, tmp_path / "alone").weights)
    start = build_model("mnist-cnn", "ccn").state_dict()
    for name, weights in alone.items():
        assert (pair[name] - weights).norm() <= 0.05 * (weights - start[name]).norm() + 1e-5
    one, two = (
        (tmp_path / run / "metrics.csv").read_text().splitlines()[1].split(",")
        for run in ("alone", "pair")
    )
    assert one[3] == two[3] and one[7] == two[7]


def digits(count: int, split: Split = "train") -> Dataset:
    data = load_dataset("mnist5k", split)
    order = data.order()[:count]
    fetch = partial(np.take, data.images(order), axis=0)
    labels = data.labels[order]
    return replace(data, labels=labels, fetch=fetch, digest=f"{split}{count}")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"adversarial": "pdg"}, "'pgd'"),
        ({"adversarial": "pgd", "epsilon": 0.0}, "0.0"),
        ({"adversarial": "pgd", "epsilon": 1.5}, "1.5"),
        ({"adversarial": "pgd", "epsilon": float("nan")}, "nan"),
        ({"adversarial": "pgd", "attack_steps": 0}, "attack steps is 0"),
        ({"adversarial": "fgsm", "attack_steps": 7}, "one step"),
        ({"adversarial": "pgd", "beta": 6.0}, "pgd has no beta"),
        ({"adversarial": "trades", "beta": 0.0}, "beta is 0.0"),
        ({"epsilon": 0.3}, "--adversarial"),
        ({"attack_steps": 3}, "--adversarial"),
        ({"beta": 6.0}, "--adversarial"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    change: dict[str, Any], word: str, settings: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        train(replace(settings, **change), *DATA, tmp_path / "run")
    assert len(str(caught.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "trades"},
        {"kind": "none"},
        {"rel_step": 0.0},
        {"rel_step": float("inf")},
        {"clean": -0.1},
        {"full": 1.1},
        {"clean": 0.5, "full": 0.4},
    ],
)
def test_an_adversary_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Adversary(**{"kind": "pgd", "epsilon": 0.3, **wrong})


def test_resuming_with_another_adversary_names_it(settings: TrainConfig, tmp_path: Path) -> None:
    config = replace(settings, adversarial="pgd", attack_steps=2)
    with pytest.raises(InterruptError):
        train(config, *DATA, tmp_path / "run", watcher=interrupt_after(STEPS + 2))
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    for change, words in (
        ({"epsilon": 0.2}, r"settings: recipe.adversary.epsilon was 0.0313\d* and is now 0.2\."),
        ({"attack_steps": 3}, "recipe.adversary.steps was 2 and is now 3"),
        (
            {"adversarial": "trades"},
            "settings: recipe.adversary.kind was 'pgd' and is now 'trades'.",
        ),
        (
            {"adversarial": None, "attack_steps": None},
            "settings: recipe.adversary.kind was 'pgd' and is now None.",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            train(replace(config, **change), *DATA, tmp_path / "run")  # type: ignore[arg-type]
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_a_recipes_adversary_takes_other_numbers() -> None:
    from ccn_deploy.trainers.config import make_plan

    def adversary(**changes: Any) -> Adversary | None:
        config = TrainConfig(dataset="mnist5k", recipe="pgd-mnist", **changes)
        data = digits(10), digits(10, "test")
        return make_plan(config, *data, threads=1, device="cpu", torch="").recipe.adversary

    own = recipe_named("pgd-mnist").adversary
    assert own is not None and own.kind == "pgd" and own.epsilon == 0.3
    assert adversary() == own
    assert adversary(adversarial="PGD", epsilon=0.2) == replace(own, epsilon=0.2)
    assert adversary(attack_steps=10) == replace(own, steps=10, rel_step=0.25)
    assert adversary(adversarial="trades", beta=3.0) == replace(
        default_adversary("trades", DIGITS), beta=3.0
    )


def test_a_few_epochs_against_fgsm_hold_against_it(tmp_path: Path) -> None:
    """Few images, plain network, few epochs: without it FGSM leaves about chance."""
    data, unseen = (digits(400), digits(10, "test")), digits(200, "test")
    recipe = replace(recipe_named("quick"), epochs=8, warmup_steps=16, batch_size=32)
    held = {}
    for kind in (None, "fgsm"):
        config = TrainConfig("sm", "mnist5k", recipe, threads=1, adversarial=kind)
        run = train(config, *data, tmp_path / str(kind))
        net = build_model("mnist-cnn", "sm")
        net.load_state_dict(load(run.weights))
        x = torch.from_numpy(unseen.images(range(200))).requires_grad_()
        y = torch.from_numpy(unseen.labels)
        logits = net(x)
        assert (logits.argmax(1) == y).float().mean() > 0.75
        loss = -logits.log_softmax(1)[torch.arange(200), y].sum()
        moved = (x + 0.3 * torch.autograd.grad(loss, x)[0].sign()).clamp(0, 1)
        held[kind] = (net(moved).argmax(1) == y).float().mean().item()
    assert held["fgsm"] > held[None] + 0.3


def test_run_and_card_of_a_finished_run_tell_the_adversary(
    settings: TrainConfig, tmp_path: Path
) -> None:
    train(replace(settings, adversarial="trades", epochs=1), *DATA, tmp_path / "run")
    told = open_run(tmp_path / "run").card.training["recipe"]["adversary"]
    assert Adversary(**told) == default_adversary("trades", (1, 12, 12))
