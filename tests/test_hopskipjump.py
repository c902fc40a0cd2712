"""HopSkipJump against Foolbox's from the same start, an exact distance, and what it may know."""

from __future__ import annotations

from typing import Any

import foolbox as fb
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.attacks import hopskipjump, suite
from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
from ccn_deploy.attacks.hopskipjump import HopSkipJump
from ccn_deploy.attacks.passes import QueryCounter
from ccn_deploy.attacks.perform import perform
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference
from tests.rowwise import Rowwise, images_of, model_of

SHAPE = (1, 5, 5)


def seeds(n: int) -> np.ndarray:
    return np.stack([np.full(n, 3), np.arange(n)], axis=1)


def distances(found: Tensor, images: Tensor) -> Tensor:
    return (found - images).flatten(1).norm(dim=1)


@pytest.mark.parametrize("at", range(4))
def test_it_walks_as_foolboxs_from_the_same_start(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 4)
    start = (1 - images[at]).round()
    assert network(start[None]).argmax() != labels[at]
    one, label = images[at : at + 1], labels[at : at + 1]

    def from_there(oracle: Any, _: Any) -> Tensor:
        found: Tensor = oracle.boundary(start)
        return found

    generator = np.random.default_rng(5)

    def randn(shape: Any, **_: Any) -> Tensor:  # [steps, 1, C, H, W]
        drawn = generator.standard_normal((shape[0], *shape[2:]), np.float32)
        return torch.from_numpy(drawn)[:, None]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", randn)
        theirs = fb.attacks.HopSkipJumpAttack(steps=4, initial_gradient_eval_steps=20).run(
            model_of(network), one, label, starting_points=start[None]
        )
    network.seen.clear()
    with monkeypatch.context() as patched:
        patched.setattr(hopskipjump, "_start", from_there)
        attack = HopSkipJump(queries=320, gradient_queries=20, seeds=np.array([[5]]))
        ours = attack.run(model_of(network), one, label)
    # Where they stop, and the start of the fifth estimate, ours has been.
    seen = torch.cat(network.seen)
    assert distances(seen, theirs).min() < 1e-5
    assert distances(ours, one) <= distances(theirs, one) + 1e-6


def test_on_a_linear_classifier_it_comes_near_the_exact_distance() -> None:
    generator = np.random.default_rng(1)
    x = generator.uniform(0.4, 0.6, (1, 1, 5, 5))
    normal = generator.standard_normal(25)
    normal *= 0.3 / np.linalg.norm(normal)
    layer = nn.Linear(25, 2)
    layer.weight.data = torch.from_numpy(np.stack([normal, np.zeros(25)])).float()
    layer.bias.data = torch.tensor([0.3 * 0.2 - float(normal @ x.ravel()), 0.0])
    network = nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)
    images = torch.from_numpy(x).float()
    found = HopSkipJump(queries=3000).run(reference_model(network), images, torch.tensor([0]))
    assert int(network(found).argmax()) == 1
    assert 0.2 - 1e-5 <= float(distances(found, images)) <= 1.05 * 0.2


def test_an_image_is_attacked_the_same_in_every_batch_and_no_global_state_moves() -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 10)

    def run(chosen: list[int]) -> Tensor:
        torch.manual_seed(len(chosen))
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        attack = HopSkipJump(queries=200, gradient_queries=10, seeds=seeds(10)[chosen])
        found: Tensor = attack.run(model_of(network), images[chosen], labels[chosen])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]
        return found

    together = run(list(range(10)))
    assert torch.equal(together, torch.cat([run([at]) for at in range(10)]))
    assert torch.equal(together[[8, 1]], run([8, 1]))


def test_it_knows_only_labels() -> None:
    plain = Rowwise(SHAPE)
    hard = Rowwise(SHAPE, answer=lambda z: F.one_hot(z.argmax(), len(z)).double())
    images, labels = images_of(plain, SHAPE, 3)
    found = [HopSkipJump(queries=300).run(model_of(net), images, labels) for net in (plain, hard)]
    assert torch.equal(*found)


@pytest.mark.parametrize("queries", [1, 5, 40, 333])
def test_no_image_gets_more_than_its_queries_and_the_closest_is_kept(queries: int) -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 3)
    counter = QueryCounter(model_of(network), 3)
    network.seen.clear()
    found = HopSkipJump(queries=queries, seeds=seeds(3)).run(counter, images, labels)
    assert counter.queries.forward.max() <= queries
    assert counter.queries.forward.min() >= min(queries, 0.5 * queries)
    assert not counter.queries.backward.any()
    asked = iter(torch.cat(network.seen))
    for at in range(3):
        mine = torch.stack([next(asked) for _ in range(counter.queries.forward[at])])
        gone = mine[network(mine).argmax(dim=1) != labels[at]]
        if len(gone):
            assert torch.equal(found[at], gone[distances(gone, images[at]).argmin()])
        else:
            assert torch.equal(found[at], images[at])


def test_more_queries_come_nearer() -> None:
    network = Rowwise(SHAPE)
    images, labels = images_of(network, SHAPE, 6)
    few, many = (
        HopSkipJump(queries=n, seeds=seeds(6)).run(model_of(network), images, labels)
        for n in (200, 2000)
    )
    assert (distances(many, images) <= distances(few, images)).all()
    assert distances(many, images).mean() < 0.95 * distances(few, images).mean()


def test_a_failure_returns_the_image() -> None:
    always = Rowwise(SHAPE, answer=lambda z: torch.tensor([1.0, 0, 0, 0, 0]) + 0 * z)
    images, _ = images_of(always, SHAPE, 3)
    counter = QueryCounter(model_of(always), 3)
    found = HopSkipJump(queries=70).run(counter, images, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found, images)
    assert counter.queries.forward.tolist() == [70] * 3


def test_answers_that_contradict_each_other_end_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = Rowwise(SHAPE, answer=lambda z: z + torch.randn(5, generator=generator))
    images, labels = images_of(Rowwise(SHAPE), SHAPE, 3)
    found = HopSkipJump(queries=500).run(model_of(noisy), images, labels)
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1


def test_on_a_runtime(sm_bundle: Bundle) -> None:
    dataset = load_dataset("mnist5k", "test")
    images = dataset.images(dataset.order(0)[:4])
    (spec,) = suite(["hopskipjump"], settings={"hopskipjump": {"queries": 300}})
    with open_runtime(sm_bundle, "onnxruntime-cpu", "fp32", RuntimeOptions(threads=1)) as runtime:
        labels = runtime.logits(images).argmax(axis=1)
        model = QueryCounter(foolbox_model(runtime, load_reference(sm_bundle)), 4)
        found = perform(spec, model, images, labels, seeds=seeds(4))
        assert (runtime.logits(found).argmax(axis=1) != labels).all()
    assert (model.queries.forward <= 300).all()


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in ({"queries": 0}, {"gradient_queries": 0}):
        with pytest.raises(ValueError, match="HopSkipJump"):
            HopSkipJump(**settings)
