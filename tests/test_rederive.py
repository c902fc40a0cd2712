"""Graphs derived again: honest bundles are the same, and every lie under right digests differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load, save
from typer.testing import CliRunner

from ccn_deploy.bundle import Bundle, NewFile, Source, write_bundle
from ccn_deploy.bundle.manifest import MANIFEST, Lineage, Manifest
from ccn_deploy.cli.main import app
from ccn_deploy.errors import ExitCode, IntegrityError
from ccn_deploy.exporters import CalibrationRequest, export_bundle
from ccn_deploy.exporters.rederive import Rederived, rederive, refuse_differences
from ccn_deploy.exporters.sources.opening import open_source
from ccn_deploy.targets import Role
from tests.faults import reorder_classes
from tests.foreign_files import classifier
from tests.networks import as_run, random_network

FORWARD = "graphs/forward-fp32.onnx"
OPTIMISED = "graphs/forward-fp32-onnxruntime-cpu.onnx"
GRADIENT = "graphs/gradient-fp32.onnx"
HALVES = {
    f"graphs/{role}-{kind}.onnx" for role in ("forward", "gradient") for kind in ("fp16", "bf16")
}
GRIDS = {"graphs/forward-int8.onnx", "graphs/forward-fp8.onnx"}
GRAPHS = {FORWARD, OPTIMISED, GRADIENT} | HALVES | GRIDS
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")

Edit = Callable[[NewFile], NewFile]


def everything(source: Any, output: Path, images: Path, **more: Any) -> Bundle:
    """Export all graphs that there are."""
    request = CalibrationRequest(dataset=str(images))
    return export_bundle(
        source, output, optimize="onnxruntime-cpu", precisions=PRECISIONS, calibration=request,
        **more,
    )  # fmt: skip


def noise(path: Path, shape: tuple[int, int, int], classes: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (4 * classes, *shape), dtype=np.uint8)
    labels = np.arange(len(pixels)) % classes
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A compact network with everything; one layer kept in float32."""
    root = tmp_path_factory.mktemp("rederive")
    run = as_run(random_network("mnist-cnn", "ccn"))
    return everything(run, root / "ccn", noise(root / "i.npz", (1, 28, 28), 10), keep_fp32=["fc2"])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Somebody's file, of an old opset, with everything that it can have."""
    root = tmp_path_factory.mktemp("foreign")
    onnx.save(classifier(opset=13), root / "theirs.onnx")
    source = open_source(str(root / "theirs.onnx"))
    return everything(source, root / "bundle", noise(root / "i.npz", (3, 8, 8), 5))


def statuses(found: tuple[Rederived, ...]) -> dict[str, str]:
    return {file.path: file.status for file in found}


def told(bundle: Bundle, output: Path, path: str, edit: Edit, **card: Any) -> Bundle:
    """Write a copy of a bundle that lies about one file, sealed anew."""
    files = [NewFile.copy(bundle, record) for record in bundle.manifest.files]
    edited = [edit(file) if file.path == path else file for file in files]
    assert path == MANIFEST or edited != files
    return write_bundle(output, card=msgspec.structs.replace(bundle.card, **card), files=edited)


def graph(change: Callable[[onnx.GraphProto], None]) -> Edit:
    """Return an edit of a file's graph."""

    def edit(file: NewFile) -> NewFile:
        model = onnx.load_model_from_string(file.data)
        change(model.graph)
        onnx.checker.check_model(model)
        return replace(file, data=model.SerializeToString(deterministic=True))

    return edit


def nudge(body: onnx.GraphProto) -> None:
    """Change the last bit of the first weight."""
    constant = next(c for c in body.initializer if c.name.startswith("conv") and len(c.dims) == 4)
    data = bytearray(constant.raw_data)
    data[0] ^= 1
    constant.raw_data = bytes(data)


def no_slope(body: onnx.GraphProto) -> None:
    """Multiply the gradients by nothing."""
    last = body.node[-1]
    assert last.output[0] == "gradients"
    body.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    body.node.insert(
        len(body.node) - 1, onnx.helper.make_node("Mul", [last.input[0], "nothing"], ["flat"])
    )
    body.node[-1].input[0] = "flat"


def other_bias(body: onnx.GraphProto) -> None:
    constant = next(c for c in body.initializer if c.name == "fc1.bias")
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) + 1, constant.name))


def other_scale(body: onnx.GraphProto) -> None:
    constant = next(c for c in body.initializer if c.name.endswith(".input.scale"))
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) / 2, constant.name))


def with_details(**changed: Any) -> Edit:
    return lambda file: replace(file, details={**file.details, **changed})


def ranges(factor: float) -> Edit:
    def edit(file: NewFile) -> NewFile:
        calibration = file.details["calibration"]
        found = {name: factor * limit for name, limit in calibration["ranges"].items()}
        return with_details(calibration={**calibration, "ranges": found})(file)

    return edit


def other_weights(file: NewFile) -> NewFile:
    state = load(file.data)
    state["fc3.bias"] = state["fc3.bias"] + 1
    return replace(file, data=save(state))


# Honest bundles


def test_every_graph_of_an_honest_bundle_is_the_same(honest: Bundle) -> None:
    found = rederive(honest)
    assert statuses(found) == {
        "weights.safetensors": "not-rederivable", **dict.fromkeys(GRAPHS, "same")
    }  # fmt: skip
    refuse_differences(found)
    (lowered,) = (file for file in found if file.path == FORWARD)
    assert lowered.why == "lower of weights.safetensors"


def test_a_foreign_network_begins_the_bundle_and_the_rest_follows(foreign: Bundle) -> None:
    found = rederive(foreign)
    assert statuses(found) == {
        FORWARD: "not-rederivable", **dict.fromkeys({GRADIENT} | HALVES | GRIDS, "same")
    }  # fmt: skip
    (root,) = (file for file in found if file.path == FORWARD)
    assert "onnx theirs.onnx" in root.why and foreign.card.source.sha256[:16] in root.why
    refuse_differences(found)


@pytest.mark.parametrize("defense", ["sm", "ls", "brelu", "l2sm", "ccn+ls", "bn", "lrn"])
def test_every_defense(defense: str, tmp_path: Path) -> None:
    bundle = export_bundle(
        as_run(random_network("mnist-cnn", defense)),
        tmp_path / "bundle",
        optimize="onnxruntime-cpu",
        precisions=("fp32", "fp16"),
    )
    found = statuses(rederive(bundle))
    assert set(found.values()) == {"same", "not-rederivable"}
    assert found[FORWARD] == found[GRADIENT] == found["graphs/gradient-fp16.onnx"] == "same"


def test_the_bytes_depend_on_no_hash_seed(honest: Bundle, foreign: Bundle) -> None:
    code = (
        "import sys\nfrom ccn_deploy.bundle import open_bundle\n"
        "from ccn_deploy.exporters.rederive import rederive\n"
        "for path in sys.argv[1:]:\n"
        "    for file in rederive(open_bundle(path)):\n        print(file.path, file.status)"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code, honest.path, foreign.path],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        expected = [*statuses(rederive(honest)).items(), *statuses(rederive(foreign)).items()]
        assert [tuple(line.split()) for line in run.stdout.splitlines()] == expected


# Lies

LIES: dict[str, tuple[str, Edit, set[str]]] = {
    **{f"a weight of {path}": (path, graph(nudge), {path}) for path in sorted(GRAPHS)},
    "a gradient of 0": (GRADIENT, graph(no_slope), {GRADIENT}),
    "an optimised bias": (OPTIMISED, graph(other_bias), {OPTIMISED}),
    "a scale in the graph": (
        "graphs/forward-int8.onnx", graph(other_scale), {"graphs/forward-int8.onnx"},
    ),
    "ranges in the manifest": (
        "graphs/forward-int8.onnx", ranges(0.5), {"graphs/forward-int8.onnx"},
    ),
    "no ranges": (
        "graphs/forward-fp8.onnx", with_details(calibration={}), {"graphs/forward-fp8.onnx"},
    ),
    "ranges that are none": (
        "graphs/forward-fp8.onnx", ranges(-1.0), {"graphs/forward-fp8.onnx"},
    ),
    "precisions of layers": (
        "graphs/forward-fp16.onnx", with_details(layers={}), {"graphs/forward-fp16.onnx"},
    ),
    "another lineage": (
        GRADIENT,
        lambda file: replace(file, lineage=Lineage(sources=(OPTIMISED,), step="vjp")),
        {GRADIENT},
    ),
    "nodes kept that are not": (
        "graphs/forward-fp16.onnx",
        lambda file: replace(
            file,
            lineage=Lineage(
                sources=(FORWARD,), step="cast", settings={"precision": "fp16", "keep_fp32": []}
            ),
        ),
        {"graphs/forward-fp16.onnx"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_differs_and_names_its_file(name: str, honest: Bundle, tmp_path: Path) -> None:
    path, edit, wrong = LIES[name]
    liar = told(honest, tmp_path / "liar", path, edit)
    found = rederive(liar)
    assert {file.path for file in found if file.status == "differs"} == wrong
    with pytest.raises(IntegrityError, match=path) as caught:
        refuse_differences(found)
    assert caught.value.exit_code == ExitCode.INTEGRITY


@pytest.mark.parametrize(
    "path", [GRADIENT, "graphs/forward-bf16.onnx", "graphs/gradient-fp16.onnx", *sorted(GRIDS)]
)
def test_a_lie_about_a_foreign_network(path: str, foreign: Bundle, tmp_path: Path) -> None:
    def change(body: onnx.GraphProto) -> None:
        constant = max(body.initializer, key=lambda c: len(c.raw_data))
        constant.raw_data = constant.raw_data[:-1] + bytes([constant.raw_data[-1] ^ 1])

    found = rederive(told(foreign, tmp_path / "liar", path, graph(change)))
    assert {file.path for file in found if file.status == "differs"} == {path}


def test_other_weights_make_every_graph_differ(honest: Bundle, tmp_path: Path) -> None:
    """Every graph is compared with what the weights give, not with the graph it would come from."""
    forged = told(honest, tmp_path / "w", "weights.safetensors", other_weights)
    found = statuses(rederive(forged))
    assert {path for path, status in found.items() if status == "differs"} == {
        "weights.safetensors", *GRAPHS
    }  # fmt: skip


@pytest.mark.parametrize("defense", ["sm", "l2sm", "brelu", "none"])
def test_another_defense_in_the_card(defense: str, honest: Bundle, tmp_path: Path) -> None:
    liar = told(honest, tmp_path / "liar", MANIFEST, lambda file: file, defense=defense)
    found = {file.path: file for file in rederive(liar)}
    assert found[FORWARD].status == "differs"
    assert defense in found[FORWARD].why


def test_classes_in_another_order(honest: Bundle, tmp_path: Path) -> None:
    """The float32 graph with two classes exchanged, where its twin was edited before."""
    (edited,) = (
        file
        for file in reorder_classes(lean(honest, tmp_path / "a"), tmp_path / "b").manifest.files
        if file.runtime
    )
    data = (tmp_path / "b" / edited.path).read_bytes()
    liar = told(honest, tmp_path / "liar", FORWARD, lambda file: replace(file, data=data))
    found = statuses(rederive(liar))
    assert {path for path, status in found.items() if status == "differs"} == {FORWARD}


def lean(bundle: Bundle, output: Path) -> Bundle:
    files = [
        NewFile.copy(bundle, record)
        for record in bundle.manifest.files
        if record.path in ("weights.safetensors", FORWARD)
    ]
    return write_bundle(output, card=bundle.card, files=files)


def test_an_architecture_without_weights(honest: Bundle, tmp_path: Path) -> None:
    files = [NewFile.copy(honest, record) for record in honest.manifest.files if record.precision]
    found = rederive(write_bundle(tmp_path / "liar", card=honest.card, files=files))
    (root,) = (file for file in found if file.path == FORWARD)
    assert root.status == "differs" and "there are no weights" in root.why


@pytest.mark.parametrize("made_by", [{"onnx": "1.0"}, {"ccn-deploy": "9.9"}, {"other": "1"}])
def test_other_versions_leave_doubt_and_never_pass(
    made_by: dict[str, str], honest: Bundle, tmp_path: Path
) -> None:
    def edit(file: NewFile) -> NewFile:
        return replace(graph(no_slope)(file), made_by={**file.made_by, **made_by})

    found = rederive(told(honest, tmp_path / "liar", GRADIENT, edit))
    (gradient,) = (file for file in found if file.path == GRADIENT)
    ((name, version),) = made_by.items()
    assert gradient.status == "inconclusive"
    assert f"made by {name} {version}" in gradient.why
    refuse_differences(found)


def test_other_versions_that_make_the_same_bytes_are_the_same(
    honest: Bundle, tmp_path: Path
) -> None:
    bundle = told(
        honest, tmp_path / "old", GRADIENT, lambda file: replace(file, made_by={"onnx": "1.0"})
    )
    assert statuses(rederive(bundle))[GRADIENT] == "same"


def test_files_without_lineage_are_derived_by_their_role(honest: Bundle, tmp_path: Path) -> None:
    files = [NewFile.copy(honest, record) for record in honest.manifest.files]
    plain = [replace(file, lineage=None) for file in files if file.precision in ("", "fp32")]
    old = write_bundle(tmp_path / "old", card=honest.card, files=plain)
    assert {status for path, status in statuses(rederive(old)).items() if path in GRAPHS} == {
        "same"
    }
    found = rederive(told(old, tmp_path / "liar", GRADIENT, graph(no_slope)))
    (gradient,) = (file for file in found if file.path == GRADIENT)
    assert gradient.status == "inconclusive" and "does not say how" in gradient.why


def engine_of(sources: tuple[str, ...]) -> NewFile:
    return NewFile(
        "engines/x.engine", b"code", Role.ENGINE, "fp16", "tensorrt",
        lineage=Lineage(sources=sources, step="build"),
    )  # fmt: skip


def test_an_engine_is_said_not_to_be_derived(honest: Bundle, tmp_path: Path) -> None:
    for name, source, status in (
        ("right", "graphs/forward-fp16.onnx", "not-rederivable"),
        ("wrong", FORWARD, "differs"),
    ):
        files = [NewFile.copy(honest, record) for record in honest.manifest.files]
        bundle = write_bundle(
            tmp_path / name, card=honest.card, files=[*files, engine_of((source,))]
        )
        assert statuses(rederive(bundle))["engines/x.engine"] == status


def test_a_graph_that_no_pass_makes(honest: Bundle, tmp_path: Path) -> None:
    files = [NewFile.copy(honest, record) for record in honest.manifest.files]
    odd = replace(files[-1], path="graphs/odd.onnx", runtime="onnxruntime-cuda")
    bundle = write_bundle(tmp_path / "odd", card=honest.card, files=[*files, odd])
    assert statuses(rederive(bundle))["graphs/odd.onnx"] == "differs"


def test_two_files_in_one_role_open_no_bundle(honest: Bundle, tmp_path: Path) -> None:
    files = [NewFile.copy(honest, record) for record in honest.manifest.files]
    with pytest.raises(IntegrityError, match=r"forward-fp32\.onnx and graphs/second\.onnx"):
        write_bundle(
            tmp_path / "two", card=honest.card,
            files=[*files, replace(files[1], path="graphs/second.onnx")],
        )  # fmt: skip
    with pytest.raises(IntegrityError, match="twice"):
        Manifest.from_bytes(
            Manifest(honest.card, (*honest.manifest.files, honest.manifest.files[-1])).to_bytes()
        )


# By the command


def verify(path: Path, *options: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "ccn_deploy.cli.main", "verify-parity", str(path)]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize(
    "name",
    ["a gradient of 0", "an optimised bias", "ranges in the manifest", f"a weight of {FORWARD}"],
)
def test_the_command_exits_5_before_it_measures(name: str, honest: Bundle, tmp_path: Path) -> None:
    path, edit, _ = LIES[name]
    liar = told(honest, tmp_path / "liar", path, edit)
    code, out, errors = verify(liar.path, "--dataset", "mnist5k", "--samples", "8")
    assert (code, out) == (ExitCode.INTEGRITY, "")
    assert f"error: {path} is not what it is said to be" in errors
    assert not liar.evidence.exists()


def test_the_command_shows_the_lineage_and_whether_it_measured(
    foreign: Bundle, tmp_path: Path
) -> None:
    data = noise(tmp_path / "i.npz", (3, 8, 8), 5)
    options = ["verify-parity", str(foreign.path), "--dataset", str(data), "--samples", "8"]
    options += ["--threads", "1"]
    runner = CliRunner()
    documents = [
        json.loads(runner.invoke(app, [*options, "--json", *more]).stdout)
        for more in ([], [], ["--no-lineage"])
    ]
    assert [document["evidence"] for document in documents] == ["measured", "read", "read"]
    assert documents[0]["lineage"] == [file.document() for file in rederive(foreign)]
    assert documents[2]["lineage"] is None
    assert {document["verdict"] for document in documents} == {"pass"}
    text = runner.invoke(app, options).stdout
    assert "Lineage" in text and "was read; --fresh measures again" in text
    assert f"{FORWARD}: what was taken in from onnx theirs.onnx" in text
    assert "no graph was derived again" in runner.invoke(app, [*options, "--no-lineage"]).stdout


def test_doubt_about_the_lineage_is_inconclusive(foreign: Bundle, tmp_path: Path) -> None:
    def edit(file: NewFile) -> NewFile:
        model = onnx.load_model_from_string(file.data)
        model.graph.name = "by another version"
        data = model.SerializeToString(deterministic=True)
        return replace(file, data=data, made_by={"onnx": "1.0"})

    doubtful = told(foreign, tmp_path / "doubtful", GRADIENT, edit)
    data = noise(tmp_path / "i.npz", (3, 8, 8), 5)
    result = CliRunner().invoke(
        app, ["verify-parity", str(doubtful.path), "--dataset", str(data), "--samples", "8"]
    )
    assert result.exit_code == ExitCode.INCONCLUSIVE
    assert result.stdout.splitlines()[-1].startswith("INCONCLUSIVE")


def test_classes_named_in_another_order_than_the_data_of_the_training(
    honest: Bundle, tmp_path: Path
) -> None:
    names = ("1", "0", *honest.card.class_names[2:])
    liar = told(
        honest, tmp_path / "liar", MANIFEST, lambda file: file,
        class_names=names, training={"dataset": "mnist5k"},
    )  # fmt: skip
    code, _, errors = verify(liar.path, "--no-lineage", "--samples", "8")
    assert code == ExitCode.INTEGRITY
    assert "another order than mnist5k" in errors


def test_parity_evidence_of_another_bundle_under_this_ones_name(
    honest: Bundle, tmp_path: Path
) -> None:
    """Byte for byte, so that its own digest is right."""
    mine, other = lean(honest, tmp_path / "mine"), lean(honest, tmp_path / "other")
    renamed = write_bundle(
        other.path, overwrite=True, files=[NewFile.copy(mine, r) for r in mine.manifest.files],
        card=msgspec.structs.replace(honest.card, name="another"),
    )  # fmt: skip
    options = ["--dataset", "mnist5k", "--samples", "8", "--threads", "1", "--no-lineage"]
    for bundle in (mine, renamed):
        assert verify(bundle.path, *options)[0] == 0
    (ours,), (theirs,) = (list((b.evidence / "parity").iterdir()) for b in (mine, renamed))
    assert ours.name != theirs.name
    ours.write_bytes(theirs.read_bytes())
    code, out, errors = verify(mine.path, *options)
    assert (code, out) == (ExitCode.INTEGRITY, "")
    assert ours.name in errors and "another bundle or setting" in errors
    assert verify(mine.path, *options, "--fresh")[0] == 0


# Graphs that compute no function of the images


def as_foreign(bundle: Bundle, output: Path, path: str, edit: Edit) -> Bundle:
    """Write a copy that begins with its forward graph, which then is the network."""
    source = Source(kind="onnx", name="theirs.onnx", sha256="0" * 64)
    files = [NewFile.copy(bundle, record) for record in bundle.manifest.files]
    kept = [edit(file) if file.path == path else file for file in files if file.precision]
    card = msgspec.structs.replace(bundle.card, architecture="", defense="", source=source)
    return write_bundle(output, card=card, files=kept)


def planted(*nodes: onnx.NodeProto, **constants: Any) -> Edit:
    """Return an edit that sends the logits through nodes, from ``straight`` to ``logits``."""

    def change(body: onnx.GraphProto) -> None:
        (last,) = (node for node in body.node if "logits" in node.output)
        last.output[0] = "straight"
        body.node.extend(nodes)
        body.initializer.extend(
            numpy_helper.from_array(np.array(value), name) for name, value in constants.items()
        )

    return graph(change)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output], f"planted-{output}", **attributes)


ADD = node("Add", ["straight", "odd"], "logits")
RANDOM = {
    "RandomNormalLike": planted(node("RandomNormalLike", ["straight"], "odd", seed=1.0), ADD),
    "RandomNormal": planted(node("RandomNormal", [], "odd", shape=[1, 10], seed=1.0), ADD),
    "Bernoulli": planted(node("Bernoulli", ["straight"], "odd", seed=1.0), ADD),
    "Dropout": planted(
        node("Dropout", ["straight", "half", "on"], "logits", seed=1),
        half=np.float32(0.5), on=True,
    ),
    "Dropout by the batch": planted(
        node("Shape", ["straight"], "shape"),
        node("Gather", ["shape", "first"], "batch"),
        node("Equal", ["batch", "size"], "on"),
        node("Dropout", ["straight", "half", "on"], "logits", seed=1),
        half=np.float32(0.5), first=np.int64(0), size=np.int64(64),
    ),
    "BatchNormalization": planted(
        node("BatchNormalization", ["straight", "one", "nil", "nil", "one"], "logits",
             training_mode=1),
        one=np.ones(10, np.float32), nil=np.zeros(10, np.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("path", [FORWARD, "graphs/forward-int8.onnx", "graphs/forward-fp16.onnx"])
def test_a_graph_that_is_no_function_is_not_measured(
    name: str, path: str, honest: Bundle, tmp_path: Path
) -> None:
    from ccn_deploy.runtimes.torch_runtime import check_programs
    from ccn_deploy.targets import Target

    liar = as_foreign(honest, tmp_path / "liar", path, RANDOM[name])
    precision = path.removesuffix(".onnx").rpartition("-")[2]
    with pytest.raises(IntegrityError, match=f"{path}.*planted"):
        check_programs(liar, Target("onnxruntime-cpu", precision))
    check_programs(liar, Target("onnxruntime-cpu", "fp8"))


@pytest.mark.parametrize("command", ["verify-parity", "verify-robustness"])
def test_the_commands_refuse_a_random_graph(command: str, honest: Bundle, tmp_path: Path) -> None:
    liar = as_foreign(honest, tmp_path / "liar", FORWARD, RANDOM["Dropout by the batch"])
    options = ["--dataset", "mnist5k", "--samples", "8"]
    options += ["--no-lineage"] if command == "verify-parity" else ["--attack", "fgsm"]
    run = subprocess.run(
        [sys.executable, "-m", "ccn_deploy.cli.main", command, str(liar.path), *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == ExitCode.INTEGRITY, run.stderr
    assert "planted-logits" in run.stderr


def test_dropout_that_is_off_is_let_in(honest: Bundle, tmp_path: Path) -> None:
    from ccn_deploy.runtimes.torch_runtime import check_programs
    from ccn_deploy.targets import Target

    off = planted(
        node("Dropout", ["straight", "half", "on"], "logits"), half=np.float32(0.5), on=False
    )
    bundle = as_foreign(honest, tmp_path / "off", FORWARD, off)
    check_programs(bundle, Target("onnxruntime-cpu"))
