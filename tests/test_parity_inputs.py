from __future__ import annotations

import numpy as np
import pytest
import torch

from ccn_deploy.data import Dataset, dataset_from_arrays
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.parity.inputs import EPSILONS, KINDS, NEAR_MEAN_NOISE, craft, make_inputs
from tests.networks import random_graph


def random_graph32(defense: str) -> GraphModule:
    return random_graph("mnist-cnn", defense, torch.float32)


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 1, 28, 28), dtype=np.uint8)
    names = [str(label) for label in range(10)]
    return dataset_from_arrays("noise", pixels, np.arange(40) % 10, names, split="test")


def test_every_kind_is_images_in_the_unit_box(data: Dataset) -> None:
    probes = make_inputs(random_graph32("ccn"), data, 12, seed=0)
    assert tuple(probe.kind for probe in probes) == KINDS
    for probe in probes:
        assert probe.images.dtype == np.float32
        assert 0.0 <= probe.images.min() <= probe.images.max() <= 1.0
        assert len(probe.images) == (1 if probe.kind in ("zero", "one") else 12)
        assert len(probe.take(12)) == 12
    near = next(probe for probe in probes if probe.kind == "near-mean").images
    assert 0.9 * NEAR_MEAN_NOISE < np.abs(near - 0.5).max() <= 1.001 * NEAR_MEAN_NOISE
    assert len(np.unique(near)) > 1000


def test_a_larger_probe_holds_every_smaller_one(data: Dataset) -> None:
    reference = random_graph32("sm")
    few, many = (make_inputs(reference, data, n, seed=3)[0].images for n in (9, 30))
    assert np.array_equal(few, many[:9])


def test_more_samples_than_images_are_all_images(data: Dataset) -> None:
    probes = make_inputs(random_graph32("sm"), data, 100, seed=0)
    assert [len(probe.images) for probe in probes] == [40, 40, 40, 1, 1, 40]


@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_crafted_images_raise_the_loss_and_stay_within_epsilon(defense: str, data: Dataset) -> None:
    reference = random_graph32(defense)
    clean, labels = data.images(range(12)), data.labels[:12]
    crafted = craft(reference, clean, labels)
    moved = np.abs(crafted - clean).max(axis=(1, 2, 3))
    allowed = np.array([EPSILONS[i % len(EPSILONS)] for i in range(12)])
    assert (moved <= allowed + 1e-6).all()
    assert (moved > 0.5 * allowed).all()

    def loss(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            each = torch.nn.functional.cross_entropy(
                reference(torch.from_numpy(x)), torch.from_numpy(labels), reduction="none"
            )
        return each.numpy()

    assert (loss(crafted) > loss(clean)).mean() > 0.9
