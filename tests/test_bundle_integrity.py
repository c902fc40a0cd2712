from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.bundle import (
    MANIFEST,
    Bundle,
    Lineage,
    Manifest,
    NewFile,
    Source,
    open_bundle,
    write_bundle,
)
from ccn_deploy.errors import (
    CcnDeployError,
    EnvironmentUnfitError,
    ExitCode,
    IntegrityError,
    NotABundleError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.storage import canonical_json, sha256
from ccn_deploy.targets import Role, Target
from tests.cards import a_card

CARD = a_card(training={"dataset": "mnist5k", "accuracy": 0.97, "seed": 0})
FILES = (
    NewFile("weights.safetensors", bytes(range(256)), Role.WEIGHTS),
    NewFile(
        "graphs/fp32.onnx",
        b"not parsed" * 40,
        Role.FORWARD,
        "fp32",
        lineage=Lineage(sources=("weights.safetensors",), step="lower"),
        made_by={"onnx": "1"},
        details={"opset": 18},
    ),
    NewFile("graphs/cpu.onnx", b"optimised", Role.FORWARD, "fp32", "onnxruntime-cpu"),
    NewFile("graphs/empty", b"", Role.ENGINE, "fp16", "tensorrt"),
)


def make(path: Path, *, overwrite: bool = False, files: tuple[NewFile, ...] = FILES) -> Bundle:
    return write_bundle(
        path,
        card=CARD,
        files=files,
        overwrite=overwrite,
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pristine") / "bundle").path


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def forge(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it the digest that its new content should have."""
    document = json.loads((bundle / MANIFEST).read_bytes())
    change(document)
    del document["digest"]
    document["digest"] = sha256(canonical_json(document))
    (bundle / MANIFEST).write_bytes(canonical_json(document))


def refused(bundle: Path, kind: type[CcnDeployError], code: ExitCode) -> CcnDeployError:
    """Open a bundle that must be refused, in one or two lines, with this exit code."""
    with pytest.raises(kind) as caught:
        open_bundle(bundle)
    assert caught.value.exit_code == code
    assert caught.value.what and caught.value.hint
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


def test_what_was_written_is_what_is_read(pristine: Path) -> None:
    opened = open_bundle(pristine)
    for file in FILES:
        record = opened.file(file.role, file.precision, file.runtime)
        assert record.path == file.path
        assert opened.read(record) == file.data
        assert (record.bytes, record.sha256) == (len(file.data), sha256(file.data))
        assert NewFile.copy(opened, record) == file
    assert opened.card == CARD


def test_the_same_content_gives_the_same_bytes(pristine: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "elsewhere" / "other name").path
    assert (other / MANIFEST).read_bytes() == (pristine / MANIFEST).read_bytes()
    assert str(tmp_path).encode() not in (other / MANIFEST).read_bytes()


def test_the_digest_in_the_manifest_is_that_of_the_rest(pristine: Path) -> None:
    document = json.loads((pristine / MANIFEST).read_bytes())
    digest = document.pop("digest")
    assert digest == sha256(canonical_json(document)) == open_bundle(pristine).manifest.digest


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_one_flipped_byte_in_any_file_is_an_integrity_error(pristine: Path, data: Any) -> None:
    names = [path for path in sorted(pristine.rglob("*")) if path.is_file() and path.stat().st_size]
    path = data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    try:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        refused(pristine, IntegrityError, ExitCode.INTEGRITY)
    finally:
        path.write_bytes(whole)
    open_bundle(pristine)


def test_one_flipped_bit_at_every_byte_of_the_manifest(pristine: Path) -> None:
    whole = (pristine / MANIFEST).read_bytes()
    for at in range(len(whole)):
        for bit in (0x01, 0x20, 0x80):  # 0x20 turns upper into lower case, and blanks into NUL
            changed = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
            with pytest.raises(IntegrityError):
                Manifest.from_bytes(changed)


def test_the_manifest_cut_short_or_lengthened_at_any_byte(pristine: Path) -> None:
    whole = (pristine / MANIFEST).read_bytes()
    for changed in [*(whole[:cut] for cut in range(len(whole))), whole + b"\n", whole + b" "]:
        with pytest.raises(IntegrityError):
            Manifest.from_bytes(changed)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path)
def test_a_missing_file(bundle: Path, file: NewFile) -> None:
    (bundle / file.path).unlink()
    assert file.path in refused(bundle, IntegrityError, ExitCode.INTEGRITY).what


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path)
def test_a_file_of_another_length(bundle: Path, file: NewFile) -> None:
    for data in [file.data + b"\0", *([file.data[:-1]] if file.data else [])]:
        (bundle / file.path).write_bytes(data)
        assert file.path in refused(bundle, IntegrityError, ExitCode.INTEGRITY).what


def test_a_directory_in_the_place_of_a_file(bundle: Path) -> None:
    (bundle / "weights.safetensors").unlink()
    (bundle / "weights.safetensors").mkdir()
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(bundle: Path) -> None:
    (bundle / "weights.safetensors").unlink()
    os.mkfifo(bundle / "weights.safetensors")
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


def test_a_file_that_changes_after_opening_is_not_handed_to_a_parser(bundle: Path) -> None:
    opened = open_bundle(bundle)
    record = opened.file(Role.WEIGHTS)
    (bundle / record.path).write_bytes(bytes(len(FILES[0].data)))
    with pytest.raises(IntegrityError):
        opened.read(record)


@pytest.mark.parametrize(
    "path",
    [
        "../secret", "graphs/../../secret", "/etc/hostname", "..", ".", "", "./weights.safetensors",
        "graphs//fp32.onnx", "graphs\\fp32.onnx", "..\\secret", "C:/secret", "C:secret",
        "weights.safetensors/", "a\0b", 7, None, ["weights.safetensors"],
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_bundle_or_is_none(bundle: Path, path: object) -> None:
    secret = b"secret"
    (bundle.parent / "secret").write_bytes(secret)

    def point_outside(document: dict[str, Any]) -> None:
        document["files"][0].update(path=path, sha256=sha256(secret), bytes=len(secret))

    forge(bundle, point_outside)
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


@pytest.mark.parametrize("path", ["../out", "/tmp/out", "a\\b", ""])
def test_no_file_is_written_outside_the_bundle(tmp_path: Path, path: str) -> None:
    with pytest.raises(IntegrityError):
        make(tmp_path / "bundle", files=(NewFile(path, b"x", Role.WEIGHTS),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [MANIFEST, "weights.safetensors", "graphs", "graphs/fp32.onnx"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_link_though_its_target_is_byte_for_byte_right(
    bundle: Path, name: str, where: str
) -> None:
    moved = (bundle.parent if where == "outside" else bundle) / "moved"
    (bundle / name).rename(moved)
    (bundle / name).symlink_to(moved)
    assert "link" in refused(bundle, IntegrityError, ExitCode.INTEGRITY).what


def test_evidence_is_not_written_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (bundle / "evidence").symlink_to(tmp_path)
    with pytest.raises(IntegrityError):
        _ = open_bundle(bundle).evidence


def test_nor_through_a_link_below_it(bundle: Path, tmp_path: Path) -> None:
    (bundle / "evidence").mkdir()
    (bundle / "evidence" / "parity").symlink_to(tmp_path)
    with pytest.raises(IntegrityError, match="evidence/parity"):
        open_bundle(bundle).evidence_file("parity", "a.json")


def test_evidence_does_not_change_the_bundle(bundle: Path) -> None:
    evidence = open_bundle(bundle).evidence
    evidence.mkdir()
    (evidence / "parity.jsonl").write_bytes(b"{}")
    assert open_bundle(bundle).evidence == evidence


@pytest.mark.parametrize(
    "schema", ["ccn-deploy/bundle/3", "ccn-deploy/bundle/10", "other", 1, None]
)
def test_a_newer_schema_asks_for_an_upgrade(bundle: Path, schema: object) -> None:
    forge(bundle, lambda document: document.update(schema=schema))
    error = refused(bundle, EnvironmentUnfitError, ExitCode.ENVIRONMENT)
    assert "pip install --upgrade" in error.hint


def test_a_newer_schema_that_was_damaged_is_damaged(bundle: Path) -> None:
    forge(bundle, lambda document: document.update(schema="ccn-deploy/bundle/3"))
    text = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(text.replace(b'"ccn"', b'"ls0"'))
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def put(document: Any, name: str, value: object) -> None:
    *path, last = [int(key) if key.isdigit() else key for key in name.split(".")]
    for key in path:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize("part", [[], ["card"], ["card", "source"], ["files", 1]])
def test_a_field_left_out(bundle: Path, part: list[Any]) -> None:
    def inside(document: Any) -> Any:
        for key in part:
            document = document[key]
        return document

    names = list(inside(json.loads((bundle / MANIFEST).read_bytes())))
    whole = (bundle / MANIFEST).read_bytes()
    for name in names:
        if name not in ("digest", "schema"):
            (bundle / MANIFEST).write_bytes(whole)
            forge(bundle, lambda document, name=name: inside(document).pop(name))
            refused(bundle, IntegrityError, ExitCode.INTEGRITY)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("card.name", [7, {"a": 1}, ["ccn"], None, "x" * 5000]),
        ("card.architecture", [7, {"a": 1}, ["ccn"], None]),
        ("card.defense", [7, {"a": 1}, ["ccn"], None]),
        ("card.input_shape", ["text", 7, {"a": 1}, None, [1, 28], [1, 28, 28.0], [True, 1, 1]]),
        ("card.class_names", ["text", 7, {"a": 1}, [1], [[]], None, [], ["a", "a"]]),
        ("card.training", ["text", [], None, nested(500)]),
        ("card.source", [None, {}, "run"]),
        ("card.source.sha256", [None, "", "0" * 63, "G" * 64]),
        ("card.source.preprocessing", [None, {"mean": [1.0]}]),
        ("files", ["text", 7, {"a": 1}, [1], [[]], [{}], None]),
        ("files.1.details", ["text", [], 7, None, nested(500)]),
        ("files.1.made_by", [[], "onnx", {"onnx": 1}]),
        ("files.1.bytes", [-1, 400.0, "400", True]),
        ("files.1.precision", [32, "fp31", "fp64", "", None]),
        ("files.1.role", [[], "other", "weights", "engine", None]),
        ("files.1.runtime", ["tensorrt", "cpu", None, 1]),
        ("files.1.lineage", [[], {}, {"step": 1, "sources": [], "settings": {}}]),
    ],
)
def test_a_field_of_another_type_or_value(bundle: Path, name: str, values: list[object]) -> None:
    for value in values:
        forge(bundle, lambda document, value=value: put(document, name, value))
        refused(bundle, IntegrityError, ExitCode.INTEGRITY)


def test_a_field_that_the_schema_does_not_have(bundle: Path) -> None:
    forge(bundle, lambda document: document.update(surprise=1))
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)
    forge(bundle, lambda document: (document.pop("surprise"), document["files"][0].update(extra=1)))
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"null", b"[]", b"{}", b'"text"', b"\xff\xfe", b"{" * 100_000, b"[" * 100_000,
        b'{"digest": NaN, "schema": "ccn-deploy/bundle/1"}',
        b'{"digest": "", "schema": Infinity}',
        b'{"digest": "\\ud800", "schema": "\\ud800"}',
    ],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
def test_a_manifest_that_is_none(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


@pytest.mark.parametrize("what", ["nothing", "empty", "file", "other", "manifest is a directory"])
def test_a_path_that_holds_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / "path"
    if what == "file":
        path.write_bytes(b"onnx")
    elif what != "nothing":
        path.mkdir()
    if what == "other":
        (path / "model.onnx").write_bytes(b"onnx")
    if what == "manifest is a directory":
        (path / MANIFEST).mkdir()
    assert str(path) in refused(path, NotABundleError, ExitCode.USAGE).what


def test_a_role_or_precision_that_is_not_inside_names_what_is(pristine: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="fp32") as caught:
        open_bundle(pristine).file(Role.FORWARD, "int8")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_a_target_executes_the_graph_that_was_optimised_for_it_or_the_one_for_all(
    pristine: Path,
) -> None:
    bundle = open_bundle(pristine)
    assert bundle.program(Target("onnxruntime-cpu")).path == "graphs/cpu.onnx"
    for other in (Target("onnxruntime-cuda"), Target("torch", "fp64"), Target("torch")):
        assert bundle.program(other).path == "graphs/fp32.onnx"
    with pytest.raises(RuntimeUnavailableError, match="gradient"):
        bundle.program(Target("onnxruntime-cpu"), Role.GRADIENT)


FIRST = {
    "schema": "ccn-deploy/bundle/1",
    "architecture": "mnist-cnn",
    "defense": "ccn",
    "input_shape": [1, 28, 28],
    "class_names": list("0123456789"),
    "training": {"dataset": "mnist5k", "recipe": {"epochs": 3}},
    "files": [
        {"path": "weights.safetensors", "role": "weights", "precision": "", "bytes": 256,
         "sha256": sha256(bytes(range(256))), "made_by": {}, "details": {}},
        {"path": "graphs/fp32.onnx", "role": "forward", "precision": "fp32", "bytes": 400,
         "sha256": sha256(b"not parsed" * 40), "made_by": {"onnx": "1"}, "details": {"opset": 18}},
        {"path": "graphs/cpu.onnx", "role": "forward:onnxruntime-cpu", "precision": "fp32",
         "bytes": 9, "sha256": sha256(b"optimised"), "made_by": {}, "details": {}},
        {"path": "graphs/empty", "role": "engine:tensorrt", "precision": "fp16", "bytes": 0,
         "sha256": sha256(b""), "made_by": {}, "details": {"library": "tensorrt"}},
    ],
    "input": {"dtype": "float32", "layout": "NCHW", "range": [0.0, 1.0]},
    "output": {"dtype": "float32", "meaning": "logits"},
}  # fmt: skip


def write_first(bundle: Path, document: dict[str, Any]) -> None:
    """Put a manifest of schema 1 into a bundle."""
    digest = sha256(canonical_json(document))
    (bundle / MANIFEST).write_bytes(canonical_json({**document, "digest": digest}))


def test_a_bundle_of_schema_1_opens_as_what_it_says_in_schema_2(bundle: Path) -> None:
    write_first(bundle, FIRST)
    opened = open_bundle(bundle)
    assert opened.card == a_card(
        training=FIRST["training"],
        source=Source(kind="run", sha256=sha256(bytes(range(256)))),
    )
    graph, optimised, engine = opened.manifest.files[1:]
    assert (graph.role, graph.precision, graph.runtime) == (Role.FORWARD, "fp32", "")
    assert (graph.details, graph.made_by) == ({"opset": 18}, {"onnx": "1"})
    assert opened.program(Target("onnxruntime-cpu")) == optimised
    assert opened.files(Role.ENGINE, "fp16", "tensorrt") == (engine,)
    assert Manifest.from_bytes(opened.manifest.to_bytes()) == opened.manifest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", 7),
        ("input_shape", [1, 28]),
        ("class_names", "text"),
        ("training", []),
        ("files", {}),
        ("files", []),
        ("files.1.role", ["forward"]),
        ("files.1.role", "forward:other"),
        ("files.1.role", "other"),
        ("files.1.details", "text"),
        ("files.1.made_by", []),
        ("files.1.precision", 32),
        ("files.1.path", "../outside"),
        ("files.1.extra", 1),
        ("card", {}),
        ("surprise", 1),
    ],
)
def test_a_damaged_manifest_of_schema_1(bundle: Path, name: str, value: object) -> None:
    document = json.loads(json.dumps(FIRST))
    put(document, name, value)
    write_first(bundle, document)
    refused(bundle, IntegrityError, ExitCode.INTEGRITY)


def test_overwrite_replaces_a_bundle(bundle: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"):
        make(bundle)
    assert len(make(bundle, overwrite=True, files=FILES[:1]).manifest.files) == 1
    assert not (bundle / "graphs").exists()


@pytest.mark.parametrize("what", ["directory", "file"])
def test_overwrite_does_not_replace_what_is_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / "thesis"
    file = path / "chapter" if what == "directory" else path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"years of work")
    with pytest.raises(UsageError, match="no bundle"):
        make(path, overwrite=True)
    assert file.read_bytes() == b"years of work"
