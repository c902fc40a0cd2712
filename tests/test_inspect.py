"""``ccn-deploy inspect``: told from the manifest, whatever the files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.bundle import Bundle, Lineage, NewFile, open_bundle, write_bundle
from ccn_deploy.cli.inspect import _told
from ccn_deploy.errors import ExitCode
from ccn_deploy.inventory import inventory
from ccn_deploy.machine import Gpu, Machine, this_machine
from ccn_deploy.targets import Role
from tests.cards import a_card

RTX = "tensorrt-rtx"
FROM = Lineage(sources=("graphs/forward-fp32.onnx",), step="build")
ENGINE = {
    "library": "tensorrt-rtx",
    "version": "1.7.1.116",
    "magic": "vtrt",
    "system": "linux",
    "machine": "x86_64",
    "compute_capabilities": ["8.6", "8.9"],
    "profiles": [
        {"images": {"min": [1, 1, 28, 28], "opt": [32, 1, 28, 28], "max": [256, 1, 28, 28]}}
    ],
    "tf32": False,
    "layers": {
        "conv1": {"compute": "fp16", "norm": "fp32"},
        "conv2": {"compute": "fp16", "norm": "fp32"},
        "fc3": {"compute": "fp16"},
    },
    "log": ["a warning of the builder"],
}
INT8 = {
    "opset": 20,
    "ops": {"Conv": 8, "DequantizeLinear": 30},
    "calibration": {"method": "entropy", "dataset": "mnist5k", "samples": 500, "seed": 0},
    "numeric": {
        "images": 500,
        "layers": [
            {"layer": "conv1", "largest_sum": 9.0, "smallest_sum": 1e-9, "headroom": 7278.2,
             "floor_room": 0.017, "smallest_divisor": 1e-4, "largest_product": 3.0},
            {"layer": "conv2", "largest_sum": 70000.0, "smallest_sum": 0.5, "headroom": 0.936,
             "floor_room": 1e6, "smallest_divisor": 0.7, "largest_product": 3.0},
        ],
        "warnings": ["conv2: sums of squares up to 7e+04 overflow fp16."],
    },
}  # fmt: skip


def files(engine: bytes = b"vtrt and nothing that could be deserialized") -> list[NewFile]:
    """Garbage in every file, right digests, and manifest lines as an export writes them."""
    made_by = {"ccn-deploy": "0.1.0", "tensorrt-rtx": "1.7.1.116"}
    return [
        NewFile("weights.safetensors", b"garbage", Role.WEIGHTS),
        NewFile("graphs/forward-fp32.onnx", b"\xff\x00garbage", Role.FORWARD, "fp32"),
        NewFile("graphs/gradient-fp32.onnx", b"no graph", Role.GRADIENT, "fp32"),
        NewFile("graphs/forward-int8.onnx", b"", Role.FORWARD, "int8", details=INT8),
        NewFile("engines/a.engine", engine, Role.ENGINE, "fp16", RTX, FROM, made_by, ENGINE),
        NewFile("engines/g.engine", engine, Role.GRADIENT_ENGINE, "fp16", RTX, details=ENGINE),
    ]


def write(path: Path, contents: list[NewFile], **changes: Any) -> Bundle:
    training = {
        "dataset": "mnist5k",
        "recipe": {"name": "quick", "epochs": 3, "adversary": {"kind": "pgd", "epsilon": 0.3}},
        "seed": 7,
        "test_accuracy": 0.954,
    }
    card = a_card(**{"training": training, **changes})
    return write_bundle(path, card=card, files=contents, overwrite=True)


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command, and then assert that nothing that could parse a file was loaded."""
    code = (
        "import sys\n"
        "from ccn_deploy.cli.main import main\n"
        "try: main()\n"
        "finally:\n"
        "    parsers = {'onnx', 'onnxruntime', 'tensorrt_rtx', 'torch', 'safetensors', 'google'}\n"
        "    assert not parsers & {name.partition('.')[0] for name in sys.modules}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "bundle", files())


def test_garbage_with_the_right_digests_is_told_as_it_is(bundle: Bundle) -> None:
    result = inspect(bundle.path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for words in (
        "ccn on mnist-cnn",
        "float32 [N, 1, 28, 28] in [0, 1]",
        "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "mnist5k, recipe quick, 3 epochs, against pgd within 0.3, seed 7, test accuracy 0.954",
        bundle.manifest.digest,
        "made by      ccn-deploy 0.1.0, tensorrt-rtx 1.7.1.116",
        "capabilities 8.6, 8.9",
        "images [1, 1, 28, 28] to [256, 1, 28, 28], best at [32, 1, 28, 28]",
        "fp16, norm in fp32: conv1, conv2",
        "fp16: fc3",
        "dataset mnist5k, method entropy, samples 500, seed 0",
        "500 images; sums of squares from 1e-09 (conv1) to 7e+04 (conv2, 0.936 times below fp16's "
        "largest); smallest denominator 0.0001 (conv1)",
        "conv2: sums of squares up to 7e+04 overflow fp16.",
        "8 Conv, 30 DequantizeLinear",
        "a warning of the builder",
        "build, from graphs/forward-fp32.onnx",
    ):
        assert words in result.stdout, words
    for file in bundle.manifest.files:
        assert file.sha256[:16] in result.stdout


def test_the_document(bundle: Bundle) -> None:
    result = inspect("--json", bundle.path)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "ccn-deploy/inspect/1"
    assert document["digest"] == bundle.manifest.digest
    assert document["training"] == bundle.card.training
    assert document["evidence"] == []
    for told, record in zip(document["files"], bundle.manifest.files, strict=True):
        here = told.pop("here")
        assert told == json.loads(msgspec.json.encode(record))
        for runtime in here:
            assert bool(runtime["problem"]) == (not runtime["runs"])


def machine(capability: str) -> Machine:
    return Machine(
        system="linux",
        architecture="x86_64",
        python="3.12.0",
        packages={"tensorrt-rtx": "1.7.1.116", "onnxruntime": "1.32.0"},
        driver="580.95.05 (CUDA 13.0)",
        no_gpu_reason="",
        gpus=(Gpu(0, "NVIDIA L4", capability, 24 << 30),),
    )


def here(document: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    return {
        file["path"].partition("/")[2] or file["path"]: {
            runtime["runtime"]: runtime["runs"] for runtime in file["here"]
        }
        for file in document["files"]
    }


def test_what_runs_on_a_machine(bundle: Bundle) -> None:
    onnx = {"onnxruntime-cuda": False, "onnxruntime-cpu": True}
    wanted: dict[str, dict[str, bool]] = {
        "weights.safetensors": {},
        "forward-fp32.onnx": onnx,
        "gradient-fp32.onnx": onnx,
        "forward-int8.onnx": onnx,
        "a.engine": {"tensorrt-rtx": True},
        "g.engine": {"tensorrt-rtx": True},
    }
    assert here(inventory(bundle, machine("8.9"))) == wanted
    elsewhere = inventory(bundle, machine("9.0"))
    engine = {"tensorrt-rtx": False}
    assert here(elsewhere) == {**wanted, "a.engine": engine, "g.engine": engine}
    (why,) = elsewhere["files"][4]["here"]
    assert "NVIDIA L4" in why["problem"]
    assert "--compute-capability 9.0" in why["fix"]


def test_a_graph_written_for_one_runtime_is_that_ones(tmp_path: Path) -> None:
    own = NewFile("graphs/own.onnx", b"", Role.FORWARD, "fp32", "onnxruntime-cpu")
    default = files()[1]
    told = here(inventory(write(tmp_path / "b", [default, own]), machine("8.9")))
    assert told["forward-fp32.onnx"] == {"onnxruntime-cuda": False}
    assert told["own.onnx"] == {"onnxruntime-cpu": True}
    assert here(inventory(write(tmp_path / "b", [own]), machine("8.9"))) == {
        "own.onnx": {"onnxruntime-cpu": True}
    }


def test_an_engine_that_is_none_is_told_and_not_touched(tmp_path: Path) -> None:
    (told,) = (
        file["here"][0]
        for file in inventory(write(tmp_path / "b", files(b"ELF")), machine("8.9"))["files"]
        if file["path"] == "engines/a.engine"
    )
    assert not told["runs"]
    assert "is no TensorRT-RTX engine" in told["problem"]


@pytest.mark.parametrize("index", [1, 4])
def test_a_changed_byte(bundle: Bundle, index: int) -> None:
    file = bundle.path / bundle.manifest.files[index].path
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    result = inspect(bundle.path)
    assert result.returncode == ExitCode.INTEGRITY
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_evidence_is_listed(bundle: Bundle, tmp_path: Path) -> None:
    kept = bundle.evidence / "parity" / "onnxruntime-cpu-fp32.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"{}")
    (bundle.evidence / "link").symlink_to(tmp_path)
    assert inventory(bundle, this_machine())["evidence"] == [
        {"path": "evidence/parity/onnxruntime-cpu-fp32.json", "bytes": 2}
    ]
    assert "evidence/parity/onnxruntime-cpu-fp32.json  2 bytes" in inspect(bundle.path).stdout


def test_how_images_are_to_be_made_is_told(tmp_path: Path) -> None:
    asked = {"crop": [224, 224], "interpolation": "bicubic", "resize": 256}
    made = write(tmp_path / "b", [], evaluation=asked)
    assert inventory(made, this_machine())["evaluation"] == asked
    result = inspect(made.path)
    line = "evaluation   crop [224, 224], interpolation bicubic, resize 256\n"
    assert line in result.stdout


def test_an_exported_bundle(ccn_bundle: Bundle) -> None:
    result = inspect(ccn_bundle.path)
    assert result.returncode == 0, result.stderr
    assert "7 ReduceSumSquare" in result.stdout
    assert "\n  runs on      onnxruntime-cpu\n" in result.stdout


def test_text_of_a_bundle_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\r\n[bold]x[/] \u202e"
    named = write(tmp_path / "b", [], class_names=(evil,), architecture=evil, training={evil: evil})
    graph = replace(files()[1], made_by={evil: evil}, details={evil: evil, "ops": {evil: evil}})
    contents = [graph, replace(graph, path="graphs/[red]x\x1b.onnx", precision="fp16")]
    for bundle in (named, write(tmp_path / "c", contents)):
        result = inspect(bundle.path)
        assert result.returncode == 0, result.stderr
        assert not set("\x1b\r\u202e") & set(result.stdout)
        assert r"\x1b[2J\r\n[bold]x[/] \u202e" in result.stdout


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(
    key=st.sampled_from([*ENGINE, *INT8, "else"]),
    value=JSON
    | st.fixed_dictionaries({"layers": st.lists(JSON), "warnings": JSON, "images": JSON})
    | st.dictionaries(st.text(max_size=3), st.fixed_dictionaries({"compute": JSON, "norm": JSON})),
)
def test_no_detail_is_too_odd_to_be_told(key: str, value: Any) -> None:
    assert all(isinstance(text, str) for text in _told(key, value))


def test_a_bundle_is_opened_as_everywhere(tmp_path: Path) -> None:
    assert inspect(tmp_path).returncode == ExitCode.USAGE
    assert open_bundle(write(tmp_path / "b", files()).path).manifest.files
