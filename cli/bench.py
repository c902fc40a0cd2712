"""`ccn-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import (
    DataDirOption,
    DatasetOrNoiseOption,
    JsonOption,
    ThreadsOption,
    takes_data_options,
    tell_notes,
)

if TYPE_CHECKING:
    from ccn_deploy.bench import BenchRequest, BenchResult
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.data import DataOptions, Dataset
    from ccn_deploy.tables import Table

PLOTS = (".png", ".svg", ".pdf")


@takes_data_options
def bench(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE...",
            help="Directories written by `ccn-deploy export`. Several of one architecture are "
            "compared: the first against each of the others.",
        ),
    ],
    *,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="Measure this one; repeatable.",
            show_default="all that the bundle has files for and that work here",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision", help="Measure this one; repeatable.", show_default="all in the bundle"
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Images a call, with commas between.")
    ] = "1,32",
    dataset: DatasetOrNoiseOption = None,
    data_dir: DataDirOption = None,
    data: DataOptions,
    threads: ThreadsOption = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.001, help="To measure each configuration.")
    ] = 1.0,
    calls: Annotated[
        int | None,
        typer.Option("--calls", min=1, help="To measure of each, instead of --seconds."),
    ] = None,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Calls before.")] = 10,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help=f"Draw the result to this file ({', '.join(PLOTS)})."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency and throughput as a server sees them, by runtime, precision and batch."""
    from ccn_deploy.bench import BenchRequest
    from ccn_deploy.bench import bench as measure
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console
    from ccn_deploy.errors import UsageError
    from ccn_deploy.extras import require

    if plot is not None:  # before minutes of measuring
        if plot.suffix.lower() not in PLOTS:
            raise UsageError(
                f"--plot cannot write {plot.name}.", f"Name a file ending in {', '.join(PLOTS)}."
            )
        require("matplotlib", "train", "to draw a plot")
    batches = _batches(batch)
    opened = [open_bundle(path) for path in bundles]
    images = _dataset(opened[0], dataset, data_dir, data)
    request = BenchRequest(
        runtimes=tuple(runtime or ()),
        precisions=tuple(precision or ()),
        batches=batches,
        threads=threads,
        seconds=seconds,
        calls=calls,
        warm_up=warm_up,
        dataset=images,
    )
    with console.Bar() as bar:
        result = measure(opened, request, progress=bar)
    if plot is not None:
        from ccn_deploy.report.latency import draw
        from ccn_deploy.storage import write_atomic

        write_atomic(plot, draw(result, plot.suffix.lower()[1:]))
    if as_json:
        console.print_json(result.document())
    else:
        _print(result)
    if plot is not None:
        console.err.print(f"Plot: {plot}", markup=False, soft_wrap=True)


def _dataset(
    bundle: Bundle, name: str | None, directory: Path | None, options: DataOptions
) -> Dataset | None:
    """Load the images to time on; None for noise."""
    from dataclasses import asdict

    from ccn_deploy.errors import UsageError
    from ccn_deploy.evaluation import evaluation_data

    if name is None:
        options.refuse(asdict(options), "noise", "the images of a data set")
        if directory is not None:
            raise UsageError(
                "--data-dir is for a data set that has a name, and none is named.",
                "Add --dataset NAME, or leave out --data-dir.",
            )
        return None
    dataset = evaluation_data(bundle, name, directory, options)
    tell_notes(dataset)
    return dataset


def _batches(text: str) -> tuple[int, ...]:
    """Read ``1,32`` as (1, 32)."""
    from ccn_deploy.errors import UsageError

    sizes = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in sizes):
        raise UsageError(f"--batch is {text!r}.", "Give sizes of at least 1, such as 1,32.")
    return tuple(dict.fromkeys(map(int, sizes)))


def _print(result: BenchResult) -> None:
    """Print what was measured where, the table, and what was not measured and why."""
    from rich.markup import escape

    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.tables import show

    document = result.document()
    machine, setting = document["machine"], document["setting"]
    for name, network in document["networks"].items():
        out.print(f"[bold]{escape(name)}[/]: {escape(network['bundle'])}", soft_wrap=True)
    versions = ", ".join(f"{library} {version}" for library, version in result.versions.items())
    threads = f"{setting['threads']} of " if setting["threads"] else ""
    gpus = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    out.print(f"{machine['processor']}, {threads}{machine['cpus']} CPUs{gpus}; {versions}")
    out.print(f"images: {_images(result.request)}", markup=False, soft_wrap=True)
    show(_latencies(result), words=2)
    if len(result.bundles) > 1:
        show(_ratios(result), words=2)
    reasons: dict[str, dict[str, list[str]]] = {}
    for name, found in result.passed_over.items():
        for passed in found:
            targets = reasons.setdefault(" ".join(passed.why.splitlines()), {})
            targets.setdefault(f"{passed.runtime}-{passed.precision}", []).append(name)
    for why, targets in reasons.items():
        what = ", ".join(f"{target} ({', '.join(names)})" for target, names in targets.items())
        out.print(f"Not measured: {what}. {why}", markup=False, soft_wrap=True)


def _images(request: BenchRequest) -> str:
    """Say what was timed: noise, or how many images of which data."""
    if request.dataset is None:
        return "noise"
    data, count = request.dataset, max(request.batches)
    repeated = f", repeated to {count}" if len(data) < count else ""
    return f"{min(count, len(data))} of {data.name}, {data.split} split{repeated}"


def _latencies(result: BenchResult) -> Table:
    from ccn_deploy.tables import Row, Table, texts

    rows = []
    for row in result.rows:
        latency = row.latency
        times = (latency.p50, latency.p90, latency.p99)
        cells = texts(
            row.network,
            latency.batch,
            *("" if time is None else f"{1000 * time:.3g}" for time in times),
            f"{latency.images_per_second:,.0f}",
        )
        rows.append(Row(f"{row.runtime}-{row.precision}", cells))
    columns = ("runtime", "network", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s")
    return Table("", columns, rows)


def _ratios(result: BenchResult) -> Table:
    from ccn_deploy.tables import Row, Table, texts

    first = next(iter(result.bundles))
    rows = [
        Row(
            f"{row.runtime}-{row.precision}",
            texts(
                row.network,
                row.latency.batch,
                f"{row.ratio.median:.2f}",
                f"{row.ratio.low:.2f} to {row.ratio.high:.2f}",
            ),
        )
        for row in result.rows
        if row.ratio is not None
    ]
    columns = (f"time of {first} by that of", "network", "batch", "ratio", "half of the rounds")
    return Table("", columns, rows)
