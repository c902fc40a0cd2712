"""`ccn-deploy verify-parity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import (
    BundleArgument,
    CropOption,
    DataDirOption,
    DatasetOption,
    InterpolationOption,
    JsonOption,
    LayoutOption,
    NpzImagesOption,
    NpzLabelsOption,
    PrecisionOption,
    ResizeOption,
    RuntimeOption,
    SeedOption,
    ThreadsOption,
    data_options,
    tell_notes,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from ccn_deploy.bundle import Bundle
    from ccn_deploy.data import Dataset
    from ccn_deploy.parity import ParityEvidence, ParityResult
    from ccn_deploy.parity.judge import AnyFinding, Finding, GradientFinding

_ERRORS = ("max error", "p99", "of scale", "units")


def verify_parity(
    bundle: BundleArgument,
    *,
    runtime: RuntimeOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Images of each kind; also the large batch.",
            show_default="256, large images 32",
        ),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Compare every layer; name the first to depart.")
    ] = False,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    interpolation: InterpolationOption = None,
    layout: LayoutOption = None,
    npz_images: NpzImagesOption = None,
    npz_labels: NpzLabelsOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again even if the bundle has the evidence.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show that a runtime computes the trained function: logits and slopes against float64."""
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console
    from ccn_deploy.evaluation import evaluation_data
    from ccn_deploy.parity import judge

    opened = open_bundle(bundle)
    options = data_options(
        resize=resize,
        crop=crop,
        interpolation=interpolation,
        layout=layout,
        npz_images=npz_images,
        npz_labels=npz_labels,
    )
    images = evaluation_data(opened, dataset, data_dir, options)
    tell_notes(images)
    evidence = measure(
        opened,
        dataset=images,
        runtime=runtime,
        precision=precision,
        samples=samples,
        per_layer=per_layer,
        seed=seed,
        threads=threads,
        fresh=fresh,
    )
    result = judge(evidence)
    if as_json:
        console.print_json(result.document())
    else:
        _print(result)
    raise typer.Exit(result.verdict.exit_code)


def measure(
    bundle: Bundle,
    *,
    dataset: Dataset,
    runtime: str = "onnxruntime-cpu",
    precision: str = "fp32",
    samples: int | None = None,
    per_layer: bool = False,
    seed: int = 0,
    threads: int | None = None,
    fresh: bool = False,
) -> ParityEvidence:
    """Collect evidence with a bar on stderr; see :func:`ccn_deploy.parity.collect`."""
    from ccn_deploy.cli.console import progress
    from ccn_deploy.parity import ParityRequest, collect

    request = ParityRequest(
        dataset=dataset,
        runtime=runtime,
        precision=precision,
        samples=samples,
        per_layer=per_layer,
        seed=seed,
        threads=threads,
    )
    bar = progress()
    task = bar.add_task("", start=False)

    def report(what: str, done: int, total: int) -> None:
        if done == 0:  # evidence that is there already is not measured, and shows no bar
            bar.start()
            bar.start_task(task)
        bar.update(task, description=what, completed=done, total=total)

    try:
        return collect(bundle, request, progress=report, fresh=fresh)
    finally:
        if bar.live.is_started:
            bar.stop()


def _print(result: ParityResult) -> None:
    """Print the tables, what failed and why, and the verdict on the last line."""
    from ccn_deploy.cli.console import out

    spec = result.evidence.setting["runtime"]
    versions = ", ".join(f"{name} {version}" for name, version in spec["versions"].items())
    out.print(f"{spec['name']} {spec['precision']} ({versions}) against the float64 reference")
    out.print(_inputs(result))
    out.print(_invariance(result))
    _print_gradients(result)
    if result.layers is not None:
        out.print(_layers(result.layers))
    for finding in _worst_failures(result.failures):
        out.print(f"[red]{finding.name}[/]: {'; '.join(finding.reasons)}", soft_wrap=True)
    if result.layers is not None:
        first = result.first_departure
        if first is None:
            out.print("No layer departs.")
        else:
            out.print(
                f"First layer to depart: [bold]{first.name}[/]: {'; '.join(first.reasons)}",
                soft_wrap=True,
            )
    policy = result.policy
    allowed = f"error up to {policy.max_relative:g} of the scale and {policy.max_units:g} units"
    if result.gradients is not None:
        allowed += f", gradients {policy.max_gradient:g} of the largest slope"
    colour = "red" if result.failures else "green"
    out.print(
        f"[bold {colour}]{result.verdict.value.upper()}[/]: {len(result.failures)} of "
        f"{len(result.checks)} checks fail ({allowed} allowed)",
        soft_wrap=True,
    )


def _print_gradients(result: ParityResult) -> None:
    """Print the table of gradients and what became of the images that it leaves out."""
    from ccn_deploy.cli.console import out
    from ccn_deploy.parity.judge import LEAST_NEAR

    if result.evidence.gradients is None or result.gradients is None:
        spec = result.evidence.setting["runtime"]
        out.print(
            f"No gradients to compare: for this bundle {spec['name']} has none of its own in "
            f"{spec['precision']}.\n",
            soft_wrap=True,
        )
        return
    out.print(_gradients(result.gradients))
    kinks = result.evidence.gradients.kinks
    said = f"{kinks.n} images are near a kink: rounding alone may change their gradient."
    if kinks.n >= LEAST_NEAR:
        said += f" Median error: {kinks.median:.1e} of what rounding makes there."
    out.print(f"{said}\n" if kinks.n else "No image is near a kink.\n", soft_wrap=True)


def _inputs(result: ParityResult) -> Table:
    flips = any(finding.row.deviation.argmax_flips for finding in result.inputs)
    columns = ["input", "batch", "n", *_ERRORS, "flips", *(["margin"] if flips else []), "NaN"]
    table = _table(*columns)
    for finding in result.inputs:
        deviation = finding.row.deviation
        margin = f"{deviation.flips[0].margin:.1e}" if deviation.flips else ""
        table.add_row(
            finding.subject,
            str(finding.document()["batch"]),
            str(deviation.n),
            *_errors(finding),
            str(deviation.argmax_flips),
            *([margin] if flips else []),
            str(deviation.nonfinite),
            _mark(finding),
        )
    return table


def _gradients(findings: Iterable[GradientFinding]) -> Table:
    table = _table(
        "gradients", "batch", "each", "near", "max error", "of slope", "of rounding", "1-cos", "NaN"
    )
    for finding in findings:
        document = finding.document()
        slopes = finding.row.slopes
        table.add_row(
            document["kind"],
            str(document["batch"]),
            str(document["candidates"]),
            str(slopes.near),
            f"{slopes.max_abs:.1e}",
            f"{slopes.relative:.1e}",
            f"{slopes.of_rounding:.2g}",
            f"{max(0.0, 1.0 - slopes.cosine):.1e}",
            str(slopes.nonfinite),
            _mark(finding),
        )
    return table


def _invariance(result: ParityResult) -> Table:
    table = _table(
        "the same images", "n", "max change", "p99", "of scale", "units", "flips", "bits"
    )
    for finding in result.invariance:
        document = finding.document()
        table.add_row(
            finding.subject,
            str(document["n"]),
            *_errors(finding),
            str(document["argmax_flips"]),
            str(document["differing"]),
            _mark(finding),
        )
    return table


def _layers(findings: Iterable[Finding]) -> Table:
    """Show for every layer the kind of input on which it is furthest off."""
    table = _table("layer", "worst input", *_ERRORS, "NaN")
    for finding in _worst_by_subject(findings):
        nonfinite = str(finding.row.deviation.nonfinite)
        kind = str(finding.document()["kind"])
        table.add_row(finding.subject, kind, *_errors(finding), nonfinite, _mark(finding))
    return table


def _worst_failures(
    failures: Iterable[AnyFinding],
) -> list[AnyFinding]:
    """Keep one failure of each kind of input or claim, and of the gradients of each kind."""
    from ccn_deploy.parity.judge import Finding

    found = list(failures)
    gradients = {f.subject: f for f in found if not isinstance(f, Finding)}  # the last has most
    return [*_worst_by_subject(f for f in found if isinstance(f, Finding)), *gradients.values()]


def _worst_by_subject(findings: Iterable[Finding]) -> list[Finding]:
    """Keep, of each kind of input, claim or layer, the finding with the largest error."""
    worst: dict[str, Finding] = {}
    for finding in findings:
        held = worst.get(finding.subject)
        if held is None or finding.row.deviation.units > held.row.deviation.units:
            worst[finding.subject] = finding
    return list(worst.values())


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right", no_wrap=True)
    table.add_column("")
    return table


def _errors(finding: Finding) -> tuple[str, str, str, str]:
    deviation = finding.row.deviation
    return (
        f"{deviation.max_abs:.1e}",
        f"{deviation.p99_abs:.1e}",
        f"{deviation.relative:.1e}",
        f"{deviation.units:.3g}" if deviation.units < 1000 else f"{deviation.units:.0e}",
    )


def _mark(finding: AnyFinding) -> str:
    return {"pass": "[green]pass[/]", "fail": "[bold red]fail[/]"}.get(
        finding.verdict.value, "[bold yellow]none[/]"
    )
