"""Triton's model repository, read back by the protobuf that the server reads it by."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from ccn_deploy.bundle import Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.errors import IntegrityError, MissingExtraError, UsageError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.triton import Repository, Serving, write_repository
from ccn_deploy.storage import sha256
from ccn_deploy.targets import Role
from tests.networks import as_run, random_network

NAMES = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("b") / "ccn"
    return export_bundle(as_run(random_network("mnist-cnn", "ccn+ls")), path)


def engine(
    gpu: str = "9.0",
    *,
    precision: str = "fp16",
    library: str = "tensorrt",
    batches: tuple[tuple[int, int, int], ...] = ((1, 32, 128),),
    **changed: Any,
) -> NewFile:
    """Bytes that no parser must look at, described as an engine is."""
    number = gpu.replace(".", "")
    profiles = [
        {"images": {s: [n, 1, 28, 28] for s, n in zip(("min", "opt", "max"), sizes, strict=True)}}
        for sizes in batches
    ]
    details = {"compute_capabilities": [gpu], "profiles": profiles, **changed}
    data = b"ftrt" + f"{gpu} {precision}".encode()
    path = f"engines/{library}-{precision}-sm{number}.engine"
    return NewFile(path, data, Role.ENGINE, precision, library, details=details)


def with_files(
    bundle: Bundle, path: Path, *files: NewFile, names: tuple[str, ...] = NAMES, graphs: bool = True
) -> Bundle:
    manifest = bundle.manifest
    kept = [NewFile.copy(bundle, r) for r in manifest.files if graphs or r.role == "weights"]
    return write_bundle(
        path,
        card=msgspec.structs.replace(bundle.card, class_names=names),
        files=[*kept, *files],
    )


def config(repository: Repository, name: str) -> Any:
    text = (repository.path / name / "config.pbtxt").read_text()
    return text_format.Parse(text, schema.ModelConfig())


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_every_field_of_a_graph_is_what_the_graph_is(bundle: Bundle, tmp_path: Path) -> None:
    named = with_files(bundle, tmp_path / "named")
    repository = write_repository(named, tmp_path / "repository")
    (name,) = repository.models
    assert name == "mnist-cnn-ccn-ls-onnx-fp32"
    found, root = config(repository, name), repository.path / name
    assert (found.name, found.platform, found.max_batch_size) == (name, "onnxruntime_onnx", 256)

    graph = onnx.load(root / "1" / "model.onnx").graph  # the file itself, not the manifest
    for ends, said in ((graph.input, found.input), (graph.output, found.output)):
        (end,), (field,) = ends, said
        batch, *rest = end.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert field.name == end.name
        assert list(field.dims) == [d.dim_value for d in rest]
        assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert field.data_type == schema.TYPE_FP32

    labels = (root / found.output[0].label_filename).read_text("utf-8").splitlines()
    assert labels == list(NAMES)
    assert found.HasField("dynamic_batching")
    assert [group.kind for group in found.instance_group] == [schema.ModelInstanceGroup.KIND_AUTO]
    (warm,) = found.model_warmup
    assert warm.batch_size == 1
    zeros = warm.inputs["images"]
    assert zeros.zero_data and list(zeros.dims) == list(found.input[0].dims)
    assert zeros.data_type == found.input[0].data_type
    assert found.parameters["ccn-deploy.manifest"].string_value == named.manifest.digest
    assert not found.cc_model_filenames


def test_engines_for_two_gpus_are_one_model(bundle: Bundle, tmp_path: Path) -> None:
    both = with_files(
        bundle, tmp_path / "both", engine("9.0"), engine("8.6", batches=((1, 8, 64),))
    )
    repository = write_repository(both, tmp_path / "repository")
    assert repository.models == ("mnist-cnn-ccn-ls-onnx-fp32", "mnist-cnn-ccn-ls-tensorrt-fp16")
    found = config(repository, repository.models[1])
    assert found.platform == "tensorrt_plan"
    assert dict(found.cc_model_filenames) == {"8.6": "sm86.plan", "9.0": "sm90.plan"}
    versions = tree(repository.path / found.name / "1")
    for file in both.manifest.files:
        if file.role is Role.ENGINE:
            (gpu,) = file.details["compute_capabilities"]
            assert sha256(versions.pop(found.cc_model_filenames[gpu])) == file.sha256
    assert not versions  # and no default: an engine for another GPU must not be loaded
    assert not found.default_model_filename
    assert found.max_batch_size == 64  # what both take
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 32]
    assert [warm.batch_size for warm in found.model_warmup] == [1, 8, 32]
    (group,) = found.instance_group
    assert group.kind == schema.ModelInstanceGroup.KIND_GPU
    assert list(found.input[0].dims) == [1, 28, 28]
    assert list(found.output[0].dims) == [10]


def test_every_precision_has_models_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    graph = bundle.read(bundle.file(Role.FORWARD, "fp32"))
    int8 = NewFile("graphs/forward-int8.onnx", graph, Role.FORWARD, "int8")
    many = with_files(bundle, tmp_path / "many", int8, engine(), engine(precision="fp32"))
    repository = write_repository(many, tmp_path / "repository")
    assert [name.removeprefix("mnist-cnn-ccn-ls-") for name in repository.models] == [
        "onnx-fp32", "onnx-int8", "tensorrt-fp16", "tensorrt-fp32"
    ]  # fmt: skip
    assert sorted(repository.models) == sorted(entry.name for entry in repository.path.iterdir())


def test_several_profiles_are_all_used(bundle: Bundle, tmp_path: Path) -> None:
    file = engine(batches=((1, 1, 1), (1, 16, 64)))
    repository = write_repository(with_files(bundle, tmp_path / "b", file), tmp_path / "r")
    found = config(repository, repository.models[1])
    assert list(found.instance_group[0].profile) == ["0", "1"]
    assert found.max_batch_size == 64
    assert list(found.dynamic_batching.preferred_batch_size) == [16]


def test_options_say_how_requests_are_gathered(bundle: Bundle, tmp_path: Path) -> None:
    serving = Serving(max_batch=24, preferred=(16, 8), delay=500)
    repository = write_repository(bundle, tmp_path / "r", serving=serving)
    found = config(repository, repository.models[0])
    assert found.max_batch_size == 24
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 16]
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    assert [warm.batch_size for warm in found.model_warmup] == [1, 8, 16]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Serving(max_batch=0),
        lambda: Serving(preferred=(0,)),
        lambda: Serving(delay=-1),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make: Callable[[], Serving]) -> None:
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ((), {"serving": Serving(max_batch=4, preferred=(8,))}, "8 is larger than the largest, 4"),
        ((), {"backends": ("openvino",)}, "Known: onnx, tensorrt"),
        ((), {"backends": ("tensorrt",)}, "nothing that Triton serves by tensorrt"),
        (
            (engine("8.6", library="tensorrt-rtx"),),
            {"backends": ("tensorrt",)},
            "no backend for TensorRT-RTX engines",
        ),
        ((engine("9.0"), engine("9.1", compute_capabilities=["9.0"])), {}, "capability 9.0"),
        ((engine(batches=((4, 8, 16),)),), {}, "batches of 4 to 16 images, not 1 to 16"),
        ((engine(),), {"serving": Serving(max_batch=500)}, "not 1 to 500"),
    ],
)
def test_what_cannot_be_served_is_said_and_nothing_written(
    files: tuple[NewFile, ...], options: dict[str, Any], says: str, bundle: Bundle, tmp_path: Path
) -> None:
    made = with_files(bundle, tmp_path / "b", *files)
    with pytest.raises(UsageError) as refused:
        write_repository(made, tmp_path / "r", **options)
    assert says in str(refused.value)
    assert not (tmp_path / "r").exists()


def test_rtx_engines_are_left_out_and_that_is_said(bundle: Bundle, tmp_path: Path) -> None:
    made = with_files(bundle, tmp_path / "b", engine("8.6", library="tensorrt-rtx"))
    repository = write_repository(made, tmp_path / "r")
    assert repository.models == ("mnist-cnn-ccn-ls-onnx-fp32",)
    (note,) = repository.notes
    assert "TensorRT-RTX" in note
    assert write_repository(bundle, tmp_path / "plain").notes == ()


@pytest.mark.parametrize(
    "changed", [{"profiles": []}, {"compute_capabilities": []}, {"profiles": [{"x": 1}]}]
)
def test_an_engine_without_its_description_is_not_served(
    changed: dict[str, Any], bundle: Bundle, tmp_path: Path
) -> None:
    made = with_files(bundle, tmp_path / "b", engine(**changed))
    with pytest.raises(IntegrityError, match="sm90"):
        write_repository(made, tmp_path / "r")


def test_the_same_bundle_gives_the_same_bytes_and_replaces_its_own(
    bundle: Bundle, tmp_path: Path
) -> None:
    made = with_files(bundle, tmp_path / "b", engine("9.0"), engine("8.6"))
    first = tree(write_repository(made, tmp_path / "r").path)
    assert tree(write_repository(made, tmp_path / "other").path) == first
    (tmp_path / "r" / "mnist-cnn-ccn-ls-onnx-fp32" / "1" / "model.onnx").write_bytes(b"changed")
    assert tree(write_repository(made, tmp_path / "r").path) == first
    assert tree(write_repository(bundle, tmp_path / "r").path) != first
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("foreign", ["file", "directory", "model", "link"])
def test_what_is_not_ours_is_left_alone(foreign: str, bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "r"
    if foreign == "file":
        output.write_text("keep")
    elif foreign == "link":
        write_repository(bundle, tmp_path / "elsewhere")
        output.symlink_to(tmp_path / "elsewhere")
    else:
        write_repository(bundle, output)
        other = output / "other"
        other.mkdir()
        (other / ("config.pbtxt" if foreign == "model" else "notes.txt")).write_text('name: "o"')
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="not replaced"):
        write_repository(bundle, output)
    assert tree(tmp_path) == before


def test_a_damaged_file_is_not_passed_on(bundle: Bundle, tmp_path: Path) -> None:
    made = with_files(bundle, tmp_path / "b", engine())
    (tmp_path / "b" / "engines" / "tensorrt-fp16-sm90.engine").write_bytes(b"another")
    with pytest.raises(IntegrityError, match="sm90"):
        write_repository(made, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_class_name_of_two_lines_would_move_all_others(bundle: Bundle, tmp_path: Path) -> None:
    made = with_files(bundle, tmp_path / "b", names=("null\neins", *NAMES[1:]))
    with pytest.raises(UsageError, match="line break"):
        write_repository(made, tmp_path / "r")


def test_without_tritonclient_the_extra_is_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "tritonclient"]:
        monkeypatch.delitem(sys.modules, module)

    class Missing:
        def find_spec(self, name: str, *rest: object) -> None:
            if name.partition(".")[0] == "tritonclient":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"ccn-deploy\[triton\]"):
        write_repository(bundle, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_beside_the_evidence_it_leaves_the_bundle_whole(bundle: Bundle, tmp_path: Path) -> None:
    made = with_files(bundle, tmp_path / "b")
    write_repository(made, made.path / "triton")
    assert open_bundle(made.path).manifest == made.manifest
    assert write_repository(made, made.path / "triton").models
