"""What users get wrong when they export: two lines, the right exit code, and nothing written."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from ccn_deploy.bundle import open_bundle
from ccn_deploy.cli.main import main
from ccn_deploy.errors import ExitCode
from ccn_deploy.targets import Role
from tests.foreign_files import CLASSES, HIDDEN, SIZE, classifier

Made = list[str | Path]
"""What is given to `ccn-deploy export`, but for --output."""


def export(arguments: Sequence[object], output: Path) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["ccn-deploy", "export", *map(str, arguments)])
        sys.argv += ["--output", str(output)]
        main()
    return int(exit_.value.code or 0)


def refused(
    arguments: Sequence[object],
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    *words: str,
    code: ExitCode = ExitCode.USAGE,
) -> None:
    """The command says the words in one or two lines, and leaves everything as it was."""
    before = tree(folder)
    found = export(arguments, folder / "bundle")
    out, err = capfd.readouterr()
    assert found == code, err
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    for word in words:
        assert word in err
    assert tree(folder) == before


def tree(folder: Path) -> set[Path]:
    """Return all that is in a folder, but for what Python keeps beside its modules."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def saved(model: onnx.ModelProto, folder: Path, name: str = "network.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


# -------------------------------------------------------------------------------- ONNX files


def external() -> onnx.ModelProto:
    """Weights beside the file, as torch.onnx and onnx.save write large ones."""
    model = classifier()
    constant = model.graph.initializer[0]
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="network.onnx.data")
    return model


def boxes() -> onnx.ModelProto:
    """A detector: [batch, boxes, 4] and their scores."""
    model = classifier([])
    shape = numpy_helper.from_array(np.array([0, -1, 4]), "box_shape")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("Reshape", ["pool", "box_shape"], ["boxes"], "boxes"))
    model.graph.output.insert(0, helper.make_tensor_value_info("boxes", 1, ["N", None, 4]))
    return model


def two_inputs() -> onnx.ModelProto:
    model = classifier([])
    model.graph.input.append(helper.make_tensor_value_info("temperature", 1, [1]))
    model.graph.node.append(helper.make_node("Div", ["scores", "temperature"], ["t"], "cool"))
    model.graph.output[0].name = "t"
    return model


def branch() -> onnx.ModelProto:
    """Which head is used depends on the image."""
    model = classifier([])
    constants = [numpy_helper.from_array(np.float32(0.5), "half")]
    model.graph.initializer.extend(constants)

    def head(op: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(op, 1, None)
        return helper.make_graph([helper.make_node(op, ["scores"], [op])], op, [], [made])

    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["x"], ["bright"], "bright", keepdims=0),
            helper.make_node("Greater", ["bright", "half"], ["day"], "is_day"),
            helper.make_node(
                *("If", ["day"], ["chosen"], "choose_head"),
                then_branch=head("Relu"),
                else_branch=head("Neg"),
            ),
        ]
    )
    model.graph.output[0].name = "chosen"
    return model


def custom() -> onnx.ModelProto:
    model = classifier([("BiasGelu", {})])
    model.graph.node[-1].domain = "com.microsoft"
    model.graph.node[-1].name = "fused_head"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def tokens() -> onnx.ModelProto:
    """A network for text."""
    table = numpy_helper.from_array(np.ones((9, CLASSES), np.float32), "table")
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["words"], "words"),
        helper.make_node("ReduceMean", ["words"], ["scores"], "mean", axes=[1], keepdims=0),
    ]
    given = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["N", 7])
    made = helper.make_tensor_value_info("scores", 1, None)
    graph = helper.make_graph(nodes, "text", [given], [made], [table])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def table() -> onnx.ModelProto:
    """A network for rows of features."""
    model = classifier([], flatten_to=[-1, HIDDEN * (SIZE // 2) ** 2])
    del model.graph.node[:3]
    model.graph.node[0].input[0] = "x"
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, ["N", 96]))
    return model


def random_noise() -> onnx.ModelProto:
    model = classifier([("RandomNormalLike", {})])
    model.graph.node[-1].name = "noise"
    return model


FILES: dict[str, tuple[Callable[[], onnx.ModelProto], list[str], list[str]]] = {
    "external data": (external, [], ["'w'", "file"]),
    "a detector": (boxes, [], ["'boxes'", "[2, 24, 4]", "detectors"]),
    "several inputs": (two_inputs, [], ["2 inputs", "x, temperature"]),
    "control flow": (branch, [], ["If", "choose_head"]),
    "an operator of somebody's own": (custom, [], ["com.microsoft", "fused_head"]),
    "random": (random_noise, [], ["RandomNormalLike", "noise"]),
    "text": (tokens, [], ["'tokens'", "int64", "images"]),
    "features": (table, [], ["'x'", "[?, 96]", "images"]),
    "two means": (classifier, ["--mean", "0.5,0.5"], ["2", "3 channels"]),
    "words for means": (classifier, ["--mean", "a,b,c"], ["--mean", "'a,b,c'"]),
    "no deviation": (classifier, ["--std", "0"], ["std"]),
    "an empty variable for means": (classifier, ["--mean", ""], ["--mean", "''"]),
    "one end of a range": (classifier, ["--input-range", "255"], ["--input-range", "'255'"]),
    "a range upside down": (classifier, ["--input-range", "1,0"], ["range"]),
    "a size of one number": (classifier, ["--input-size", "224"], ["--input-size", "'224'"]),
    "a size of words": (classifier, ["--input-size", "axb"], ["--input-size", "'axb'"]),
    "no size": (classifier, ["--input-size", "0x0"], ["0x0"]),
    "another size": (classifier, ["--input-size", "9x8"], ["9x8", "--input-size"]),
    "a layout": (classifier, ["--input-layout", "hwc"], ["hwc", "nchw"]),
    "an order": (classifier, ["--channel-order", "brg"], ["brg"]),
    "a name of an input": (classifier, ["--input", "pixels"], ["'pixels'", "x"]),
    "a name of an output": (classifier, ["--output-name", "probs"], ["'probs'", "head0"]),
    "a node to keep": (
        classifier, ["--precision", "fp16", "--keep-fp32", "layer9"], ["'layer9'", "conv"],
    ),
    "a node to keep in float32": (classifier, ["--keep-fp32", "conv"], ["--keep-fp32"]),
    "how to calibrate nothing": (classifier, ["--calibration", "entropy"], ["--calibration"]),
    "engines in none": (classifier, ["--tf32"], ["--tf32", "--format"]),
    "a precision": (classifier, ["--precision", "fp12"], ["fp12"]),
    "a format": (classifier, ["--format", "tflite"], ["tflite"]),
    "a batch": (classifier, ["--batch", "8,4,1"], ["batch", "8"]),
    "a target": (classifier, ["--optimize", "tensorrt"], ["tensorrt", "onnxruntime-cpu"]),
    "weights": (classifier, ["--weights", "w.safetensors"], ["--weights"]),
    "no file of classes": (classifier, ["--classes", "names.txt"], ["names.txt"]),
    "no preprocessing": (classifier, ["--preprocessing", "config.json"], ["config.json"]),
    "no data": (
        classifier, ["--precision", "int8", "--dataset", "pictures.npz"], ["pictures.npz"],
    ),
    "nothing to calibrate on": (classifier, ["--precision", "int8"], ["--dataset"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_classifier_or_is_told_wrong_things(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, options, words = FILES[case]
    refused([saved(make(), tmp_path), *options], tmp_path, capfd, *words)


def test_bytes_that_are_no_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"PK\x03\x04" + bytes(99), b"not a model"):
        (tmp_path / "network.onnx").write_bytes(content)
        refused([tmp_path / "network.onnx"], tmp_path, capfd, "network.onnx", "ONNX model")
    data = classifier().SerializeToString()
    (tmp_path / "network.onnx").write_bytes(data[: len(data) // 2])
    refused([tmp_path / "network.onnx"], tmp_path, capfd, "network.onnx")


def test_classes_of_another_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, names = saved(classifier(), tmp_path), tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    refused([source, "--classes", names], tmp_path, capfd, "names.txt", "2 names", "5 logits")
    names.write_text("cat\ndog\ncat\nowl\nfox\n")
    refused([source, "--classes", names], tmp_path, capfd, "'cat'")
    names.write_bytes(b"\xff\xfe\x00cat")
    refused([source, "--classes", names], tmp_path, capfd, "names.txt")


def test_images_to_calibrate_on_that_are_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, data = saved(classifier(), tmp_path), tmp_path / "images.npz"
    options = [source, "--precision", "int8", "--dataset", data]
    np.savez(data, images=np.array([{"a": 1}, None], object), labels=np.arange(2))
    refused(options, tmp_path, capfd, "images.npz", "object")
    np.savez(data, images=np.zeros((9, 7, 7, 3), np.uint8), labels=np.arange(9) % CLASSES)
    refused(options, tmp_path, capfd, "images.npz", "7")
    np.savez(data, images=np.full((9, 8, 8, 3), 7.0, np.float32), labels=np.arange(9) % CLASSES)
    refused(options, tmp_path, capfd, "images.npz", "[0, 1]")
    data.write_bytes(b"no zip")
    refused(options, tmp_path, capfd, "images.npz")


def test_an_operator_without_a_gradient_and_what_works_without(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = classifier([])
    model.graph.node[1].op_type, model.graph.node[1].name = "Asinh", "bend"
    source = saved(model, tmp_path)
    refused([source], tmp_path, capfd, "Asinh", "'bend'", "--no-gradient", "parity")
    assert export([source, "--no-gradient"], tmp_path / "bundle") == 0
    roles = {record.role for record in open_bundle(tmp_path / "bundle").manifest.files}
    assert roles == {Role.FORWARD}


# -------------------------------------------------------------------------------- factories

FACTORIES = """
import torch
from torch import nn

class Net(nn.Sequential):
    input_shape = (3, 8, 8)

def network():
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

def raises():
    raise RuntimeError("no backbone here\\nand a second line")

def leaves():
    raise SystemExit(7)

def number():
    return 3

def needs(depth):
    return network()

class Branch(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if x.mean() > 0.5 else -y

def branches():
    torch.manual_seed(0)
    return Branch(*network())

class Boxes(Net):
    def forward(self, x):
        return {"boxes": x, "scores": super().forward(x)}

def detector():
    return Boxes(*network())

def without_size():
    return nn.Sequential(*network())
"""

FACTORY_CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "raises": ("raises", [], ["no backbone here"]),
    "exits": ("leaves", [], ["leaves"]),
    "a number": ("number", [], ["number", "int", "torch.nn.Module"]),
    "not there": ("netwrok", [], ["'netwrok'", "network"]),
    "takes arguments": ("needs", [], ["depth"]),
    "dynamic control flow": ("branches", [], ["torch.onnx cannot export"]),
    "a detector": ("detector", [], ["dict"]),
    "no size": ("without_size", [], ["--input-size"]),
    "a wrong size": ("without_size", ["--input-size", "9x9"], ["[3, 3, 9, 9]"]),
    "two means": ("network", ["--mean", "0.5,0.5"], ["2", "3 channels"]),
    "the name of an input": ("network", ["--input", "pixels"], ["--input", "[N, C, H, W]"]),
    "a layout": ("network", ["--input-layout", "nhwc"], ["--input-layout"]),
    "no weights": ("network", ["--weights", "w.pth"], ["w.pth"]),
}


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / f"nets_{abs(hash(tmp_path))}.py"
    path.write_text(FACTORIES)
    return path


@pytest.mark.parametrize("case", FACTORY_CASES)
def test_a_factory_that_makes_no_classifier(
    case: str, factories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, options, words = FACTORY_CASES[case]
    refused([f"{factories}:{name}", *options], tmp_path, capfd, *words)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("nowhere.py:network", "nowhere.py"),
        ("no_such_package.nets:network", "no_such_package"),
        ("torch.nn:", "factory"),
        ("nothing_at_all", "nothing_at_all"),
    ],
)
def test_a_source_that_is_not_there(
    source: str, word: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused([source], tmp_path, capfd, word)


@pytest.mark.parametrize("name", ["nets.py", "w.pth", "w.safetensors"])
def test_weights_and_code_are_no_network(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    refused([tmp_path / name], tmp_path, capfd, name, "FILE.py:FUNCTION", "--weights")


class NotPlain:
    """What a checkpoint of somebody's training loop may hold."""


def test_weights_that_do_not_fit_or_would_run_code(
    factories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(144, 5))
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    source, file = f"{factories}:network", tmp_path / "w.safetensors"
    save_file(weights, file)
    options = [source, "--weights", file]
    refused(options, tmp_path, capfd, "missing: 3.weight, 3.bias", "spare: 1.bias, 1.weight")
    file.write_bytes(b"no safetensors")
    refused(options, tmp_path, capfd, "w.safetensors")
    options[-1] = tmp_path / "w.pth"
    torch.save({"network": NotPlain()}, options[-1])
    refused(options, tmp_path, capfd, "w.pth", "weights_only=False")
    options[-1].write_bytes(pickle.dumps(os.getcwd))  # what unpickling calls
    refused(options, tmp_path, capfd, "w.pth", "without running code")


# ------------------------------------------------------------------------- runs and bundles


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle."""
    folder = tmp_path_factory.mktemp("made")
    source = saved(classifier(), folder)
    assert export([source], folder / "bundle") == 0
    return folder / "bundle"


@pytest.mark.parametrize(
    "options",
    [
        ["--mean", "0.5"],
        ["--classes", "names.txt"],
        ["--weights", "w.pth"],
        ["--input-size", "8x8"],
        ["--input", "x"],
        ["--name", "other"],
    ],
)
def test_what_a_bundle_and_a_run_know_themselves(
    options: list[str], made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    refused([made, *options], tmp_path, capfd, str(made))


def test_directories_that_are_neither_and_outputs_that_are_taken(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    refused([tmp_path], tmp_path, capfd, str(tmp_path))
    refused([made], tmp_path, capfd, "nothing to add")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("do not lose")
    source = saved(classifier(), tmp_path)
    refused([source], tmp_path, capfd, "exists already", "--overwrite")
    refused([source, "--overwrite"], tmp_path, capfd, "no bundle")


def test_the_program_itself_says_no_more(tmp_path: Path) -> None:
    """What libraries print on the way out is seen in a process of its own alone."""
    (tmp_path / "nets.py").write_text(FACTORIES)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [
            *(sys.executable, "-B", "-m", "ccn_deploy.cli.main", "export", "nets.py:branches"),
            *("--output", "bundle"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert "torch.onnx cannot export the module" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2, done.stderr
    assert done.stdout == ""
    assert tree(tmp_path) == {tmp_path / "nets.py"}
