"""Low precision against the float64 reference: healthy bundles pass, planted faults do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch.nn import functional as F

from ccn_deploy.bundle import Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import IntegrityError, RuntimeUnavailableError
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.precision import Calibration, convert
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.parity import ParityRequest, ParityResult, collect, judge
from ccn_deploy.parity.rounding import RoundingModel, rounding_units
from ccn_deploy.parity.rounding_rules import Errors
from ccn_deploy.parity.tolerances import Arithmetic, tolerance_for
from ccn_deploy.verdict import Verdict
from tests import faults
from tests.networks import as_lowered, random_graph, random_network
from tests.precise import digits, with_precision

PRECISIONS = ("fp16", "int8", "fp8")


def parity(bundle: Bundle, precision: str, *, per_layer: bool = False) -> ParityResult:
    request = ParityRequest(
        dataset=load_dataset("mnist5k", "test"),
        precision=precision,
        samples=16,
        per_layer=per_layer,
        threads=1,
    )
    return judge(collect(bundle, request))


@pytest.fixture(scope="module")
def in_precision(
    exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """Return a function from a defense and a precision to a bundle that has that graph too."""
    made: dict[tuple[str, str], Bundle] = {}

    def bundle(defense: str, precision: str) -> Bundle:
        key = (defense, precision)
        if key not in made:
            output = tmp_path_factory.mktemp("precise") / f"{defense}-{precision}"
            calibration = digits() if precision in ("int8", "fp8") else None
            plain = open_bundle(exported(defense))
            gradient = calibration is None
            made[key] = with_precision(plain, output, precision, calibration, gradient=gradient)
        return made[key]

    return bundle


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_healthy_bundles_pass(
    in_precision: Callable[[str, str], Bundle], defense: str, precision: str
) -> None:
    result = parity(in_precision(defense, precision), precision, per_layer=True)
    assert result.verdict is Verdict.PASS, [finding.reasons for finding in result.failures]
    assert result.layers is not None and result.first_departure is None
    names = {finding.subject for finding in result.layers}
    assert {"conv1", "act1", "pool2", "fc3"} <= names
    assert max(finding.row.deviation.units for finding in result.inputs) > 0.01


def scaled(name: str, by: float) -> Callable[[onnx.GraphProto], None]:
    """Return an edit that multiplies a constant."""

    def edit(graph: onnx.GraphProto) -> None:
        for constant in graph.initializer:
            if constant.name == name:
                value = numpy_helper.to_array(constant)
                new = (value * np.float32(by)).astype(value.dtype)
                constant.CopyFrom(numpy_helper.from_array(new, name))

    return edit


def shift_zero_point(graph: onnx.GraphProto) -> None:
    """Let conv3 read its input eight steps off."""
    name = "conv3.input.shifted"
    graph.initializer.append(numpy_helper.from_array(np.array(8, np.int8), name))
    for node in graph.node:
        if node.name == "conv3.input":
            node.input[2] = name


FAULTS = {
    "weight scale": ("int8", scaled("conv3.weight.scale", 2.0), "conv3"),
    "zero point": ("int8", shift_zero_point, "conv3"),
    "delta": ("int8", scaled("fc1.delta", 100.0), "fc1"),
    "half weight": ("fp16", scaled("conv3.weight", 1.2), "conv3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail_and_their_layer_is_named(
    in_precision: Callable[[str, str], Bundle], tmp_path: Path, fault: str
) -> None:
    precision, edit, layer = FAULTS[fault]
    spoilt = faults.edited(in_precision("ccn", precision), tmp_path / "spoilt", edit)
    result = parity(spoilt, precision, per_layer=True)
    assert result.verdict is Verdict.FAIL
    assert result.first_departure is not None and result.first_departure.subject == layer


def test_a_scale_doubled_in_a_plain_network_fails(
    in_precision: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        """Double the scale only where the grid is left again."""
        constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        for node in graph.node:
            if node.name == "conv3.input":
                doubled = np.asarray(2 * constants[node.input[1]])
                graph.initializer.append(numpy_helper.from_array(doubled, "doubled"))
                node.input[1] = "doubled"

    spoilt = faults.edited(in_precision("sm", "int8"), tmp_path / "spoilt", edit)
    assert parity(spoilt, "int8").verdict is Verdict.FAIL


def test_a_grid_without_its_ranges_is_no_measurement(
    in_precision: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    bundle = in_precision("sm", "int8")
    files = [NewFile.copy(bundle, record) for record in bundle.manifest.files]
    files = [replace(file, details={}) for file in files]
    bare = write_bundle(tmp_path / "bare", card=bundle.card, files=files)
    with pytest.raises(IntegrityError, match="ranges"):
        parity(bare, "int8")


def test_bf16_is_refused_where_there_is_no_kernel(ccn_bundle: Bundle, tmp_path: Path) -> None:
    bundle = with_precision(ccn_bundle, tmp_path / "bf16", "bf16")
    with pytest.raises(RuntimeUnavailableError, match="bf16"):
        parity(bundle, "bf16")


# The model of a grid


@pytest.mark.parametrize("defense", ["sm", "ccn"])
def test_first_draw_is_the_deployed_grid(defense: str) -> None:
    """Against a network quantised by hand, in float64, where every rounding is written out."""
    model = random_network("mnist-cnn", defense)
    images = np.random.default_rng(0).random((2, 1, 28, 28), dtype=np.float32)
    calibration = convert(Graph(lower(model)), "int8", Calibration(images)).calibration
    assert calibration is not None
    ranges = calibration["ranges"]
    arithmetic = Arithmetic(0.0, 0.0, 0.0, "int8")
    errors = Errors(torch.Generator().manual_seed(0), draws=2)
    graph = random_graph("mnist-cnn", defense)
    doubles = torch.from_numpy(images).double()
    *_, (_, noisy) = RoundingModel(graph, arithmetic, errors, ranges).run(doubles)
    truth = by_hand(as_lowered(model), doubles, ranges)
    assert np.allclose(noisy[:2].numpy(), truth, rtol=1e-9)
    assert not np.allclose(noisy[2:].numpy(), truth, rtol=1e-6)


def by_hand(
    model: torch.nn.Module, x: torch.Tensor, ranges: dict[str, float]
) -> NDArray[np.float64]:
    for name, layer in model.named_layers():  # type: ignore[operator]
        if not hasattr(layer, "weight"):
            x = layer(x)
            continue
        weight = layer.weight
        if name in ranges:
            step = ranges[name] / 127
            x = step * torch.round(x / step).clamp(-127, 127)
            sides = [1] * (weight.dim() - 1)
            steps = (weight.abs().flatten(1).max(1).values / 127).view(-1, *sides)
            weight = steps * torch.round(weight / steps)
        convolution = weight.dim() == 4
        y = F.conv2d(x, weight) if convolution else x @ weight.T
        if hasattr(layer, "alpha"):
            squares = (x * x).sum(1, keepdim=True)
            squares = F.conv2d(squares, torch.ones(1, 1, 3, 3).double()) if convolution else squares
            y = layer.alpha * y / (squares.clamp(min=1e-12).sqrt() + layer.delta)
        x = y + (layer.bias.view(-1, 1, 1) if convolution else layer.bias)
    return x.numpy()


def test_weights_that_nodes_make_are_on_the_grid_as_stored_ones_are() -> None:
    """Files without weights of their own, such as onnx's light models, have ConstantOfShape."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((4, 1, 3, 3)).astype(np.float32)
    value = np.array([0.3], dtype=np.float32)
    images = torch.from_numpy(rng.random((2, 1, 8, 8), dtype=np.float32)).double()
    arithmetic = tolerance_for("int8").arithmetic
    units = []
    for made in (False, True):
        builder = GraphBuilder()
        weight = builder.constant("conv1.weight", first)
        x = builder.node("Relu", [builder.node("Conv", ["images", weight], "conv1")], "relu")
        x = builder.node("Flatten", [builder.node("GlobalAveragePool", [x], "pool")], "flat")
        if made:
            shape = builder.constant("fc.shape", np.array([4, 3], dtype=np.int64))
            tensor = numpy_helper.from_array(value)
            weight = builder.node("ConstantOfShape", [shape], "fc.weight", value=tensor)
        else:
            weight = builder.constant("fc.weight", np.full((4, 3), value, dtype=np.float32))
        builder.node("MatMul", [x, weight], "fc", output="logits")
        model = builder.model("t", {"images": ["batch", 1, 8, 8]}, {"logits": ["batch", 3]})
        exact = GraphModule(Graph(model), torch.float64)
        units.append(rounding_units(exact, images, arithmetic, ranges={"fc": 2.0})["fc"])
    stored, made_of_nodes = units
    assert made_of_nodes == stored > 1e-4


def test_units_grow_with_the_coarseness_of_the_format() -> None:
    model = random_network("mnist-cnn", "ccn")
    images = np.random.default_rng(0).random((2, 1, 28, 28), dtype=np.float32)
    calibration = convert(Graph(lower(model)), "int8", Calibration(images)).calibration
    assert calibration is not None
    exact = random_graph("mnist-cnn", "ccn")
    units = [
        list(
            rounding_units(
                exact,
                torch.from_numpy(images).double(),
                tolerance_for(precision).arithmetic,
                ranges=calibration["ranges"] if precision in ("int8", "fp8") else None,
            ).values()
        )[-1]
        for precision in ("fp32", "fp16", "int8", "fp8")
    ]
    assert units == sorted(units) and units[0] < units[1] / 100
