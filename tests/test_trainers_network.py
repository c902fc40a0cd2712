"""Training networks of one's own: seeded, resumed to the same bits, exported from the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn

from ccn_deploy.data import Dataset, Split
from ccn_deploy.errors import IntegrityError, UsageError
from ccn_deploy.exporters.sources.module import trained_module
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.runs import open_run
from ccn_deploy.trainers import Event, Recipe, TrainConfig, train
from ccn_deploy.trainers.network import scalars
from tests.trainings import BLOCK

RECIPE = Recipe("test", 2, 16, 0.05, (1.5,), 0.1, warmup_steps=2)
FACTORY = (
    BLOCK
    + """

class Tied(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.one = nn.Linear(144, 144)
        self.two = self.one
        self.frozen = nn.Linear(144, 144).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(144, classes)

    def forward(self, x):
        return self.fc(self.frozen(torch.relu(self.two(self.one(x.flatten(1))))))


def five():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 5))


def pooled(classes):
    return nn.Sequential(nn.AvgPool2d(12), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, classes))


def frozen(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, classes)).requires_grad_(False)
"""
)


@pytest.fixture
def factory(tmp_path: Path) -> Callable[[str], str]:
    file = tmp_path / f"nets_{tmp_path.name}.py"
    file.write_text(FACTORY)
    return lambda name: f"{file}:{name}"


def bands(split: Split, count: int) -> Dataset:
    labels = np.arange(count, dtype=np.int64) % 3
    images = np.random.default_rng(len(split)).uniform(0, 0.5, (count, 1, 12, 12))
    for image, label in zip(images, labels, strict=True):
        image[:, label * 4 : label * 4 + 4] += 0.5
    fetch = partial(np.take, images.astype(np.float32), axis=0)
    return Dataset("bands", split, ("a", "b", "c"), (1, 12, 12), labels, fetch, digest=split)


DATA = bands("train", 64), bands("test", 30)


def config(network: str, **changes: Any) -> TrainConfig:
    return replace(
        TrainConfig(dataset="bands", recipe=RECIPE, threads=1, network=network), **changes
    )


class StopError(Exception):
    pass


def stop_after_the_first_epoch(event: Event) -> None:
    if type(event).__name__ == "EpochEnded":
        raise StopError


@pytest.mark.parametrize("compact", [None, "all"])
def test_a_resumed_run_with_batch_normalisation_and_dropout_ends_with_the_same_bits(
    compact: str | None, factory: Callable[[str], str], tmp_path: Path
) -> None:
    torch.manual_seed(99)  # must not matter
    settings = config(factory("Block"), compact=compact)
    whole = train(settings, *DATA, tmp_path / "whole")
    torch.rand(7)
    with pytest.raises(StopError):
        train(settings, *DATA, tmp_path / "cut", watcher=stop_after_the_first_epoch)
    assert train(settings, *DATA, tmp_path / "cut").weights == whole.weights
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert record.get("compact") == (["conv", "fc"] if compact else None)
    weights = load(whole.weights)
    assert weights["bn.num_batches_tracked"] == 8 and weights["bn.running_mean"].any()
    other = train(replace(settings, seed=1), *DATA, tmp_path / "other")
    assert other.weights != whole.weights
    assert whole.card.training["test_accuracy"] > 0.6  # chance is a third


def test_two_processes_agree_on_running_statistics(
    factory: Callable[[str], str], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, epochs=1)
    settings = config(factory("Block"), compact="all", devices=2, recipe=recipe)
    whole = train(settings, *DATA, tmp_path / "whole")
    images = torch.from_numpy(DATA[1].images(range(30)))
    right = (trained_module(whole)(images).argmax(1).numpy() == DATA[1].labels).mean()
    assert right == pytest.approx(whole.card.training["test_accuracy"])


def test_the_run_says_what_was_trained_and_brings_the_network_back(
    factory: Callable[[str], str], tmp_path: Path
) -> None:
    settings = config(factory("Block"), compact="all", label_smoothing=0.1)
    train(settings, *DATA, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["network"] == settings.network and record["compact"] == ["conv", "fc"]
    assert record["input_shape"] == [1, 12, 12] and "architecture" not in record
    assert record["training"]["label_smoothing"] == 0.1
    run = open_run(tmp_path / "run")
    assert (run.network, run.compact) == (settings.network, ("conv", "fc"))
    assert (run.card.architecture, run.card.defense) == ("", "")
    network = trained_module(run)
    assert isinstance(network.conv, CompactConv2d) and isinstance(network.fc, CompactLinear)
    images = torch.from_numpy(DATA[1].images(range(30)))
    right = (network(images).argmax(1).numpy() == DATA[1].labels).mean()
    assert right == pytest.approx(run.card.training["test_accuracy"])

    Path(settings.network.rpartition(":")[0]).write_text(FACTORY.replace("4 * 10 * 10", "400 + 0"))
    trained_module(run)
    changed = replace(run, compact=("fc",))
    with pytest.raises(IntegrityError, match="do not fit what"):
        trained_module(changed)


def test_tied_frozen_and_unused_parameters(factory: Callable[[str], str], tmp_path: Path) -> None:
    settings = config(factory("Tied"))
    whole = train(settings, *DATA, tmp_path / "whole")
    with pytest.raises(StopError):
        train(settings, *DATA, tmp_path / "cut", watcher=stop_after_the_first_epoch)
    assert train(settings, *DATA, tmp_path / "cut").weights == whole.weights
    network = trained_module(whole)
    assert network.one is network.two


def test_training_is_sgd_on_the_compact_network(
    factory: Callable[[str], str], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, epochs=1, batch_size=64, drops=(), warmup_steps=0, clip_norm=None,
                     weight_decay=0.01)  # fmt: skip
    settings = config(factory("five"), recipe=recipe, compact=("1",), label_smoothing=0.2)
    with pytest.raises(UsageError, match=r"gives 5 logits; bands has 3 classes\.\n.*num_classes"):
        train(settings, *DATA, tmp_path / "run")
    source = Path(settings.network.rpartition(":")[0])
    more = source.with_name("more.py")
    more.write_text(FACTORY.replace("def five():", "def three():").replace("144, 5", "144, 3"))
    run = train(replace(settings, network=f"{more}:three"), *DATA, tmp_path / "run")
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    weight, bias = expected[1].weight, expected[1].bias
    alpha = torch.ones((), requires_grad=True)
    order = np.random.default_rng([0, 0]).permutation(64)
    x = torch.from_numpy(DATA[0].images(order)).flatten(1)
    logits = alpha * x @ weight.T / (x.norm(dim=1, keepdim=True) + 0.01) + bias
    targets = torch.full((64, 3), 0.1)
    targets[range(64), DATA[0].labels[order]] = 0.8
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    slopes = torch.autograd.grad(loss, [weight, bias, alpha])
    found = load(run.weights)
    for name, value, slope, decay in zip(
        ("1.weight", "1.bias", "1.alpha"),
        (weight, bias, alpha),
        slopes,
        (0.01, 0.01, 0),
        strict=True,
    ):
        after = value - 0.05 * (slope + decay * value)
        np.testing.assert_allclose(found[name], after.detach(), atol=1e-6)


def test_alpha_and_a_learned_delta_are_spared_by_weight_decay() -> None:
    network = nn.Sequential(CompactLinear(2, 2, learn_delta=True), nn.Linear(2, 2))
    network.alpha = nn.Parameter(torch.ones(3))  # the user's own
    found = scalars(network)
    assert [p is q for p, q in zip(found, (network[0].alpha, network[0].delta), strict=True)] == [
        True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("Block", {"compact": ("cnv",)}, "no layer 'cnv'.\n.*'conv'"),
        ("Block", {"defense": "sm"}, "has no defense of this package"),
        ("Block", {"architecture": "mnist-cnn"}, "has no architecture of this package"),
        ("Block", {"label_smoothing": 1.0}, "label smoothing is 1.0"),
        ("Blok", {}, "has no 'Blok'.\nIt has: Block, Tied"),
        ("frozen", {}, "no parameter to train"),
        ("pooled", {"batch_size": 63}, "on 1 images: ValueError: .*\n.*another --batch-size"),
    ],
)
def test_what_cannot_be_trained(
    name: str, changes: dict[str, Any], says: str, factory: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        train(config(factory(name), **changes), *DATA, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "run").exists() or name == "pooled"


def test_label_smoothing_by_a_number_needs_a_network_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for a network of your own") as caught:
        train(TrainConfig(dataset="bands", label_smoothing=0.1), *DATA, tmp_path / "run")
    assert "--defense ls" in caught.value.hint


def test_a_run_goes_on_only_with_the_same_layers(
    factory: Callable[[str], str], tmp_path: Path
) -> None:
    settings = config(factory("Block"), compact=("fc",))
    train(settings, *DATA, tmp_path / "run")
    assert train(replace(settings, compact="last"), *DATA, tmp_path / "run").compact == ("fc",)
    with pytest.raises(UsageError, match=r"compact was .*'fc'.* is now"):
        train(replace(settings, compact="all"), *DATA, tmp_path / "run")
