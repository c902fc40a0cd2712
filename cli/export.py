"""`ccn-deploy export`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import (
    CropOption,
    DataDirOption,
    InterpolationOption,
    JsonOption,
    LayoutOption,
    NpzImagesOption,
    NpzLabelsOption,
    ResizeOption,
    SeedOption,
    data_options,
)

if TYPE_CHECKING:
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.runs import TrainedRun

SCHEMA = "ccn-deploy/export/1"


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Directory written by `ccn-deploy train`, or a bundle to add to.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", help="Directory to make: the bundle.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
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
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="NAME|DIR|FILE.npz",
            help="Data set of those images: a name, a directory of class folders, an .npz file.",
            show_default="the one it was trained on",
        ),
    ] = None,
    data_dir: DataDirOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    interpolation: InterpolationOption = None,
    layout: LayoutOption = None,
    npz_images: NpzImagesOption = None,
    npz_labels: NpzLabelsOption = None,
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
    """Lower a trained network to ONNX, convert it, build engines, and write a bundle."""
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require

    source = _open(run)
    for module in ("torch", "safetensors", "onnx"):
        require(module, "train", "to export a run")
    from ccn_deploy.exporters import CalibrationRequest, export_run
    from ccn_deploy.exporters.tensorrt.build import Batches

    notes: list[str] = []
    request = CalibrationRequest(
        calibration,
        calibration_samples,
        seed,
        dataset,
        data_dir,
        data_options(
            resize=resize,
            crop=crop,
            interpolation=interpolation,
            layout=layout,
            npz_images=npz_images,
            npz_labels=npz_labels,
        ),
        notes.append,
    )
    with console.err.status("Lowering and checking") as status:
        bundle = export_run(
            source,
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
            progress=status.update,
            note=notes.append,
        )
    document = _document(bundle)
    if as_json:
        console.print_json(document)
    else:
        _print(document)
    for note in [*_notes(document, optimize), *notes]:
        console.err.print(note, soft_wrap=True, markup=False)


def _open(path: Path) -> TrainedRun | Bundle:
    """Open a run, or a bundle if the directory has a manifest."""
    from ccn_deploy.bundle import MANIFEST, open_bundle
    from ccn_deploy.runs import RUN, open_run

    if (path / MANIFEST).is_file() and not (path / RUN).is_file():
        return open_bundle(path)
    return open_run(path)


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
        "architecture": card.architecture,
        "defense": card.defense,
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
    from rich.markup import escape
    from rich.table import Table

    from ccn_deploy.cli import console
    from ccn_deploy.cli.text import network_title

    path = escape(document["bundle"])
    console.out.print(f"[bold]{path}[/]: {escape(network_title(document))}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("file", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("sha256", no_wrap=True)
    for file in document["files"]:
        table.add_row(escape(file["path"]), f"{file['bytes']:,}", file["sha256"][:16])
    console.out.print(table)
    for file in document["files"]:
        ops = file["details"].get("ops")
        if ops:
            summary = ", ".join(f"{count} {op}" for op, count in ops.items())
            console.out.print(f"ops in {escape(file['path'])}: {summary}", soft_wrap=True)
    console.out.print(f"digest {document['digest']}", soft_wrap=True)
    command = f"ccn-deploy verify-parity {shlex.quote(document['bundle'])}"
    console.err.print(f"Next: {escape(command)}", soft_wrap=True)
