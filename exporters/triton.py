"""A model repository for Triton Inference Server, written from a bundle.

One model for each forward graph and precision (ONNX Runtime backend), and one for each precision
that has TensorRT engines, whatever the number of GPUs they were built for. ``config.pbtxt`` goes
through the protobuf that the server itself reads it by. ``docs/triton.md`` is for users.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.errors import IntegrityError, LoweringError, UsageError
from ccn_deploy.extras import require
from ccn_deploy.graph.signature import INPUT, OUTPUT
from ccn_deploy.runtimes.base import LARGEST_BATCH
from ccn_deploy.storage import atomic_directory
from ccn_deploy.targets import Role

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
VERSION = "1"

NonEmpty = Annotated[list[int], msgspec.Meta(min_length=1)]

MANIFEST_PARAMETER = "ccn-deploy.manifest"
"""Parameter of a model with the digest of the manifest of the bundle it came from."""

BACKENDS = ("onnx", "tensorrt")


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        path: The directory to give to ``tritonserver --model-repository``.
        models: Names of the models in it.
        notes: What of the bundle was left out and why, one sentence each.
    """

    path: Path
    models: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Serving:
    """How the server gathers requests into batches.

    Attributes:
        max_batch: Largest batch; an engine's own limit, or 256 images for a graph, if None.
        preferred: Batch sizes that are run at once when they are reached; the size that an engine
            was tuned for, or none for a graph, if None.
        delay: Microseconds that a request may wait for company.

    Raises:
        UsageError: A number below the lowest that makes sense.
    """

    max_batch: int | None = None
    preferred: tuple[int, ...] | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        for number in (self.max_batch, *(self.preferred or ())):
            if number is not None and number < 1:
                raise UsageError(f"{number} is no size of a batch.", "Give 1 or more.")
        if self.delay < 0:
            raise UsageError(f"A delay of {self.delay} microseconds.", "Give 0 or more.")


def write_repository(
    bundle: Bundle,
    output: Path,
    *,
    backends: Sequence[str] = BACKENDS,
    serving: Serving | None = None,
) -> Repository:
    """Write the models of a bundle to a directory, whole or not at all.

    The same bundle and options give the same bytes. A repository that is there is replaced if it
    was written by this function, and left alone if it has anything else in it.

    Args:
        bundle: An open bundle; its files are checked again as they are copied.
        output: The directory to make.
        backends: Of :data:`BACKENDS`, those to write models for.
        serving: How requests are gathered.

    Raises:
        UsageError: Nothing in the bundle can be served that way, two engines claim one GPU, a size
            that an engine does not take, or ``output`` is something else.
        MissingExtraError: The package tritonclient is not installed.
        IntegrityError: A file of the bundle is not the one of its manifest, or an engine is
            described by a manifest that lacks what this needs.
        StorageError: The disk is full or not writable.
    """
    serving = serving or Serving()
    models = _models(bundle, backends, serving)
    notes = _notes(bundle)
    if not models:
        raise UsageError(
            f"The bundle has nothing that Triton serves by {' or '.join(backends)}."
            + "".join(f" {note}" for note in notes),
            "Export it again with --format tensorrt on the GPU that will serve it.",
        )
    _check_ours(output)
    labels = _labels(bundle.card.class_names)
    with atomic_directory(output, overwrite=True) as directory:
        for model in models:
            root = directory / model.name
            (root / VERSION).mkdir(parents=True)
            (root / CONFIG).write_bytes(_config_text(_config(bundle, model)))
            (root / LABELS).write_bytes(labels)
            for name, record in model.files.items():
                (root / VERSION / name).write_bytes(bundle.read(record))
    return Repository(output, tuple(model.name for model in models), notes)


@dataclass(frozen=True)
class _Model:
    """One model of the repository.

    Attributes:
        name: Of its directory.
        platform: What the server calls the format.
        files: File name below the version directory -> where it comes from.
        capabilities: Compute capability of a GPU -> file name; empty if one file is for all.
        max_batch: Largest batch.
        preferred: Batch sizes that are run at once when they are reached.
        profiles: How many optimization profiles every file has; 0 for a graph.
        delay: Microseconds that a request may wait.
    """

    name: str
    platform: str
    files: Mapping[str, FileRecord]
    capabilities: Mapping[str, str]
    max_batch: int
    preferred: tuple[int, ...]
    profiles: int
    delay: int


def _models(bundle: Bundle, backends: Sequence[str], serving: Serving) -> list[_Model]:
    """Return the models in order: backend, then the bundle's own."""
    for backend in backends:
        if backend not in BACKENDS:
            raise UsageError(
                f"{backend!r} is no backend that models are written for.",
                f"Known: {', '.join(BACKENDS)}.",
            )
    models = []
    files = bundle.manifest.files
    if "onnx" in backends:
        models += [
            _of_graph(bundle, r, serving)
            for r in files
            if (r.role, r.runtime) == (Role.FORWARD, "")
        ]
    if "tensorrt" in backends:
        engines: dict[str, list[FileRecord]] = {}
        for record in files:
            if (record.role, record.runtime) == (Role.ENGINE, "tensorrt"):
                engines.setdefault(record.precision, []).append(record)
        models += [_of_engines(bundle, p, records, serving) for p, records in engines.items()]
    return models


def _of_graph(bundle: Bundle, record: FileRecord, serving: Serving) -> _Model:
    limit = serving.max_batch or LARGEST_BATCH
    return _Model(
        name=_name(bundle, "onnx", record.precision),
        platform="onnxruntime_onnx",
        files={"model.onnx": record},
        capabilities={},
        max_batch=limit,
        preferred=_within(serving.preferred or (), limit),
        profiles=0,
        delay=serving.delay,
    )


def _of_engines(
    bundle: Bundle, precision: str, records: Sequence[FileRecord], serving: Serving
) -> _Model:
    files: dict[str, FileRecord] = {}
    capabilities: dict[str, str] = {}
    ranges = []
    for record in records:
        name, have, profiles = _described(record)
        files[name] = record
        ranges.append(profiles)
        for capability in have:
            if capability in capabilities:
                other = files[capabilities[capability]].path
                raise UsageError(
                    f"{other} and {record.path} are both for GPUs of compute capability "
                    f"{capability}; Triton takes one.",
                    "Export it again with one engine for each GPU.",
                )
            capabilities[capability] = name
    smallest = max(min(low for low, _, _ in profiles) for profiles in ranges)
    largest = min(max(high for _, _, high in profiles) for profiles in ranges)
    limit = serving.max_batch or largest
    if smallest > 1 or limit > largest:
        raise UsageError(
            f"The {precision} engines take batches of {smallest} to {largest} images, not 1 to "
            f"{limit}.",
            "Export it again with another --batch, which starts at 1.",
        )
    tuned = tuple(sorted({best for profiles in ranges for _, best, _ in profiles if best > 1}))
    return _Model(
        name=_name(bundle, "tensorrt", precision),
        platform="tensorrt_plan",
        files=files,
        capabilities=capabilities,
        max_batch=limit,
        preferred=_within(tuned if serving.preferred is None else serving.preferred, limit),
        profiles=min(map(len, ranges)),
        delay=serving.delay,
    )


class _Sizes(msgspec.Struct):
    """Shapes of one input that a profile takes; the batch comes first."""

    min: NonEmpty
    opt: NonEmpty
    max: NonEmpty


class _Batches(msgspec.Struct):
    """What the server must know of an engine, among the details of its line in the manifest."""

    compute_capabilities: Annotated[list[str], msgspec.Meta(min_length=1)]
    profiles: Annotated[list[dict[str, _Sizes]], msgspec.Meta(min_length=1)]


def _described(record: FileRecord) -> tuple[str, list[str], list[tuple[int, int, int]]]:
    """Return an engine's file name, compute capabilities, and (min, opt, max) of its profiles."""
    try:
        said = msgspec.convert(record.details, _Batches)
        sizes = [(p[INPUT].min[0], p[INPUT].opt[0], p[INPUT].max[0]) for p in said.profiles]
    except (msgspec.ValidationError, KeyError) as error:
        raise IntegrityError(
            f"The manifest does not say which GPUs and batches {record.path} is for.",
            "Export it again.",
        ) from error
    names = "-".join(f"sm{capability.replace('.', '')}" for capability in said.compute_capabilities)
    return f"{names}.plan", said.compute_capabilities, sizes


def _within(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """Return the sizes in order, each once; one above the limit is an error."""
    for size in sizes:
        if size > limit:
            raise UsageError(
                f"A preferred batch of {size} is larger than the largest, {limit}.",
                "Give a smaller one, or a larger --batch.",
            )
    return tuple(sorted(set(sizes)))


def _config(bundle: Bundle, model: _Model) -> Any:
    """Return the ``ModelConfig`` message."""
    schema = require("tritonclient.grpc.model_config_pb2", "triton", "to write a Triton model")
    image, classes = list(bundle.card.input_shape), [bundle.card.classes]
    logits = {"name": OUTPUT, "data_type": schema.TYPE_FP32, "dims": classes}
    digest = {"string_value": bundle.manifest.digest}
    kind = schema.ModelInstanceGroup.KIND_GPU if model.profiles else None
    profiles = [str(at) for at in range(model.profiles)] if model.profiles > 1 else []
    return schema.ModelConfig(
        name=model.name,
        platform=model.platform,
        max_batch_size=model.max_batch,
        input=[{"name": INPUT, "data_type": schema.TYPE_FP32, "dims": image}],
        output=[{**logits, "label_filename": LABELS}],
        dynamic_batching={
            "preferred_batch_size": model.preferred,
            "max_queue_delay_microseconds": model.delay,
        },
        # KIND_AUTO, the default, takes a GPU if there is one.
        instance_group=[{"count": 1, "kind": kind, "profile": profiles}],
        cc_model_filenames=dict(model.capabilities),
        parameters={MANIFEST_PARAMETER: digest},
        model_warmup=[
            {
                "name": f"zeros-{size}",
                "batch_size": size,
                "inputs": {
                    INPUT: {"data_type": schema.TYPE_FP32, "dims": image, "zero_data": True}
                },
            }
            for size in sorted({1, *model.preferred})
        ],
    )


def _config_text(config: Any) -> bytes:
    """Return the text form of a message, which was read back and is the same message.

    Raises:
        LoweringError: It is not.
    """
    text_format = require("google.protobuf.text_format", "triton", "to write a Triton model")
    text: str = text_format.MessageToString(config)
    if text_format.Parse(text, type(config)()) != config:
        raise LoweringError(
            f"The configuration of {config.name} does not read back as it was written.",
            "Nothing was written; this is a bug, please report it.",
        )
    return text.encode()


def _name(bundle: Bundle, backend: str, precision: str) -> str:
    """Return the name of a model, which is part of addresses and of paths."""
    return re.sub("[^A-Za-z0-9_.-]", "-", f"{bundle.card.name}-{backend}-{precision}").lstrip(".")


def _labels(names: Sequence[str]) -> bytes:
    """Return the label file: the name of class i on line i.

    Raises:
        UsageError: A name is more than a line.
    """
    for name in names:
        if len(name.splitlines()) > 1 or name.endswith(("\n", "\r")):
            raise UsageError(
                f"The class name {name!r} has a line break, and Triton reads one name a line.",
                "Train with class names of one line.",
            )
    return "".join(f"{name}\n" for name in names).encode()


def _notes(bundle: Bundle) -> tuple[str, ...]:
    if not any(r.role is Role.ENGINE and r.runtime != "tensorrt" for r in bundle.manifest.files):
        return ()
    return ("Triton has no backend for TensorRT-RTX engines: they are left out.",)


def _check_ours(output: Path) -> None:
    """Refuse to replace what this module did not write.

    Raises:
        UsageError: Something else is there.
    """
    if not output.exists() and not output.is_symlink():
        return
    ours = not output.is_symlink() and output.is_dir() and all(map(_is_ours, output.iterdir()))
    if not ours:
        raise UsageError(
            f"{output} has something in it that is no Triton model of ours, so it is not replaced.",
            "Choose another directory, or remove it yourself.",
        )


def _is_ours(entry: Path) -> bool:
    config = entry / CONFIG
    return config.is_file() and MANIFEST_PARAMETER.encode() in config.read_bytes()
