"""Real TensorRT-RTX engines of small networks, built on the CPU, and bundles that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccn_deploy.bundle import Bundle, FileRecord, NewFile, write_bundle
from ccn_deploy.runtimes.trt import capture, load_library, logger

RTX = "tensorrt-rtx"
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def build_rtx(graph: bytes, profile: Profile) -> bytes:
    """Build an engine for the compute capabilities that the library takes by default."""
    trt = load_library(RTX, "for a test")
    with capture() as log:
        builder = trt.Builder(logger(trt))
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger(trt))
        assert parser.parse(graph), log.lines
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.items():
            shapes.set_shape(name, low, best, high)
        config.add_optimization_profile(shapes)
        plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.lines
    return bytes(plan)


def details(**changed: Any) -> dict[str, Any]:
    """Return what a manifest says of an engine built here, but for what is changed."""
    return {
        "library": RTX,
        "version": load_library(RTX, "for a test").__version__,
        "magic": "vtrt",
        "system": "linux",
        "machine": "x86_64",
        "compute_capabilities": ["8.6", "8.9", "12.0"],
        "profiles": [],
        "tf32": False,
        **changed,
    }


def engine_file(
    plan: bytes, *, precision: str = "fp32", role: str = "engine", **changed: Any
) -> NewFile:
    said = details(**changed)
    library = said["library"]
    path = f"engines/{role}-{library}-{precision}.engine"
    return NewFile(path, plan, f"{role}:{library}", precision, {}, said)


def with_files(bundle: Bundle, path: Path, *files: NewFile) -> Bundle:
    """Return a copy of a bundle with more files, and a manifest that vouches for them."""
    manifest = bundle.manifest

    def kept(record: FileRecord) -> NewFile:
        return NewFile(
            record.path,
            bundle.read(record),
            record.role,
            record.precision,
            record.made_by,
            record.details,
        )

    return write_bundle(
        path,
        architecture=manifest.architecture,
        defense=manifest.defense,
        input_shape=manifest.input_shape,
        class_names=manifest.class_names,
        training=manifest.training,
        files=[*map(kept, manifest.files), *files],
    )
