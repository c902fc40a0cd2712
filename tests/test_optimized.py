from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from typer.testing import CliRunner

from ccn_deploy.architectures import Architecture
from ccn_deploy.bundle import Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.defenses import DEFENSES as BY_NAME
from ccn_deploy.errors import LoweringError, UsageError
from ccn_deploy.exporters import bundle_graphs, export_bundle
from ccn_deploy.exporters import canonical as canonical_form
from ccn_deploy.exporters.calibration import CalibrationRequest
from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.compact import Window
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.optimized import check_optimized, differs, optimize
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier
from ccn_deploy.parity import ParityRequest, ParityResult, collect, judge
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.targets import Target
from ccn_deploy.verdict import Verdict
from tests.modules import MODULES, exported, foreign_graph
from tests.networks import DEFENSES, as_run, difficult_images, random_network

TARGET = "onnxruntime-cpu"
FILE = "graphs/forward-fp32-onnxruntime-cpu.onnx"


def test_passes_share_one_canonical_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = [], []
    raised, graph_of = canonical_form._raised, bundle_graphs.graph_of
    monkeypatch.setattr(
        canonical_form, "_raised", lambda model: made.append(model) or raised(model)
    )
    monkeypatch.setattr(
        bundle_graphs, "graph_of", lambda file: read.append(file.path) or graph_of(file)
    )
    run = as_run(random_network("mnist-cnn", "ccn"))
    calibration = CalibrationRequest(dataset="mnist5k", samples=8)
    bundle = export_bundle(
        run, tmp_path / "bundle", optimize=TARGET, precisions=("int8",), calibration=calibration
    )
    assert len(bundle.manifest.files) == 5  # weights, forward twice, gradient, int8
    assert len(made) == 1
    assert read == ["graphs/forward-fp32.onnx"]


# The function


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("architecture", ["mnist-cnn", "vgg11-cifar10"])
def test_runtime_computes_the_network(architecture: str, defense: str, tmp_path: Path) -> None:
    model = random_network(architecture, defense)
    bundle = export_bundle(as_run(model), tmp_path / "bundle", gradient=False, optimize=TARGET)
    images = difficult_images(model.architecture.input_shape)
    truth = model.double()(torch.from_numpy(images).double()).numpy()

    with open_runtime(bundle) as runtime:
        deployed = runtime.logits(images)

    assert np.isfinite(deployed).all()
    assert deployed == pytest.approx(truth, abs=1e-5 * np.abs(truth).max(), rel=0)


@settings(deadline=None, max_examples=25)
@given(
    channels=st.integers(1, 5),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    activation=st.sampled_from([nn.ReLU, BoundedReLU, None]),
    silent=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_window_and_activation(
    channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    activation: type[nn.Module] | None, silent: bool, seed: int,
) -> None:  # fmt: skip
    shape = (channels, 7, 6)
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=CompactConv2d(channels, 3, kernel, stride=stride, padding=padding)  # type: ignore[arg-type]
    )
    if activation is not None:
        layers["act1"] = activation()
    layers["flatten"] = nn.Flatten()
    with torch.no_grad():
        features = nn.Sequential(layers)(torch.zeros(1, *shape)).numel()
    layers["fc1"] = CompactLinear(features, 3)
    model = Classifier(
        layers, Architecture("odd", "", shape, (), 0, (), 0.0, 3), BY_NAME["ccn"]
    ).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_() if not name.endswith("alpha") else parameter.fill_(7.0)
    x = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    if silent:
        x[:, :, :4] = 0.0
    forward = Graph(lower(model))
    graph = optimize(forward)
    check_optimized(graph, forward)
    assert not {"ReduceSumSquare", "Div"} & {
        n.op_type for n in graph.graph.node if "fc" not in n.name
    }

    (got,) = ReferenceEvaluator(graph).run(None, {"images": x})

    truth = model.double()(torch.from_numpy(x).double()).numpy()
    assert got == pytest.approx(truth, abs=2e-5 * max(1.0, np.abs(truth).max()), rel=0)


def test_an_empty_patch_gives_the_bias() -> None:
    model = random_network("mnist-cnn", "ccn")
    graph = optimize(Graph(lower(model)))
    graph.graph.output.append(onnx.ValueInfoProto(name="act1"))
    mean = np.full((1, 1, 28, 28), 0.5, dtype=np.float32)

    _, act1 = ReferenceEvaluator(graph).run(None, {"images": mean})

    bias = np.maximum(model.get_submodule("conv1").bias.numpy(), 0)[:, None, None]
    assert act1[0] == pytest.approx(np.broadcast_to(bias, act1[0].shape), rel=1e-6)


@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_window_sums_add_up_windows(stride: int, dilation: int, pads: tuple[int, int]) -> None:
    x = np.arange(1.0, 8.0)
    padded = np.pad(x, pads)
    starts = range(0, len(padded) - 2 * dilation, stride)
    window = Window((7, 1), (3, 1), (stride, 1), (pads[0], 0, pads[1], 0), (dilation, 1))

    wanted = [padded[i : i + 2 * dilation + 1 : dilation].sum() for i in starts]
    assert list(window.sums(0) @ x) == wanted


# Graphs of others


def squares_by_power(x: torch.Tensor, kernel: int, **window: int) -> torch.Tensor:
    ones = torch.ones(1, 1, kernel, kernel, dtype=x.dtype)
    return nn.functional.conv2d((x**2).sum(dim=1, keepdim=True), ones, **window)


class Foreign(nn.Module):
    """Compact convolutions written by somebody else, among other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, bias=False)
        self.two, self.three = nn.Conv2d(6, 6, 3, bias=False), nn.Conv2d(6, 6, 1, bias=False)
        self.four = nn.Conv2d(6, 6, 3, groups=2, padding=1, bias=False)
        self.bias = nn.Parameter(torch.randn(6, 1, 1))
        self.head, self.out = nn.Linear(6 * 6 * 6, 20, bias=False), nn.Linear(20, 4)
        self.offset = nn.Parameter(torch.randn(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.relu(self.one(x) / (squares_by_power(x, 3).sqrt() + 0.1) + self.bias)
        # strides and dilation; no bias, no ReLU; the result is read twice
        y = nn.functional.conv2d(x, self.two.weight, stride=2, dilation=2, padding=1)
        x = y / (squares_by_power(x, 3, stride=2, dilation=2, padding=1).sqrt() + 0.2)
        x = x + torch.sigmoid(x)
        x = self.three(x) / ((x * x).sum(1, keepdim=True).sqrt() + 0.3) + self.bias
        # groups with one norm for all: left alone
        x = self.four(x) / (squares_by_power(x, 3, padding=1).sqrt() + 0.3) + self.bias
        x = x.flatten(1)
        x = self.head(x) / (x.pow(2).sum(1, keepdim=True).sqrt() + 0.4) + self.offset
        return self.out(torch.relu(x))


def test_compact_layers_of_others_are_found_by_structure() -> None:
    torch.manual_seed(0)
    module = Foreign().eval().requires_grad_(False)
    forward = canonical(Graph(exported(module, (3, 18, 18))))
    assert differs(forward)
    graph = optimize(forward)
    check_optimized(graph, forward)
    images = torch.rand(3, 3, 18, 18)
    truth = module.double()(images.double())
    found = GraphModule(Graph(graph), torch.float64)(images)
    assert float((found - truth).abs().max()) < 1e-6 * float(truth.abs().max())  # deltas in float32
    (deployed,) = ReferenceEvaluator(graph).run(None, {"images": images.numpy()})
    assert deployed == pytest.approx(truth.numpy(), rel=1e-4, abs=1e-5)

    ops = [node.op_type for node in graph.graph.node]
    assert ops.count("Reciprocal") == 3  # convolutions rewritten: all but the one with groups
    assert sum(node.name.endswith(".unit") for node in graph.graph.node) == 1
    before = {node.name: node.proto for node in forward.nodes}
    kept = [n for n in graph.graph.node if n.op_type in ("Tanh", "Sigmoid", "Div")]
    kept += [node for node in graph.graph.node if "four.weight" in node.input]
    kept = [node for node in kept if not node.name.endswith(".unit")]
    assert [n.op_type for n in kept] == ["Tanh", "Sigmoid", "Div", "Conv"]
    assert all(before[node.name] == node for node in kept)


@pytest.mark.parametrize("name", MODULES)
def test_graphs_without_compact_layers_keep_their_nodes(name: str) -> None:
    forward = foreign_graph(name)
    assert not differs(forward)
    assert list(optimize(forward).graph.node) == list(forward.model.graph.node)


# The graph


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def _constant(graph: onnx.GraphProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    old = next(c for c in graph.initializer if c.name == name)
    value = numpy_helper.to_array(old).copy()
    change(value)
    old.CopyFrom(numpy_helper.from_array(value, name))


def _relu_after_the_product(g: onnx.GraphProto) -> None:
    _node(g, "conv1.rectified").op_type = "Identity"


def _delta_under_the_root(g: onnx.GraphProto) -> None:
    _node(g, "conv2.norm").op_type, _node(g, "conv2.divisor").op_type = "Add", "Sqrt"


def _bias_not_scaled(g: onnx.GraphProto) -> None:
    _node(g, "conv3.shift").input[0] = "conv3.norm"


def _norm_for_divisor(g: onnx.GraphProto) -> None:
    _node(g, "conv4.reciprocal").input[0] = "conv4.norm"


def _other_delta(g: onnx.GraphProto) -> None:
    _constant(g, "fc2.delta", lambda value: value.fill(0.02))


def _other_ones(g: onnx.GraphProto) -> None:
    _constant(g, "conv2.ones", lambda value: value[1].fill(0.5))


def _narrow_window(g: onnx.GraphProto) -> None:
    _constant(g, "conv2.rows", lambda value: value[:, 2].fill(0))


def _shifted_window(g: onnx.GraphProto) -> None:
    _constant(g, "conv4.columns", lambda value: value.put(range(value.size), np.roll(value, 1)))


def _fixed_batch(g: onnx.GraphProto) -> None:
    g.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _stack_trace(g: onnx.GraphProto) -> None:
    g.node[0].doc_string = "File somewhere, line 3"


@pytest.mark.parametrize(
    "tamper",
    [
        _relu_after_the_product, _delta_under_the_root, _bias_not_scaled, _norm_for_divisor,
        _other_delta, _other_ones, _narrow_window, _shifted_window, _fixed_batch, _stack_trace,
    ],
)  # fmt: skip
def test_structural_checks_find(tamper: Callable[[onnx.GraphProto], None]) -> None:
    forward = Graph(lower(random_network("mnist-cnn", "ccn")))
    graph = optimize(forward)
    check_optimized(graph, forward)
    tamper(graph.graph)
    with pytest.raises(LoweringError):
        check_optimized(graph, forward)


# The bundle


def test_option_adds_one_file_and_changes_no_other(tmp_path: Path) -> None:
    run = as_run(random_network("mnist-cnn", "ccn"))
    plain = export_bundle(run, tmp_path / "plain")
    faster = export_bundle(run, tmp_path / "faster", optimize=TARGET)
    again = export_bundle(run, tmp_path / "again", optimize=TARGET)

    names = {record.path for record in faster.manifest.files}
    assert names - {record.path for record in plain.manifest.files} == {FILE}
    for record in plain.manifest.files:
        assert (faster.path / record.path).read_bytes() == plain.read(record)
    assert faster.manifest == again.manifest


def test_only_its_runtime_executes_it_and_says_so(tmp_path: Path) -> None:
    run = as_run(random_network("mnist-cnn", "ccn"))
    plain = export_bundle(run, tmp_path / "plain", gradient=False)
    faster = export_bundle(run, tmp_path / "faster", gradient=False, optimize=TARGET)

    assert faster.program(Target(TARGET)).path == FILE
    assert plain.program(Target(TARGET)).path == "graphs/forward-fp32.onnx"
    for other in ("onnxruntime-cuda", "torch"):
        assert faster.program(Target(other)) == plain.program(Target(TARGET))
    for bundle in (plain, faster):
        with open_runtime(bundle, TARGET) as runtime:
            assert runtime.spec.graph == bundle.program(Target(TARGET)).path
        with open_runtime(bundle, "torch") as reference:
            assert reference.spec.graph == ""


@pytest.mark.parametrize("defense", ["sm", "ls", "brelu"])
def test_a_network_without_compact_layers_gets_none(defense: str, tmp_path: Path) -> None:
    run = as_run(random_network("mnist-cnn", defense))
    bundle = export_bundle(run, tmp_path / "bundle", gradient=False, optimize=TARGET)

    assert bundle.manifest == export_bundle(run, tmp_path / "plain", gradient=False).manifest


def test_an_unknown_runtime_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = as_run(random_network("mnist-cnn", "ccn"))
    with pytest.raises(UsageError, match="onnxruntime-gpu"):
        export_bundle(run, tmp_path / "bundle", optimize="onnxruntime-gpu")
    assert not list(tmp_path.iterdir())


def test_layers_that_have_a_tensor_are_shown(tmp_path: Path) -> None:
    model = random_network("mnist-cnn", "ccn")
    bundle = export_bundle(as_run(model), tmp_path / "bundle", gradient=False, optimize=TARGET)
    images = difficult_images(model.architecture.input_shape)

    shown = open_layer_outputs(bundle, TARGET)(images)
    truth = open_layer_outputs(bundle, "torch", "fp64")(images)

    joined = {"conv1", "conv2", "conv3", "conv4"}
    assert set(shown) == set(truth) - joined
    for name, values in shown.items():
        scale = np.abs(truth[name]).max()
        assert values == pytest.approx(truth[name], abs=1e-5 * scale, rel=0), name


# A trained network


@pytest.fixture(scope="module")
def optimized(trained_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ccn_deploy.cli.main import app

    target = tmp_path_factory.mktemp("optimized") / "bundle"
    arguments = ["export", trained_run("ccn"), "--output", target, "--optimize", TARGET, "--json"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    roles = [(file["role"], file["runtime"]) for file in json.loads(result.stdout)["files"]]
    assert roles == [("weights", ""), ("forward", ""), ("forward", TARGET), ("gradient", "")]
    return target


def measure(bundle: Bundle) -> ParityResult:
    data = load_dataset("mnist5k", "test")
    return judge(collect(bundle, ParityRequest(data, samples=40, per_layer=True, threads=1)))


def test_trained_network_passes_parity(optimized: Path) -> None:
    result = measure(open_bundle(optimized))

    assert result.verdict is Verdict.PASS
    assert result.evidence.setting["runtime"]["graph"] == FILE
    assert len(result.inputs) == 6 * 3
    assert max(finding.row.deviation.units for finding in result.inputs) < 2.0
    layers = {finding.subject for finding in result.layers or ()}
    assert {"act1", "pool1", "act4", "fc1", "fc3"} <= layers


def test_parity_measures_the_graph_that_runs(optimized: Path, tmp_path: Path) -> None:
    """A fault in the optimised graph alone is found, and at its layer."""
    healthy = open_bundle(optimized)
    files = []
    for record in healthy.manifest.files:
        data = healthy.read(record)
        if record.path == FILE:
            graph = onnx.load_model_from_string(data)
            _constant(graph.graph, "conv3.bias", lambda value: value.fill(0.5))
            data = graph.SerializeToString(deterministic=True)
        files.append(replace(NewFile.copy(healthy, record), data=data))
    faulty = write_bundle(
        tmp_path / "faulty",
        card=healthy.card,
        files=files,
    )

    result = measure(faulty)

    assert result.verdict is Verdict.FAIL
    assert result.first_departure is not None
    assert result.first_departure.subject == "act3"
