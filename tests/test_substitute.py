"""The practical black-box attack: finite differences, autograd by hand, a linear oracle, digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ccn_deploy.attacks.substitute import (
    Substitute,
    augmented,
    lenet,
    substitute_fgsm,
    train_substitute,
)
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import InputError, UsageError
from ccn_deploy.robustness.attack_session import labels_of
from ccn_deploy.runtimes import RuntimeOptions, open_runtime

STEP = 0.1


def digits(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    dataset = load_dataset("mnist5k", "test")
    chosen = dataset.order(0)[start:stop]
    return dataset.images(chosen), dataset.labels[chosen]


def noise(n: int, shape: tuple[int, ...] = (1, 6, 6)) -> np.ndarray:
    return np.random.default_rng(5).random((n, *shape), dtype=np.float32)


class Recording:
    """A linear oracle of four classes that keeps what it was asked."""

    def __init__(self, classes: int = 4) -> None:
        self.weights = np.random.default_rng(6).standard_normal((36, classes))
        self.asked: list[np.ndarray] = []

    def __call__(self, *images: np.ndarray) -> np.ndarray:
        (batch,) = images
        self.asked.append(batch.copy())
        return self.answer(batch)

    def answer(self, images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1) @ self.weights).argmax(axis=1)


def trained(oracle: Callable[[np.ndarray], np.ndarray], rounds: int, **more: object) -> Substitute:
    settings = {"classes": 4, "rounds": rounds, "epochs": 2, "step": STEP, "threads": 1, **more}
    return train_substitute(oracle, noise(10), **settings)  # type: ignore[arg-type]


# The substitute


def test_lenet_has_the_layers_of_1998() -> None:
    network = lenet((1, 28, 28), 10, torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in network.parameters()) == 156 + 2416 + 48120 + 10164 + 850
    x = torch.rand(3, 1, 28, 28)
    w = dict(network.named_parameters())
    h = F.max_pool2d(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=2).relu(), 2)
    h = F.max_pool2d(F.conv2d(h, w["conv2.weight"], w["conv2.bias"]).relu(), 2).flatten(1)
    for name in ("fc1", "fc2"):
        h = F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"]).relu()
    torch.testing.assert_close(network(x), F.linear(h, w["fc3.weight"], w["fc3.bias"]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 41), (3, 32, 32), (2, 64, 33)])
def test_lenet_takes_any_shape_and_number_of_classes(shape: tuple[int, int, int]) -> None:
    network = lenet(shape, 7, torch.Generator().manual_seed(0))
    assert network(torch.rand(2, *shape)).shape == (2, 7)


# Augmentation


def row_by_differences(
    network: nn.Module, x: torch.Tensor, label: int, pixels: list[tuple[int, int]]
) -> list[float]:
    """Return slopes of the softmax of a label at some pixels of one image, by differences."""
    slopes = []
    for row, column in pixels:
        ends = []
        for h in (1e-5, -1e-5):
            there = x.clone()
            there[0, 0, row, column] += h
            ends.append(float(network(there).softmax(dim=1)[0, label]))
        slopes.append((ends[0] - ends[1]) / 2e-5)
    return slopes


@pytest.mark.parametrize("step", [STEP, -STEP])
def test_images_move_along_the_sign_of_their_labels_row_of_the_jacobian(step: float) -> None:
    network = lenet((1, 28, 28), 10, torch.Generator().manual_seed(1)).double()
    network.requires_grad_(False)
    images = 0.2 + 0.6 * torch.from_numpy(noise(4, (1, 28, 28))).double()
    labels = torch.tensor([0, 3, 3, 9])
    moved = augmented(network, images, labels, step)
    pixels = [(i, j) for i in range(0, 28, 5) for j in range(0, 28, 5)]
    compared = 0
    for at, label in enumerate(labels.tolist()):
        slopes = row_by_differences(network, images[at : at + 1], label, pixels)
        for (i, j), slope in zip(pixels, slopes, strict=True):
            if abs(slope) > 1e-8:  # below, a difference is rounding
                expected = images[at, 0, i, j] + step * np.sign(slope)
                assert float(moved[at, 0, i, j]) == pytest.approx(float(expected), abs=1e-12)
                compared += 1
    assert compared > 100


def test_a_sure_substitute_still_leads() -> None:
    network = lenet((1, 28, 28), 10, torch.Generator().manual_seed(1)).requires_grad_(False)
    exact = lenet((1, 28, 28), 10, torch.Generator().manual_seed(1)).double()
    images = 0.2 + 0.6 * torch.from_numpy(noise(40, (1, 28, 28)))
    best = network(images).topk(2, dim=1)
    gaps, labels = best.values[:, 0] - best.values[:, 1], best.indices[:, 0]
    with torch.no_grad():
        for each in (network, exact):
            each[-1].weight.mul_(60.0 / gaps.max())  # type: ignore[index]
    sure = gaps > 0.35 * gaps.max()  # one less e^-21 is one in float32
    images, labels = images[sure], labels[sure]
    assert len(images) > 10 and (network(images).softmax(dim=1).amax(dim=1) == 1.0).all()
    x = images.double().requires_grad_(True)
    z, rows = exact(x), torch.arange(len(x))
    others = z.index_put((rows, labels), torch.tensor(-torch.inf).double())
    # The odds rise where the probability does, and are not the difference of two ones.
    log_odds = z[rows, labels] - others.logsumexp(dim=1)
    (row,) = torch.autograd.grad(log_odds.sum(), x)
    clear = row.abs() > 1e-3 * row.abs().amax(dim=(1, 2, 3), keepdim=True)
    moved = augmented(network, images, labels, STEP) - images
    assert clear.double().mean() > 0.5
    assert (moved.sign() == row.sign())[clear].double().mean() > 0.999


def test_images_stay_images() -> None:
    network = lenet((1, 6, 6), 4, torch.Generator().manual_seed(1)).requires_grad_(False)
    images = torch.from_numpy(noise(20).round())
    moved = augmented(network, images, torch.zeros(20, dtype=torch.int64), 0.7)
    assert float(moved.min()) == 0.0 and float(moved.max()) == 1.0


# Training


def test_the_oracle_is_asked_for_labels_of_each_image_once_and_every_round_doubles_them() -> None:
    oracle = Recording()
    substitute = trained(oracle, 3)
    assert [len(batch) for batch in oracle.asked] == [10, 10, 20, 40]
    assert substitute.queries == sum(map(len, oracle.asked)) == 80
    np.testing.assert_array_equal(oracle.asked[0], noise(10))
    for batch in oracle.asked:
        assert batch.dtype == np.float32 and batch.min() >= 0 and batch.max() <= 1
    parents = np.concatenate(oracle.asked[:-1])
    assert np.abs(oracle.asked[-1] - parents).max() <= STEP + 1e-6


def test_the_step_turns_its_sign_after_three_rounds() -> None:
    whole = Recording()
    trained(whole, 7)
    for place in range(7):
        oracle = Recording()
        network = trained(oracle, place).network  # as it stood before the round
        parents = np.concatenate(oracle.asked)
        x = torch.from_numpy(parents).requires_grad_(True)
        rows = torch.arange(len(x))
        log_row = network(x).log_softmax(dim=1)[rows, torch.from_numpy(oracle.answer(parents))]
        (row,) = torch.autograd.grad(log_row.sum(), x)
        sign = -1 if 3 <= place < 6 else 1
        expected = np.clip(parents + sign * STEP * row.sign().numpy(), 0, 1)
        same = np.isclose(whole.asked[place + 1], expected, atol=1e-6).all(axis=(1, 2, 3))
        assert same.mean() > 0.95, place  # autograd by hand may round a slope to the other side


def test_without_rounds_it_learns_the_seeds() -> None:
    oracle = Recording()
    substitute = trained(oracle, 0, epochs=200)
    assert substitute.queries == 10 and len(oracle.asked) == 1
    assert substitute.agreement(noise(10), oracle.answer(noise(10))) == 1.0


def test_the_same_seed_gives_the_same_bits_and_leaves_random_states_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = trained(Recording(), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[arg-type]
    torch.manual_seed(2)
    again, other = trained(Recording(), 2), trained(Recording(), 2, seed=1)
    weights = [s.network.state_dict() for s in (first, again, other)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
    assert not torch.equal(weights[0]["fc1.weight"], weights[2]["fc1.weight"])


def test_threads_are_set_for_the_call() -> None:
    before = torch.get_num_threads()
    seen = []
    trained(Recording(), 0, threads=before + 1, progress=lambda *_: seen.append(_threads()))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def _threads() -> int:
    return torch.get_num_threads()


def test_progress_counts_images_that_were_learned_from() -> None:
    told: list[tuple[str, float, float]] = []
    trained(Recording(), 2, progress=lambda what, done, total: told.append((what, done, total)))
    assert [done for _, done, _ in told] == [10, 20, 40, 60, 100, 140]
    assert {total for *_, total in told} == {140}


# What is refused


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: np.zeros((len(x), 4), np.float32), r"float32 \[10, 4\] for 10 images"),
        (lambda x: np.zeros(len(x), np.float32), "float32"),
        (lambda x: np.zeros(3, np.int64), r"int64 \[3\] for 10"),
        (lambda x: np.where(np.arange(len(x)) < 2, -1, 0), "label -1, one of 2"),
        (lambda x: np.full(len(x), 4), "label 4, one of 10"),
    ],
)
def test_an_oracle_gives_labels_and_nothing_else(
    answer: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        trained(answer, 1)


@pytest.mark.parametrize(
    "settings",
    [{"classes": 1}, {"rounds": -1}, {"epochs": 0}, {"step": 0.0}, {"step": float("nan")}],
)
def test_settings_that_mean_nothing_are_refused_before_the_oracle_is_asked(
    settings: dict[str, float],
) -> None:
    oracle = Recording()
    with pytest.raises(UsageError, match=next(iter(settings))):
        trained(oracle, **{"rounds": 1, **settings})  # type: ignore[arg-type]
    assert not oracle.asked


@pytest.mark.parametrize(
    "seeds",
    [noise(3)[0], noise(3).astype(np.float64), noise(3)[:0], noise(3) + 1, noise(3) * np.nan],
)
def test_seeds_are_images(seeds: np.ndarray) -> None:
    oracle = Recording()
    with pytest.raises(InputError, match="Seeds"):
        train_substitute(oracle, seeds, classes=4)
    assert not oracle.asked


# The attack


def test_fgsm_images_are_those_of_the_substitute() -> None:
    substitute = trained(Recording(), 2)
    images, labels = noise(150), np.arange(150) % 4
    made = substitute_fgsm(substitute, images, labels, [0.3, 0.1])
    assert list(made) == [0.1, 0.3]
    x = torch.from_numpy(images).requires_grad_(True)
    loss = F.cross_entropy(substitute.network(x), torch.from_numpy(labels), reduction="sum")
    (slope,) = torch.autograd.grad(loss, x)
    for epsilon, found in made.items():
        assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
        assert np.abs(found - images).max() <= epsilon + 1e-6
        expected = np.clip(images + epsilon * slope.sign().numpy(), 0, 1)
        same = np.isclose(found, expected, atol=1e-6)
        assert same.mean() > 0.999  # a slope of rounding may be signed otherwise


def test_no_slope_is_no_image() -> None:
    substitute = trained(Recording(), 0)
    with torch.no_grad():
        substitute.network[-1].weight.zero_()  # type: ignore[index]
    made = substitute_fgsm(substitute, noise(3), np.zeros(3, np.int64), [0.1])
    assert np.isnan(made[0.1]).all()


def test_agreement_is_a_share_of_labels() -> None:
    substitute = trained(Recording(), 1)
    labels = substitute.labels(noise(20))
    np.testing.assert_array_equal(
        labels, substitute.network(torch.from_numpy(noise(20))).argmax(dim=1).numpy()
    )
    labels[:5] += 1
    assert substitute.agreement(noise(20), labels) == 0.75


def test_a_linear_oracle_is_fooled_by_far_more_than_noise() -> None:
    images, labels = digits(0, 1000)
    means = np.stack([images[labels == c].mean(axis=0).ravel() for c in range(10)])

    def nearest_mean(x: np.ndarray) -> np.ndarray:
        scores = x.reshape(len(x), -1) @ means.T - 0.5 * np.square(means).sum(axis=1)
        return scores.argmax(axis=1)

    substitute = train_substitute(nearest_mean, images[:60], classes=10, rounds=3, threads=1)
    x, clean = images[500:], nearest_mean(images[500:])
    (made,) = substitute_fgsm(substitute, x, clean, [0.3]).values()
    signs = np.random.default_rng(0).choice(np.float32([-0.3, 0.3]), x.shape)
    by_noise = (nearest_mean(np.clip(x + signs, 0, 1)) != clean).mean()
    by_attack = (nearest_mean(made) != clean).mean()
    assert by_attack > by_noise + 0.15


def test_a_deployed_network_is_fooled_by_its_labels_alone(sm_bundle: Bundle) -> None:
    options = RuntimeOptions(threads=1)
    seeds, _ = digits(0, 80)
    images, labels = digits(200, 500)
    with open_runtime(sm_bundle, "onnxruntime-cpu", "fp32", options) as runtime:
        oracle = partial(labels_of, runtime)
        substitute = train_substitute(oracle, seeds, classes=10, rounds=4, threads=1)
        clean = oracle(images)
        (made,) = substitute_fgsm(substitute, images, labels, [0.3]).values()
        signs = np.random.default_rng(0).choice(np.float32([-0.3, 0.3]), images.shape)
        by_noise = (oracle(np.clip(images + signs, 0, 1)) == labels).mean()
        after = (oracle(made) == labels).mean()
    assert substitute.queries == 80 * 16
    assert substitute.agreement(images, clean) > 0.7
    assert after < (clean == labels).mean() - 0.15
    assert after < by_noise - 0.1
