"""`ccn-deploy verify-parity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import (
    BundleArgument,
    DataDirOption,
    DatasetOption,
    JsonOption,
    PrecisionOption,
    RuntimeOption,
    SeedOption,
    ThreadsOption,
    takes_data_options,
    tell_notes,
)
from ccn_deploy.cli.text import line, plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ccn_deploy.bundle import Bundle
    from ccn_deploy.data import DataOptions
    from ccn_deploy.exporters.rederive import Rederived
    from ccn_deploy.parity import ParityResult
    from ccn_deploy.parity.judge import AnyFinding, Finding, GradientFinding
    from ccn_deploy.tables import Row, Table
    from ccn_deploy.verdict import Verdict

_ERRORS = ("max error", "p99", "of scale", "units")


@takes_data_options
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
    data: DataOptions,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again even if the bundle has the evidence.")
    ] = False,
    no_lineage: Annotated[
        bool,
        typer.Option(
            "--no-lineage",
            help="Do not derive the bundle's graphs again from what they were made of.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show that a runtime computes the function of its network: logits and slopes in float64.

    First every graph of the bundle is derived again from what it was made of, byte for byte.
    """
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console
    from ccn_deploy.evaluation import evaluation_data
    from ccn_deploy.parity import ParityRequest, collect, judge
    from ccn_deploy.verdict import Verdict

    opened = open_bundle(bundle)
    images = evaluation_data(opened, dataset, data_dir, data)
    tell_notes(images)
    request = ParityRequest(
        dataset=images,
        runtime=runtime,
        precision=precision,
        samples=samples,
        per_layer=per_layer,
        seed=seed,
        threads=threads,
    )
    lineage = None if no_lineage else _lineage(opened)
    with console.Bar() as bar:
        result = judge(collect(opened, request, progress=bar, fresh=fresh))
    verdict = Verdict.all_of(
        (result.verdict, *(file.verdict for file in lineage or () if file.verdict is not None))
    )
    if as_json:
        console.print_json(
            {
                **result.document(),
                "verdict": verdict.value,
                "evidence": "measured" if bar.started else "read",
                "lineage": None if lineage is None else [file.document() for file in lineage],
            }
        )
    else:
        _print_lineage(lineage)
        _print(result, verdict, measured=bar.started)
    raise typer.Exit(verdict.exit_code)


def _lineage(bundle: Bundle) -> tuple[Rederived, ...]:
    """Derive every graph again, before anything is measured.

    Raises:
        IntegrityError: One is not what its pass makes.
        MissingExtraError: A package that passes need is not installed.
    """
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require

    for module in ("torch", "safetensors", "onnx"):
        require(module, "train", "to derive the graphs again (--no-lineage leaves that out)")
    from ccn_deploy.exporters.rederive import rederive, refuse_differences

    with console.err.status("Deriving the graphs again") as status:
        found = rederive(bundle, lambda path: status.update(f"Deriving {plain(path)} again"))
    refuse_differences(found)
    return found


def _print_lineage(lineage: tuple[Rederived, ...] | None) -> None:
    """Print what was derived again, and why the rest was not."""
    from ccn_deploy.cli.tables import show
    from ccn_deploy.tables import Row, Table, texts

    if lineage is None:
        line("Lineage: no graph was derived again (--no-lineage).\n")
        return
    show(Table("Lineage", ("file", "derived again"), [
        Row(file.path, texts(file.status)) for file in lineage
    ]))  # fmt: skip
    for file in lineage:
        if file.status != "same":
            line(f"{plain(file.path)}: {plain(file.why)}.")
    line("")


def _print(result: ParityResult, verdict: Verdict, *, measured: bool) -> None:
    """Print the tables, what failed and why, and the verdict on the last line."""
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.tables import show, show_verdict

    spec = result.evidence.setting["runtime"]
    versions = ", ".join(f"{name} {version}" for name, version in spec["versions"].items())
    out.print(f"{spec['name']} {spec['precision']} ({versions}) against the float64 reference")
    line(
        "Measured just now; the evidence is kept."
        if measured
        else "Evidence of an earlier measurement was read; --fresh measures again."
    )
    show(_inputs(result))
    show(_invariance(result))
    sizes = result.evidence.setting["batch_sizes"]
    line(f"Batches of {', '.join(map(str, sizes))} were tried.\n")
    _print_gradients(result)
    if result.layers is not None:
        show(_layers(result.layers))
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
    doubt = "; the lineage is in doubt" if verdict is not result.verdict else ""
    show_verdict(
        verdict,
        f"{len(result.failures)} of {len(result.checks)} checks fail ({allowed} allowed){doubt}",
    )


def _print_gradients(result: ParityResult) -> None:
    """Print the table of gradients and what became of the images that it leaves out."""
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.tables import show
    from ccn_deploy.parity.judge import LEAST_NEAR

    if result.evidence.gradients is None or result.gradients is None:
        spec = result.evidence.setting["runtime"]
        out.print(
            f"No gradients to compare: for this bundle {spec['name']} has none of its own in "
            f"{spec['precision']}.\n",
            soft_wrap=True,
        )
        return
    show(_gradients(result.gradients))
    kinks = result.evidence.gradients.kinks
    said = f"{kinks.n} images are near a kink: rounding alone may change their gradient."
    if kinks.n >= LEAST_NEAR:
        said += f" Median error: {kinks.median:.1e} of what rounding makes there."
    out.print(f"{said}\n" if kinks.n else "No image is near a kink.\n", soft_wrap=True)


def _inputs(result: ParityResult) -> Table:
    flips = any(finding.row.deviation.argmax_flips for finding in result.inputs)
    columns = ("input", "batch", "n", *_ERRORS, "flips", *(["margin"] if flips else []), "NaN")
    rows = []
    for finding in result.inputs:
        deviation = finding.row.deviation
        margin = f"{deviation.flips[0].margin:.1e}" if deviation.flips else ""
        cells = [
            *(finding.document()["batch"], deviation.n, *_errors(finding), deviation.argmax_flips),
            *([margin] if flips else []),
            deviation.nonfinite,
        ]
        rows.append(_row(finding.subject, finding, *cells))
    return _table(columns, rows)


def _gradients(findings: Iterable[GradientFinding]) -> Table:
    columns = (
        *("gradients", "batch", "each", "near"),
        *("max error", "of slope", "of rounding", "1-cos", "NaN"),
    )
    rows = []
    for finding in findings:
        document = finding.document()
        slopes = finding.row.slopes
        cells = (
            *(document["batch"], document["candidates"], slopes.near),
            f"{slopes.max_abs:.1e}",
            f"{slopes.relative:.1e}",
            f"{slopes.of_rounding:.2g}",
            f"{max(0.0, 1.0 - slopes.cosine):.1e}",
            slopes.nonfinite,
        )
        rows.append(_row(document["kind"], finding, *cells))
    return _table(columns, rows)


def _invariance(result: ParityResult) -> Table:
    columns = ("the same images", "n", "max change", *_ERRORS[1:], "flips", "bits")
    rows = []
    for finding in result.invariance:
        document = finding.document()
        counts = (document["argmax_flips"], document["differing"])
        rows.append(_row(finding.subject, finding, document["n"], *_errors(finding), *counts))
    return _table(columns, rows)


def _layers(findings: Iterable[Finding]) -> Table:
    """Show for every layer the kind of input on which it is furthest off."""
    rows = []
    for finding in _worst_by_subject(findings):
        kind, nonfinite = finding.document()["kind"], finding.row.deviation.nonfinite
        rows.append(_row(finding.subject, finding, kind, *_errors(finding), nonfinite))
    return _table(("layer", "worst input", *_ERRORS, "NaN"), rows)


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


def _table(columns: tuple[str, ...], rows: list[Row]) -> Table:
    from ccn_deploy.tables import Table

    return Table("", columns, rows, judged="")


def _row(name: str, finding: AnyFinding, *cells: object) -> Row:
    from ccn_deploy.tables import Mark, Row, texts

    verdict = finding.verdict.value  # "inconclusive" would not fit into 80 columns
    return Row(
        name, texts(*cells), Mark({"pass": "pass", "fail": "fail"}.get(verdict, "none"), verdict)
    )


def _errors(finding: Finding) -> tuple[str, str, str, str]:
    deviation = finding.row.deviation
    return (
        f"{deviation.max_abs:.1e}",
        f"{deviation.p99_abs:.1e}",
        f"{deviation.relative:.1e}",
        f"{deviation.units:.3g}" if deviation.units < 1000 else f"{deviation.units:.0e}",
    )
