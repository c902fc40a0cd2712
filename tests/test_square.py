"""Square Attack against the program of its authors, patched to draw the same numbers."""

from __future__ import annotations

from typing import Any

import foolbox as fb
import numpy as np
import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor

from ccn_deploy.attacks import suite
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.perform import perform
from ccn_deploy.attacks.square import L2SquareAttack, LinfSquareAttack, shrunk
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference
from tests.rowwise import Rowwise, images_of, model_of

SHAPE = (2, 11, 11)
NORMS = {"Linf": (LinfSquareAttack, 0.05), "L2": (L2SquareAttack, 0.4)}


def seeds(n: int) -> np.ndarray:
    return np.stack([np.full(n, 3), np.arange(n)], axis=1)


class Watched(QueryCounter):
    """Keeps what the attack asked about each image, and the answers' margins."""

    def __init__(self, network: Rowwise, labels: Tensor) -> None:
        super().__init__(model_of(network), len(labels))
        self.labels = labels
        self.ways: list[list[Tensor]] = [[] for _ in labels]
        self.margins: list[list[float]] = [[] for _ in labels]

    def counted_scores(self, images: Tensor, places: Tensor | None) -> Tensor:
        logits = super().counted_scores(images, places)
        assert places is not None
        for place, image, row in zip(places.tolist(), images, logits, strict=True):
            label = int(self.labels[place])
            others = torch.cat([row[:label], row[label + 1 :]]).max()
            self.ways[place].append(image.clone())
            self.margins[place].append(float(row[label] - others))
        return logits


def test_the_schedule_is_the_published_one() -> None:
    published = {10: 2, 50: 4, 200: 8, 500: 16, 1000: 32, 2000: 64, 4000: 128, 6000: 256, 8000: 512}
    for query in range(0, 10000):
        parts = max((part for after, part in published.items() if query > after), default=1)
        assert shrunk(query, 10000) == 1 / parts
    for queries in (100, 1000, 5000):
        theirs = SquareAttack(None, n_queries=queries)
        for query in range(queries):
            assert 0.8 * shrunk(query, queries) == theirs.p_selection(query)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("queries", [1, 9, 120])
def test_iterates_are_those_of_the_authors_program(
    norm: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 5)
    attack, epsilon = NORMS[norm]
    watched = Watched(network, labels)
    attack(queries=queries, seeds=seeds(5)).run(watched, images, labels, epsilon=epsilon)

    for at in range(5):
        generator = np.random.default_rng(seeds(5)[at])

        def rand(shape: Any, generator: np.random.Generator = generator) -> Tensor:
            return torch.from_numpy(generator.random(tuple(shape), np.float32))

        def whole(_: Any, low: int = 0, high: int = 1, shape: Any = (1,)) -> Tensor:
            # Theirs leaves out the last place where a square fits; the paper does not.
            return (low + (high - low + 1) * rand(shape)).long()

        network.seen.clear()
        theirs = SquareAttack(network, norm=norm, n_queries=queries, eps=epsilon)
        one, label = images[at : at + 1], labels[at : at + 1]
        theirs.init_hyperparam(one)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", rand)
            patched.setattr(SquareAttack, "random_int", whole)
            theirs.attack_single_run(one, label)
        expected = torch.cat(network.seen)[:queries]  # they count without the first
        found = torch.stack(watched.ways[at])
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_is_attacked_the_same_in_every_batch(norm: str) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 10)
    attack, epsilon = NORMS[norm]

    def run(chosen: list[int]) -> Tensor:
        made = attack(queries=60, restarts=2, seeds=seeds(10)[chosen])
        torch.manual_seed(len(chosen))
        found: Tensor = made.run(
            model_of(network), images[chosen], labels[chosen], epsilon=epsilon / 2
        )
        return found

    together = run(list(range(10)))
    assert torch.equal(together, torch.cat([run([at]) for at in range(10)]))
    assert torch.equal(together[[7, 2, 4]], run([7, 2, 4]))


@pytest.mark.parametrize("norm", NORMS)
def test_it_keeps_the_best_within_bounds_and_leaves_when_the_label_is_gone(norm: str) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 12)
    attack, epsilon = NORMS[norm]
    watched = Watched(network, labels)
    found = attack(queries=50).run(watched, images, labels, epsilon=epsilon / 3)
    moved = (found.double() - images.double()).flatten(1)
    order = torch.inf if norm == "Linf" else 2
    assert (moved.norm(order, dim=1) <= epsilon / 3 + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1
    gone = network(found).argmax(dim=1) != labels
    assert gone.any() and not gone.all()
    for at, margins in enumerate(watched.margins):
        best = min(range(len(margins)), key=margins.__getitem__)
        assert torch.equal(found[at], watched.ways[at][best])
        assert watched.queries.forward[at] == len(margins)
        if gone[at]:
            assert best == len(margins) - 1 and min([*margins[:-1], 1.0]) > 0
        else:
            assert len(margins) == 50
    assert not watched.queries.backward.any()


def test_a_new_start_is_for_images_that_hold() -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 12)
    once, often = (Watched(network, labels) for _ in range(2))
    first = LinfSquareAttack(queries=20).run(once, images, labels, epsilon=0.02)
    second = LinfSquareAttack(queries=20, restarts=3).run(often, images, labels, epsilon=0.02)
    gone = network(first).argmax(dim=1) != labels
    assert gone.any() and not gone.all()
    assert torch.equal(second[gone], first[gone])
    again = (network(second).argmax(dim=1) == labels).numpy()
    assert (often.queries.forward[again] == 60).all()
    assert (often.queries.forward[gone.numpy()] == once.queries.forward[gone.numpy()]).all()


def test_a_model_without_gradients_will_do() -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 4)

    def answer(x: np.ndarray) -> np.ndarray:
        return network(torch.tensor(x)).numpy()

    expected = LinfSquareAttack(queries=30).run(model_of(network), images, labels, epsilon=0.03)
    blind = fb.NumPyModel(answer, bounds=(0, 1))
    found = LinfSquareAttack(queries=30).run(blind, images, labels, epsilon=0.03)
    assert torch.equal(found, expected)


def test_images_may_be_small_and_oblong() -> None:
    for shape in ((3, 4, 7), (1, 1, 5), (1, 9, 2)):
        network = Rowwise(shape)
        images, labels = images_of(network, shape, 3)
        for attack, epsilon in NORMS.values():
            found = attack(queries=40).run(model_of(network), images, labels, epsilon=epsilon)
            assert found.isfinite().all()


def test_it_finds_what_the_authors_program_finds(sm_bundle: Bundle) -> None:
    dataset = load_dataset("mnist5k", "test")
    chosen = dataset.order(0)[:40]
    images, labels = (
        torch.from_numpy(dataset.images(chosen)),
        torch.from_numpy(dataset.labels[chosen]),
    )
    network = load_reference(sm_bundle)
    for attack, norm, epsilon in ((LinfSquareAttack, "Linf", 0.3), (L2SquareAttack, "L2", 3.5)):
        ours = attack(queries=100).run(reference_model(network), images, labels, epsilon=epsilon)
        theirs = SquareAttack(network, norm=norm, n_queries=100, eps=epsilon)
        held, held_too = (
            int((network(found).argmax(dim=1) == labels).sum())
            for found in (ours, theirs.perturb(images, labels))
        )
        assert 4 <= held_too <= 36
        assert abs(held - held_too) <= 5


def test_scores_are_the_runtimes_whatever_gives_its_gradients(sm_bundle: Bundle) -> None:
    dataset = load_dataset("mnist5k", "test")
    images, labels = dataset.images(np.arange(4)), dataset.labels[:4]
    spec = suite(["square"], [0.1], settings={"square": {"queries": 12}})[0]
    with open_runtime(sm_bundle, "onnxruntime-cpu", "fp32", RuntimeOptions(threads=1)) as runtime:
        by_reference = foolbox_model(runtime, load_reference(sm_bundle))
        native = foolbox_model(runtime, None, gradient="native")
        one, other = (
            perform(spec, QueryCounter(model, 4), images, labels, seeds=seeds(4))
            for model in (by_reference, native)
        )
    np.testing.assert_array_equal(one, other)


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in ({"queries": 0}, {"restarts": 0}, {"p_init": 0.0}, {"p_init": 1.5}):
        with pytest.raises(ValueError, match="Square"):
            LinfSquareAttack(**settings)
