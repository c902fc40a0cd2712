"""`ccn-deploy export`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import (
    DataDirOption,
    DatasetOption,
    JsonOption,
    OptionGroup,
    SeedOption,
    takes,
    takes_data_options,
)

if TYPE_CHECKING:
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.data import DataOptions
    from ccn_deploy.exporters.sources.opening import SourceOptions

SCHEMA = "ccn-deploy/export/1"


SOURCE = OptionGroup(
    "What the source expects",
    {
        "weights": ("FILE", True, "Weights of a module, .safetensors or .pth; nothing is "
            "unpickled."),
        "classes": ("FILE", "numbers", "Names of the classes: one a line, or JSON."),
        "name": (None, "the file's", "Of the network."),
        "preprocessing": ("FILE", True, "Hugging Face's preprocessor_config.json or timm's "
            "config.json; the options below beat it."),
        "input_layout": (None, "told from the file", "nchw or nhwc."),
        "input_range": ("LOW,HIGH", "0,1", "Values of a black and of a white pixel, such as "
            "0,255."),
        "mean": ("M,...", "0", "Subtracted: one number, or one a channel in the source's order and "
            "range."),
        "std": ("S,...", "1", "What is then divided by: one number, or one a channel."),
        "channel_order": (None, "rgb", "rgb or bgr."),
        "input_size": ("HxW", True, "Of the images, where the source leaves it open."),
        "input_name": (None, True, "Input with the images, where a file has several."),
        "output_name": (None, "the first", "Output with the logits or probabilities."),
    },
    aliases={"input_name": "--input"},
)  # fmt: skip


def _source_options(**said: str | None) -> SourceOptions:
    """Return what the options of :data:`SOURCE` say; they beat a file of preprocessing.

    Raises:
        UsageError: One of them means nothing, or the file cannot be read.
    """
    from ccn_deploy.exporters.sources.intake import Intake, parse_numbers, parse_size
    from ccn_deploy.exporters.sources.opening import SourceOptions
    from ccn_deploy.exporters.sources.preprocessing_config import read_preprocessing

    given: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
    weights, classes, preprocessing = (
        Path(given.pop(key)) if key in given else None
        for key in ("weights", "classes", "preprocessing")
    )
    name = given.pop("name", "")
    for key in ("input", "output"):
        given[key] = given.pop(f"{key}_name", None)
    for key, count in (("mean", None), ("std", None), ("input_range", 2)):
        if key in given:
            given[key] = parse_numbers(given[key], f"--{key.replace('_', '-')}", count)
    if "input_size" in given:
        given["input_size"] = parse_size(given["input_size"])
    told = None if preprocessing is None else read_preprocessing(preprocessing)
    return SourceOptions(
        intake=(Intake() if told is None else told.intake).replaced(**given),
        weights=weights,
        classes=classes,
        evaluation={} if told is None else told.facts(),
        name=name,
    )


@takes_data_options
@takes("expected", SOURCE, _source_options)
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A run of `ccn-deploy train`, a bundle to add to, FILE.onnx, or a factory of a "
            "torch module: package.module:factory or path/to/file.py:factory.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", help="Directory to make: the bundle.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
    expected: SourceOptions,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="onnx, which is always written; tensorrt-rtx, which needs no GPU; tensorrt, for "
            "the GPU that is here; triton, a model repository in BUNDLE/triton. Repeatable.",
            show_default="onnx",
        ),
    ] = None,
    precisions: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="Of graphs and engines: fp32, of which the graphs are always written; fp16, "
            "bf16, int8, fp8. Repeatable.",
            show_default="fp32",
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-fp32",
            metavar="NODE",
            help="Nodes, or what their names begin with, that stay float32 beside those that do by "
            "structure. Repeatable.",
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            "--batch", metavar="MIN,OPT,MAX", help="Smallest, usual and largest batch of engines."
        ),
    ] = "1,32,256",
    compute_capabilities: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            metavar="X.Y",
            help="Of a GPU that TensorRT-RTX engines are for, such as 8.6. Repeatable.",
            show_default="8.0 and later",
        ),
    ] = None,
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32", help="Let engines round factors of float32 products to ten bits: faster."
        ),
    ] = False,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="METHOD",
            help="How int8 and fp8 find ranges of activations: min-max, entropy, percentile.",
        ),
    ] = "min-max",
    calibration_samples: Annotated[
        int,
        typer.Option(
            "--calibration-samples", min=1, help="Images of the training split to find them on."
        ),
    ] = 512,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    data: DataOptions,
    seed: SeedOption = 0,
    no_gradient: Annotated[
        bool,
        typer.Option(
            "--no-gradient",
            help="Leave out the graph of the input gradients, which attacks on the deployed "
            "runtime itself need. For a bundle that is only served.",
        ),
    ] = False,
    optimize: Annotated[
        str | None,
        typer.Option(
            "--optimize",
            metavar="RUNTIME",
            help="Add a forward graph written for this runtime, which then executes it. The "
            "default graph stays as it is. Known: onnxruntime-cpu.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle of a network: graphs, gradients, other precisions, engines."""
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require

    for module in ("torch", "safetensors", "onnx"):
        require(module, "train", "to export a network")
    from ccn_deploy.exporters import CalibrationRequest, export_bundle
    from ccn_deploy.exporters.sources.opening import NetworkSource, open_source
    from ccn_deploy.exporters.tensorrt.build import Batches

    notes: list[str] = []
    request = CalibrationRequest(
        calibration, calibration_samples, seed, dataset, data_dir, data, notes.append
    )
    with console.err.status("Opening the source") as status:
        opened = open_source(source, expected)
        if isinstance(opened, NetworkSource):
            notes += opened.notes
        bundle = export_bundle(
            opened,
            output,
            overwrite=overwrite,
            gradient=not no_gradient,
            optimize=optimize,
            formats=formats or ("onnx",),
            precisions=precisions or ("fp32",),
            batch=Batches.parse(batch),
            calibration=None if request == CalibrationRequest() else request,
            compute_capabilities=compute_capabilities or (),
            tf32=tf32,
            keep_fp32=keep_fp32 or (),
            progress=status.update,
            note=notes.append,
        )
    document = _document(bundle)
    if as_json:
        console.print_json(document)
    else:
        _print(document)
    for note in dict.fromkeys([*_notes(document, optimize), *notes]):
        console.err.print(note, soft_wrap=True, markup=False)


def _notes(document: dict[str, Any], optimize: str | None) -> Iterator[str]:
    """Yield what a user should know of the files, a sentence each."""
    files = document["files"]
    if optimize and not any(file["runtime"] == optimize for file in files):
        yield "No compact layer: the default graph is the one for every runtime."
    warnings: dict[str, None] = {}
    for file in files:
        details = file["details"]
        if file["role"] == "forward" and file["precision"] != "fp32":
            if "numeric" in details:
                warnings.update(dict.fromkeys(details["numeric"]["warnings"]))
            else:
                yield (
                    f"{file['path']}: no numeric report, for want of images of the training "
                    "split; give --dataset or --data-dir."
                )
        if details.get("reproducible") is False:
            yield f"{file['path']}: another build may give other bytes."
        for line in details.get("log", []):
            yield f"{file['path']}: {line}"
    yield from warnings


def _document(bundle: Bundle) -> dict[str, Any]:
    manifest, card = bundle.manifest, bundle.card
    return {
        "schema": SCHEMA,
        "bundle": str(bundle.path),
        "digest": manifest.digest,
        "name": card.name,
        "title": card.title,
        "architecture": card.architecture,
        "defense": card.defense,
        "class_names": list(card.class_names),
        "source": card.source.told(),
        "files": [
            {
                "path": record.path,
                "role": record.role,
                "precision": record.precision,
                "runtime": record.runtime,
                "bytes": record.bytes,
                "sha256": record.sha256,
                "details": dict(record.details),
            }
            for record in manifest.files
        ],
    }


def _print(document: dict[str, Any]) -> None:
    from ccn_deploy.cli import console
    from ccn_deploy.cli.tables import show
    from ccn_deploy.cli.text import line, plain
    from ccn_deploy.tables import Row, Table, texts

    line(f"[bold]{plain(document['bundle'])}[/]: {plain(document['title'])}")
    for topic, text in document["source"].items():
        line(f"{topic}: {plain(text)}")
    rows = [
        Row(file["path"], texts(f"{file['bytes']:,}", file["sha256"][:16]))
        for file in document["files"]
    ]
    show(Table("", ("file", "bytes", "sha256"), rows))
    for file in document["files"]:
        ops = file["details"].get("ops")
        if ops:
            summary = ", ".join(f"{count} {op}" for op, count in ops.items())
            line(f"ops in {plain(file['path'])}: {summary}")
    line(f"digest {document['digest']}")
    command = f"ccn-deploy verify-parity {shlex.quote(document['bundle'])}"
    console.err.print(f"Next: {plain(command)}", soft_wrap=True)
