"""The systems of table 9 and 13: BN, LRN, and compact layers one at a time."""

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
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy import robustness
from ccn_deploy.architectures import ARCHITECTURES, architecture_named
from ccn_deploy.attacks import suite
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import Dataset, load_dataset
from ccn_deploy.errors import IntegrityError, LoweringError, UsageError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.calibration import CalibrationRequest
from ccn_deploy.exporters.lowering import LOWERINGS, lower
from ccn_deploy.exporters.rederive import rederive, refuse_differences
from ccn_deploy.exporters.sources.run import run_network
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import build_model
from ccn_deploy.parity import ParityRequest, collect, judge
from ccn_deploy.robustness import RobustnessRequest
from ccn_deploy.runs import open_run
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.storage import canonical_json
from ccn_deploy.trainers import Event, Recipe, TrainConfig, train
from ccn_deploy.verdict import Verdict
from tests.equation_10 import equation_10
from tests.networks import as_run, random_network

LAYERS = ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3")
RECIPE = Recipe("test", 2, 32, 0.05, (1.5,), 0.1, warmup_steps=4)
CONFIG = TrainConfig(dataset="mnist5k", recipe=RECIPE, threads=1)


def some(data: Dataset, count: int) -> Dataset:
    """Return a few images of all digits."""
    chosen = data.order()[:count]
    fetch = partial(np.take, data.images(chosen), axis=0)
    return replace(data, labels=data.labels[chosen], fetch=fetch)


@pytest.fixture(scope="module")
def digits() -> tuple[Dataset, Dataset]:
    return some(load_dataset("mnist5k", "train"), 96), some(load_dataset("mnist5k", "test"), 40)


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(7).random((count, *shape), dtype=np.float32)


# Where the normalisations are


def test_batch_normalisation_is_before_every_activation() -> None:
    names = [name for name, _ in build_model("mnist-cnn", "bn").named_layers()]
    assert names == [
        "mean",
        "conv1", "norm1", "act1", "conv2", "norm2", "act2", "pool1",
        "conv3", "norm3", "act3", "conv4", "norm4", "act4", "pool2",
        "flatten", "fc1", "norm5", "act5", "fc2", "norm6", "act6", "fc3",
    ]  # fmt: skip


def test_local_response_normalisation_is_after_the_activation_of_every_convolution() -> None:
    names = [name for name, _ in build_model("mnist-cnn", "lrn").named_layers()]
    assert names == [
        "mean",
        "conv1", "act1", "norm1", "conv2", "act2", "norm2", "pool1",
        "conv3", "act3", "norm3", "conv4", "act4", "norm4", "pool2",
        "flatten", "fc1", "act5", "fc2", "act6", "fc3",
    ]  # fmt: skip


def test_it_starts_from_the_weights_of_sm() -> None:
    plain, normalised = (build_model("mnist-cnn", d, seed=5).state_dict() for d in ("sm", "bn"))
    assert all(torch.equal(normalised[name], weights) for name, weights in plain.items())
    assert set(normalised["norm2.weight"].tolist()) == {1.0}
    assert set(normalised["norm5.bias"].tolist()) == {0.0}


# What they compute


def logits_of(defense: str, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The MNIST network of table 10 in torch's functions, normalised by formula."""

    def batch(x: Tensor, name: str) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        scale, shift, mean, variance = (
            weights[f"{name}.{what}"].view(shape)
            for what in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = x - 0.5
    for index in (1, 2, 3, 4):
        x = F.conv2d(x, weights[f"conv{index}.weight"], weights[f"conv{index}.bias"])
        x = F.relu(batch(x, f"norm{index}") if defense == "bn" else x)
        if defense == "lrn":
            x = torch.from_numpy(equation_10(x.numpy()))
        x = F.max_pool2d(x, 2) if index in (2, 4) else x
    x = x.flatten(1)
    for index in (1, 2):
        x = F.linear(x, weights[f"fc{index}.weight"], weights[f"fc{index}.bias"])
        x = F.relu(batch(x, f"norm{index + 4}") if defense == "bn" else x)
    return F.linear(x, weights["fc3.weight"], weights["fc3.bias"])


@pytest.mark.parametrize("defense", ["bn", "lrn"])
def test_module_graph_and_runtime_compute_the_formula(defense: str, tmp_path: Path) -> None:
    model = random_network("mnist-cnn", defense)
    bundle = export_bundle(as_run(model), tmp_path / "bundle", gradient=False)
    images = 4 * noise(3, 1, 28, 28)  # beyond [0, 1], so that the squares of LRN count
    inside = torch.from_numpy(images).double()
    exact = {name: tensor.double() for name, tensor in model.state_dict().items()}
    truth = logits_of(defense, inside, exact).numpy()
    scale = np.abs(truth).max()
    graph = GraphModule(Graph(lower(model)), torch.float64)
    assert model.double()(inside).numpy() == pytest.approx(truth, abs=1e-12 * scale, rel=0)
    assert graph(inside).numpy() == pytest.approx(truth, abs=1e-7 * scale, rel=0)
    images = images / 4
    truth = logits_of(defense, torch.from_numpy(images).double(), exact).numpy()
    with open_runtime(bundle) as runtime:
        assert runtime.logits(images) == pytest.approx(truth, abs=1e-5 * scale, rel=0)


def test_the_sum_of_equation_10_is_not_divided() -> None:
    """Five channels of 100: 2 + 1e-4 * 5 * 100 ** 2 = 7 in the middle, 5 at the edges."""
    layer = build_model("mnist-cnn", "lrn").norm1
    found = layer(torch.full((1, 5, 1, 1), 100.0, dtype=torch.float64)).flatten()
    near = np.array([3, 4, 5, 4, 3])
    assert found.numpy() == pytest.approx(100 / (2 + near) ** 0.75, rel=1e-12)


@pytest.mark.parametrize("defense", ["bn", "lrn"])
def test_the_deployed_layers_are_those_of_the_module(defense: str, tmp_path: Path) -> None:
    model = random_network("mnist-cnn", defense)
    bundle = export_bundle(as_run(model), tmp_path / "bundle", gradient=False)
    images = noise(2, 1, 28, 28)
    outputs = {}
    x = torch.from_numpy(images).double()
    for name, layer in model.double().named_layers():
        outputs[name] = x = layer(x)
    names = tuple(name for name in outputs if name.startswith("norm"))
    found = open_layer_outputs(bundle)(images)
    for name in names:
        wanted = outputs[name].numpy()
        assert found[name] == pytest.approx(wanted, abs=1e-5 * np.abs(wanted).max(), rel=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.LocalResponseNorm(4),
    ],
)
def test_what_has_no_lowering_is_refused(layer: nn.Module) -> None:
    with pytest.raises(LoweringError, match=r"'norm1' is a .*normalisation"):
        LOWERINGS[type(layer)](GraphBuilder(), layer, "norm1", "x", "y")


# Training


class StopError(Exception):
    pass


def stop_after_the_first_epoch(event: Event) -> None:
    if type(event).__name__ == "EpochEnded":
        raise StopError


@pytest.mark.parametrize("defense", ["bn", "lrn"])
def test_a_resumed_run_ends_with_the_same_bits(
    defense: str, digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    config = replace(CONFIG, defense=defense)
    whole = train(config, *digits, tmp_path / "whole")
    with pytest.raises(StopError):
        train(config, *digits, tmp_path / "cut", watcher=stop_after_the_first_epoch)
    assert train(config, *digits, tmp_path / "cut").weights == whole.weights
    weights = load(whole.weights)
    assert ("norm1.running_mean" in weights) == (defense == "bn")
    if defense == "bn":
        assert (
            weights["norm6.num_batches_tracked"] == 6 and weights["norm6.running_var"].ne(1).any()
        )


def test_running_statistics_are_momentums_of_the_batches(
    digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    """One step on all images: a tenth of the statistics of conv1's output of fresh weights."""
    recipe = replace(RECIPE, epochs=1, batch_size=96, drops=())
    run = train(replace(CONFIG, defense="bn", recipe=recipe), *digits, tmp_path / "run")
    fresh = build_model("mnist-cnn", "bn", seed=0)
    with torch.no_grad():
        x = fresh.conv1(torch.from_numpy(digits[0].images(range(96))) - 0.5)
    found = load(run.weights)
    torch.testing.assert_close(found["norm1.running_mean"], 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(found["norm1.running_var"], 0.9 + 0.1 * x.var((0, 2, 3)))


def test_weight_decay_takes_scale_and_shift_too(
    digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    """The paper's is on all weights; one step with and without it differs by rate * decay * w."""
    recipe = replace(RECIPE, epochs=1, batch_size=96, drops=(), warmup_steps=0, clip_norm=None)
    found = [
        load(
            train(
                replace(CONFIG, defense="bn", recipe=replace(recipe, weight_decay=decay)),
                *digits,
                tmp_path / str(decay),
            ).weights
        )
        for decay in (0.0, 0.5)
    ]
    for name, start in (("norm1.weight", 1.0), ("norm5.weight", 1.0), ("norm5.bias", 0.0)):
        moved = found[0][name] - found[1][name]
        assert moved.numpy() == pytest.approx(0.05 * 0.5 * start, abs=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "devices", "says"),
    [(95, 1, "96 images in batches of 95 leave"), (1, 1, "leave"), (32, 17, "among 17 processes")],
)
def test_a_batch_that_leaves_one_image_alone_is_refused(
    batch_size: int, devices: int, says: str, digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    config = replace(CONFIG, defense="bn", batch_size=batch_size, devices=devices)
    with pytest.raises(UsageError, match=says) as caught:
        train(config, *digits, tmp_path / "run")
    assert "--batch-size" in caught.value.hint
    assert not (tmp_path / "run").exists()


# Which layers are compact


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("defense", ["sm", "bn"])
def test_an_architecture_names_the_layers_that_are_built(architecture: str, defense: str) -> None:
    with torch.device("meta"):
        model = build_model(architecture, defense)
    assert architecture_named(architecture).weighted_layers() == tuple(
        name for name, layer in model.named_layers() if isinstance(layer, nn.Conv2d | nn.Linear)
    )


def compact_layers(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_children() if isinstance(m, CompactConv2d | CompactLinear)}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        *((name, {name}) for name in LAYERS),
        (("fc1", "conv2"), {"conv2", "fc1"}),
        ("all", set(LAYERS)),
        ("last", {"fc3"}),
        ("none", set()),
        ((), set()),
    ],
)
def test_any_layers_can_be_compact(where: str | tuple[str, ...], wanted: set[str]) -> None:
    for defense in ("sm", "ccn", "bn"):
        assert compact_layers(build_model("mnist-cnn", defense, compact=where)) == wanted


def test_an_unknown_layer_lists_the_layers() -> None:
    with pytest.raises(UsageError, match="mnist-cnn has no layer 'conv5'") as caught:
        build_model("mnist-cnn", "sm", compact=("conv1", "conv5"))
    assert "all, last, none" in caught.value.hint and ", ".join(LAYERS) in caught.value.hint


@pytest.mark.parametrize(
    ("defense", "compact", "same"),
    [
        ("sm", ("fc3",), "l2sm"),
        ("sm", "all", "ccn"),
        ("ccn", "none", "sm"),
        ("ls", "all", "ccn+ls"),
    ],
)
def test_named_layers_train_to_the_bits_of_the_defense_that_has_them(
    defense: str, compact: Any, same: str, digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    chosen = train(replace(CONFIG, defense=defense, compact=compact), *digits, tmp_path / "chosen")
    named = train(replace(CONFIG, defense=same), *digits, tmp_path / "named")
    assert chosen.weights == named.weights
    assert chosen.compact == named.compact
    (_, ours), (_, theirs) = run_network(chosen), run_network(named)
    assert ours.model == theirs.model
    assert chosen.card.name.startswith(f"mnist-cnn-{defense}-compact-")
    assert named.card.name == f"mnist-cnn-{same}"


@pytest.mark.parametrize(("defense", "where"), [("sm", "none"), ("l2sm", "last"), ("ccn", LAYERS)])
def test_what_the_defense_says_itself_needs_no_word(
    defense: str, where: Any, digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    run = train(replace(CONFIG, defense=defense, compact=where), *digits, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert "compact" not in json.loads(before)
    assert run.card.name == f"mnist-cnn-{defense}" and run.card.chosen_layers is None
    assert train(replace(CONFIG, defense=defense), *digits, tmp_path / "run") == run
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_run_with_one_compact_layer_opens_and_derives_again(
    digits: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    config = replace(CONFIG, defense="sm", compact=("conv1",))
    run = train(config, *digits, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert (record["defense"], record["compact"]) == ("sm", ["conv1"])
    assert open_run(tmp_path / "run") == run
    assert run.card.name == "mnist-cnn-sm-compact-conv1"
    assert run.card.title == "sm-compact-conv1 on mnist-cnn"
    assert compact_layers(run_network(run)[0]) == {"conv1"}
    bundle = export_bundle(run, tmp_path / "bundle", precisions=("fp16",))
    assert bundle.card.chosen_layers == ("conv1",)
    assert bundle.card.source.agreement["module"] < 1e-6 * bundle.card.source.agreement["scale"]
    found = rederive(bundle)
    refuse_differences(found)
    assert {file.path for file in found if file.status == "same"} == {
        f"graphs/{role}-{precision}.onnx"
        for role in ("forward", "gradient")
        for precision in ("fp32", "fp16")
    }
    with pytest.raises(UsageError, match=r"compact was .*'conv1'.* is now"):
        train(replace(config, compact=("conv2",)), *digits, tmp_path / "run")
    with pytest.raises(UsageError, match="compact was"):
        train(replace(config, compact=None), *digits, tmp_path / "run")


def _without(record: dict[str, Any]) -> None:
    del record["compact"]


def _unknown(record: dict[str, Any]) -> None:
    record["compact"] = ["conv9"]


def _another(record: dict[str, Any]) -> None:
    record["compact"] = ["conv2"]


@pytest.mark.parametrize(
    ("edit", "says"), [(_without, "alpha"), (_unknown, "conv9"), (_another, "alpha")]
)
def test_a_record_that_names_other_layers_is_refused(
    edit: Callable[[dict[str, Any]], None],
    says: str,
    digits: tuple[Dataset, Dataset],
    tmp_path: Path,
) -> None:
    train(replace(CONFIG, defense="sm", compact=("conv1",)), *digits, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_bytes())
    edit(record)
    file.write_bytes(canonical_json(record))
    with pytest.raises(IntegrityError, match=says):
        export_bundle(open_run(tmp_path / "run"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# From training to a proof


@pytest.fixture(scope="module", params=["bn", "lrn"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A briefly trained network with every derived graph."""
    path, test = tmp_path_factory.mktemp(request.param), load_dataset("mnist5k", "test")
    data = some(load_dataset("mnist5k", "train"), 400), some(test, 100)
    run = train(replace(CONFIG, defense=request.param, epochs=3), *data, path / "run")
    assert run.card.training["test_accuracy"] > 0.5  # chance is a tenth
    return export_bundle(
        run,
        path / "bundle",
        optimize="onnxruntime-cpu",
        precisions=("fp16", "int8"),
        calibration=CalibrationRequest(dataset="mnist5k", samples=32),
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_trained_network_passes_parity(precision: str, deployed: Bundle) -> None:
    data = load_dataset("mnist5k", "test")
    request = ParityRequest(data, precision=precision, samples=8, threads=1)
    assert judge(collect(deployed, request)).verdict is Verdict.PASS


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_trained_network_is_attacked_by_its_runtime(precision: str, deployed: Bundle) -> None:
    request = RobustnessRequest(
        load_dataset("mnist5k", "test"),
        precision=precision,
        attacks=suite(["fgsm"], [0.2]),
        samples=10,
        options=RuntimeOptions(threads=1),
    )
    result = robustness.judge(robustness.collect(deployed, request), 0.4)  # ten images show no less
    assert result.verdict is Verdict.PASS
    assert result.bounded[0].runtime.value < result.clean.runtime.value
