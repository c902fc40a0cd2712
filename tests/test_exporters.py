from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from ccn_deploy.architectures import Architecture
from ccn_deploy.bundle import MANIFEST, NewFile, open_bundle, write_bundle
from ccn_deploy.defenses import DEFENSES as BY_NAME
from ccn_deploy.errors import GraphError, IntegrityError, LoweringError, UsageError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.checks import check_size
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.targets import Role
from tests.equation_10 import LRN
from tests.networks import DEFENSES, as_run, difficult_images, random_network, write_run
from tests.patterns import assert_pattern

COMPACT_CONV = ["ReduceSumSquare", "Conv", "Sqrt", "Add", "Conv", "Div", "Add"]
COMPACT_LINEAR = ["ReduceSumSquare", "Sqrt", "Add", "Gemm", "Div", "Add"]


def ops(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


# The function


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("architecture", ["mnist-cnn", "mnist-cnn-2d", "vgg11-cifar10"])
def test_graph_computes_the_network(architecture: str, defense: str, tmp_path: Path) -> None:
    model = random_network(architecture, defense)
    bundle = export_bundle(as_run(model), tmp_path / "bundle", gradient=False)
    images = difficult_images(model.architecture.input_shape)
    truth = model.double()(torch.from_numpy(images).double()).numpy()

    graph = onnx.load(bundle.path / bundle.file(Role.FORWARD, "fp32").path)
    (by_definition,) = ReferenceEvaluator(graph, new_ops=[LRN]).run(None, {"images": images})
    with open_runtime(bundle) as runtime:
        deployed = runtime.logits(images)

    scale = np.abs(truth).max()
    assert by_definition == pytest.approx(truth, abs=1e-5 * scale, rel=0)
    assert deployed == pytest.approx(truth, abs=1e-5 * scale, rel=0)
    assert deployed.dtype == np.float32


def equation_6(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, alpha: float, stride: int, padding: int
) -> np.ndarray:
    """One patch at a time, in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    n, _, height, width = x.shape
    c_out, _, kh, kw = w.shape
    rows, columns = (height - kh) // stride + 1, (width - kw) // stride + 1
    y = np.empty((n, c_out, rows, columns))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            patch = x[:, :, top : top + kh, left : left + kw].reshape(n, -1)
            norm = np.sqrt((patch**2).sum(1, keepdims=True))
            y[:, :, i, j] = alpha * (patch @ w.reshape(c_out, -1).T) / (norm + 0.01) + b
    return y


@settings(deadline=None, max_examples=25)
@given(
    channels=st.integers(1, 5),
    out=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    alpha=st.floats(0.1, 40.0),
    silent=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_lowered_compact_convolution_is_equation_6(
    channels: int, out: int, kernel: tuple[int, int], stride: int, padding: int, alpha: float,
    silent: bool, seed: int,
) -> None:  # fmt: skip
    shape = (channels, 7, 6)
    layer = CompactConv2d(channels, out, kernel, stride=stride, padding=padding)
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
        layer.alpha.fill_(alpha)
    x = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    if silent:
        x[:, :, :4] = 0.0
    plain = Architecture("one-layer", "", shape, (), 0, (), 0.0, 3)
    with torch.no_grad():
        features = layer(torch.zeros(1, *shape)).numel()
    model = Classifier(
        OrderedDict(conv1=layer, flatten=nn.Flatten(), fc1=CompactLinear(features, 3)),
        plain,
        BY_NAME["ccn"],
    )
    graph = lower(model)
    assert_pattern(graph, model)

    got, logits = ReferenceEvaluator(graph).run(["conv1", "logits"], {"images": x})

    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    truth = equation_6(x, w, b, np.float32(alpha), stride, padding)
    assert got == pytest.approx(truth, abs=2e-5 * max(1.0, np.abs(truth).max()), rel=0)
    last = model.get_submodule("fc1")
    flat = truth.reshape(2, -1, 1, 1)
    w, b = (p.detach().double().numpy() for p in (last.weight, last.bias))
    truth = equation_6(flat, w[:, :, None, None], b, 1.0, 1, 0)[:, :, 0, 0]
    assert logits == pytest.approx(truth, abs=2e-5 * max(1.0, np.abs(truth).max()), rel=0)


def test_alpha_is_folded_into_the_weights() -> None:
    model = random_network("mnist-cnn", "ccn")
    constants = {c.name: numpy_helper.to_array(c) for c in lower(model).graph.initializer}
    conv = model.get_submodule("conv2")

    assert float(conv.alpha) != 1.0
    assert np.array_equal(constants["conv2.weight"], conv.weight.numpy() * conv.alpha.numpy())
    assert not [name for name in constants if "alpha" in name]


# The graph


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("architecture", ["mnist-cnn", "vgg11-cifar10"])
def test_every_layer_is_exactly_its_program(architecture: str, defense: str) -> None:
    model = random_network(architecture, defense)
    assert_pattern(lower(model), model)


def test_compact_network_has_exactly_the_ops_of_the_paper() -> None:
    conv, pool = [*COMPACT_CONV, "Relu"], ["MaxPool"]
    wanted = ["Sub", *conv, *conv, *pool, *conv, *conv, *pool, "Flatten"]
    wanted += [*COMPACT_LINEAR, "Relu", *COMPACT_LINEAR, "Relu", *COMPACT_LINEAR]

    assert ops(lower(random_network("mnist-cnn", "ccn"))) == wanted


def test_plain_network_is_conv_relu_maxpool_gemm() -> None:
    conv, pool = ["Conv", "Relu"], ["MaxPool"]
    wanted = ["Sub", *conv, *conv, *pool, *conv, *conv, *pool, "Flatten"]
    wanted += ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]

    assert ops(lower(random_network("mnist-cnn", "sm"))) == wanted


def test_l2_softmax_changes_only_the_last_layer_and_bounded_relu_only_activations() -> None:
    plain = ops(lower(random_network("mnist-cnn", "sm")))

    assert ops(lower(random_network("mnist-cnn", "l2sm"))) == plain[:-1] + COMPACT_LINEAR
    assert ops(lower(random_network("mnist-cnn", "brelu"))) == [
        "Clip" if op == "Relu" else op for op in plain
    ]


@pytest.mark.parametrize("defense", DEFENSES)
def test_imagenet_network_lowers_without_its_dropout(defense: str) -> None:
    with torch.device("meta"):  # 133 million weights that are never needed
        model = Classifier(
            OrderedDict(
                fc1=nn.Linear(3, 5), act1=nn.ReLU(), dropout1=nn.Dropout(), fc2=nn.Linear(5, 2)
            ),
            Architecture("head", "", (3, 1, 1), (), 0, (5,), 0.5, 2),
            BY_NAME[defense],
        ).to_empty(device="cpu")

    assert ops(lower(model)) == ["Gemm", "Relu", "Gemm"]


def test_batch_is_symbolic_and_every_shape_follows() -> None:
    graph = onnx.shape_inference.infer_shapes(
        lower(random_network("mnist-cnn", "ccn", classes=7)), strict_mode=True, data_prop=True
    ).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*graph.input, *graph.value_info, *graph.output]
    }
    assert shapes["images"] == ["batch", 1, 28, 28]
    assert shapes["conv2"] == ["batch", 32, 24, 24]
    assert shapes["conv2.norm"] == ["batch", 1, 24, 24]
    assert shapes["flatten"] == ["batch", 1024]
    assert shapes["fc1.norm"] == ["batch", 1]
    assert shapes["logits"] == ["batch", 7]


def test_every_layer_has_a_tensor_of_its_name() -> None:
    model = random_network("vgg11-cifar10", "ccn")
    outputs = [node.output[0] for node in lower(model).graph.node if "." not in node.name]

    assert outputs == [*(name for name, _ in model.named_layers()[:-1]), "logits"]


def test_file_says_nothing_of_where_or_how_it_was_made() -> None:
    graph = lower(random_network("mnist-cnn", "ccn"))
    for constant in graph.graph.initializer:
        constant.ClearField("raw_data")  # random bytes that may spell anything
    text = str(graph).lower()

    for word in ("/", "\\", "torch", "python", "compact", "classifier", "home", "tmp", ".py"):
        assert word not in text


# Checks that can fail


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> None:
    old = next(c for c in graph.initializer if c.name == name)
    old.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def _another_op(g: onnx.GraphProto) -> None:
    _node(g, "conv1.norm").op_type = "Abs"


def _other_bias(g: onnx.GraphProto) -> None:
    _constant(g, "conv3.bias", np.zeros((64, 1, 1)))


def _other_norm(g: onnx.GraphProto) -> None:
    _node(g, "conv2.quotient").input[1] = "conv2.patches"


def _swapped_division(g: onnx.GraphProto) -> None:
    _node(g, "fc1.quotient").input.reverse()


def _root_skipped(g: onnx.GraphProto) -> None:
    _node(g, "conv1.divisor").input[0] = "conv1.patches"


def _layer_bypassed(g: onnx.GraphProto) -> None:
    _node(g, "act1").input[0] = "conv1.quotient"


def _other_delta(g: onnx.GraphProto) -> None:
    _constant(g, "conv2.delta", np.array(0.02))


def _other_ones(g: onnx.GraphProto) -> None:
    _constant(g, "conv2.ones", np.full((1, 1, 3, 3), 0.5))


def _fixed_batch(g: onnx.GraphProto) -> None:
    g.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _wrong_classes(g: onnx.GraphProto) -> None:
    g.output[0].type.tensor_type.shape.dim[1].dim_value = 11


def _wrong_weight_shape(g: onnx.GraphProto) -> None:
    _constant(g, "fc1.weight", np.zeros((200, 7)))


def _dangling_input(g: onnx.GraphProto) -> None:
    _node(g, "act2").input[0] = "nowhere"


def _stack_trace(g: onnx.GraphProto) -> None:
    g.node[0].doc_string = "File somewhere, line 3"


def _metadata(g: onnx.GraphProto) -> None:
    g.node[3].metadata_props.append(onnx.StringStringEntryProto(key="scope", value="Sequential"))


@pytest.mark.parametrize(
    "tamper",
    [
        _another_op, _other_bias, _other_norm, _swapped_division, _root_skipped,
        _layer_bypassed, _other_delta,
        _other_ones, _fixed_batch, _wrong_classes, _wrong_weight_shape, _dangling_input,
        _stack_trace, _metadata,
    ],
)  # fmt: skip
def test_a_tampered_graph_is_not_written(
    tamper: Callable[[onnx.GraphProto], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lowered(model: Classifier) -> onnx.ModelProto:
        graph = lower(model)
        tamper(graph.graph)
        return graph

    monkeypatch.setattr("ccn_deploy.exporters.sources.run.lower", lowered)
    with pytest.raises((LoweringError, GraphError)):
        export_bundle(as_run(random_network("mnist-cnn", "ccn")), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_figure_of_agreement_stands_in_the_card(tmp_path: Path) -> None:
    """Nothing is folded in a plain network; the rounding of alpha W is what a compact one shows."""
    plain, compact = (
        export_bundle(as_run(random_network("mnist-cnn", d)), tmp_path / d, gradient=False)
        for d in ("sm", "ccn")
    )
    off = [
        b.card.source.agreement["module"] / b.card.source.agreement["scale"]
        for b in (plain, compact)
    ]
    assert off[0] < 1e-12 < off[1] < 1e-6


def test_unknown_layer_and_unsupported_options_are_refused() -> None:
    def model(layer: nn.Module) -> Classifier:
        plan = Architecture("odd", "", (4, 6, 6), (), 0, (), 0.0, 2)
        return Classifier(
            OrderedDict(odd=layer, flatten=nn.Flatten(), fc1=nn.Linear(4, 2)), plan, BY_NAME["sm"]
        )

    class Subclass(nn.ReLU):
        pass

    for layer in (
        nn.GELU(),
        Subclass(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2, ceil_mode=True),
    ):
        with pytest.raises(LoweringError, match="'odd'"):
            lower(model(layer))


def test_a_network_too_large_for_one_file_is_refused() -> None:
    constant = TensorProto(name="weight", raw_data=bytes(1 << 20))
    graph = helper.make_model(helper.make_graph([], "huge", [], [], [constant] * 2048))
    with pytest.raises(LoweringError, match=r"2\.0 GiB of weights"):
        check_size(graph, "The network", "Choose a smaller one.")


# The bundle


def test_equal_runs_give_equal_bundles_whatever_their_paths(tmp_path: Path) -> None:
    model = random_network("mnist-cnn", "ccn+ls")
    one = export_bundle(as_run(model, Path("/here/run")), tmp_path / "one")
    two = export_bundle(as_run(model, Path("/there/run")), tmp_path / "elsewhere" / "two")

    files = sorted(p.relative_to(one.path) for p in one.path.rglob("*") if p.is_file())
    assert [str(f) for f in files] == [
        "graphs/forward-fp32.onnx",
        "graphs/gradient-fp32.onnx",
        "manifest.json",
        "weights.safetensors",
    ]
    for file in files:
        assert (one.path / file).read_bytes() == (two.path / file).read_bytes()


def test_bundle_holds_the_very_weights_of_the_run_and_says_what_made_it(tmp_path: Path) -> None:
    run = as_run(random_network("mnist-cnn", "ccn"))
    bundle = export_bundle(run, tmp_path / "bundle")
    graph = bundle.file(Role.FORWARD, "fp32")

    assert bundle.read(bundle.file(Role.WEIGHTS)) == run.weights
    assert set(graph.made_by) == {"ccn-deploy", "onnx", "torch"}
    assert graph.details["opset"] == 20
    assert graph.details["ops"]["ReduceSumSquare"] == 7
    assert msgspec.structs.replace(bundle.card, source=run.card.source) == run.card


def test_overwriting_is_asked_for_and_only_replaces_bundles(tmp_path: Path) -> None:
    run, other = (as_run(random_network("mnist-cnn", d)) for d in ("sm", "ccn"))
    target = tmp_path / "bundle"
    first = export_bundle(run, target)
    with pytest.raises(UsageError, match="exists already"):
        export_bundle(other, target)
    assert open_bundle(target).manifest == first.manifest
    assert export_bundle(other, target, overwrite=True).card.defense == "ccn"

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no bundle"):
        export_bundle(run, precious, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_a_network_of_nan_is_not_exported(tmp_path: Path) -> None:
    model = random_network("mnist-cnn", "sm")
    model.get_submodule("fc1").weight[0, 0] = torch.nan
    with pytest.raises(LoweringError, match="not finite"):
        export_bundle(as_run(model), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_a_bundle_opens_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export_bundle(
        as_run(random_network("mnist-cnn", "sm")), tmp_path / "b", gradient=False
    )
    model = onnx.load_model_from_string(bundle.read(bundle.file(Role.FORWARD, "fp32")))
    weight = next(c for c in model.graph.initializer if c.name == "fc3.weight")
    (tmp_path / "secret.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret.bin")
    files = [
        replace(file, data=model.SerializeToString()) if file.role is Role.FORWARD else file
        for file in (NewFile.copy(bundle, record) for record in bundle.manifest.files)
    ]
    hostile = write_bundle(tmp_path / "hostile", card=bundle.card, files=files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match=r"'fc3\.weight' has its values in another file"):
        export_bundle(hostile, tmp_path / "more", precisions=("fp16",))
    assert not (tmp_path / "more").exists()


# The command


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    from ccn_deploy.cli.main import main

    monkeypatch.setattr(sys, "argv", ["ccn-deploy", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_command_exports_and_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(as_run(random_network("mnist-cnn", "ccn"), tmp_path / "run"))
    code, out, err = command(monkeypatch, capsys, run, "--output", tmp_path / "b")
    assert code == 0
    assert "graphs/forward-fp32.onnx" in out
    assert "graphs/gradient-fp32.onnx" in out
    assert "7 ReduceSumSquare" in out
    assert f"ccn-deploy verify-parity {tmp_path / 'b'}" in err

    code, out, _ = command(
        monkeypatch, capsys, run, "--output", tmp_path / "b", "--overwrite", "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == "ccn-deploy/export/1"
    assert document["digest"] == open_bundle(tmp_path / "b").manifest.digest
    assert [file["role"] for file in document["files"]] == ["weights", "forward", "gradient"]


def _missing(path: Path) -> Path:
    return path / "nothing"


def _unfinished(path: Path) -> Path:
    return write_run(as_run(random_network("mnist-cnn", "sm"), path / "run"), finished=False)


def _flipped(path: Path) -> Path:
    run = write_run(as_run(random_network("mnist-cnn", "sm"), path / "run"))
    data = bytearray((run / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (run / "weights.safetensors").write_bytes(data)
    return run


def _truncated_before_hashing(path: Path) -> Path:
    run = as_run(random_network("mnist-cnn", "sm"), path / "run")
    return write_run(replace(run, weights=run.weights[:1000]))


def _of_another_network(path: Path) -> Path:
    run = as_run(random_network("mnist-cnn", "sm"), path / "run")
    return write_run(
        replace(run, card=msgspec.structs.replace(run.card, architecture="vgg11-cifar10"))
    )


def _of_another_defense(path: Path) -> Path:
    run = as_run(random_network("mnist-cnn", "sm"), path / "run")
    return write_run(replace(run, card=msgspec.structs.replace(run.card, defense="ccn")))


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (_missing, 2, "is not there"),
        (_unfinished, 2, "not finished"),
        (_flipped, 5, "SHA-256"),
        (_truncated_before_hashing, 5, "no safetensors"),
        (_of_another_network, 5, "do not fit"),
        (_of_another_defense, 5, "alpha"),
    ],
)
def test_command_refuses(
    make: Callable[[Path], Path], code: int, says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, out, err = command(monkeypatch, capsys, make(tmp_path), "--output", tmp_path / "bundle")
    assert found == code
    assert says in err
    assert out == ""
    assert len(err.strip().splitlines()) <= 2
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    run = write_run(as_run(random_network("mnist-cnn", "sm"), tmp_path / "run"))

    target = tmp_path / "out" / "bundle"

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-m", "ccn_deploy.cli.main", "export", str(run), "--output", str(target)],
        capture_output=True, text=True, check=False, preexec_fn=small_files_only,
    )  # fmt: skip
    assert done.returncode == 3
    assert "Could not write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())
    assert MANIFEST not in {path.name for path in tmp_path.rglob("*")}
