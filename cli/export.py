"""`ccn-deploy export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import JsonOption

if TYPE_CHECKING:
    from ccn_deploy.bundle import Bundle

SCHEMA = "ccn-deploy/export/1"


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Directory written by `ccn-deploy train`.")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", help="Directory to make: the bundle.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
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
    """Lower a trained network to ONNX, check the graphs, and write a bundle."""
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require
    from ccn_deploy.runs import open_run

    trained = open_run(run)
    for module in ("torch", "safetensors", "onnx"):
        require(module, "train", "to export a run")
    from ccn_deploy.exporters import export_run

    with console.err.status("Lowering and checking"):
        bundle = export_run(
            trained, output, overwrite=overwrite, gradient=not no_gradient, optimize=optimize
        )
    document = _document(bundle)
    if as_json:
        console.print_json(document)
    else:
        _print(document)
    if optimize and not any(file["role"] == f"forward:{optimize}" for file in document["files"]):
        console.err.print("No compact layer: the default graph is the one for every runtime.")


def _document(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "schema": SCHEMA,
        "bundle": str(bundle.path),
        "digest": manifest.digest,
        "architecture": manifest.architecture,
        "defense": manifest.defense,
        "files": [
            {
                "path": record.path,
                "role": record.role,
                "precision": record.precision,
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

    path = escape(document["bundle"])
    console.out.print(
        f"[bold]{path}[/]: {document['defense']} on {document['architecture']}", soft_wrap=True
    )
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
