"""`ccn-deploy verify-robustness`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
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
)

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID
    from rich.table import Table

    from ccn_deploy.attacks import AttackSpec
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.data import Dataset
    from ccn_deploy.parity.judge import ParityResult
    from ccn_deploy.robustness import Measurement, RobustnessResult
    from ccn_deploy.robustness.gate import Gate, Share
    from ccn_deploy.robustness.rows import BoundedRow, MinimalRow
    from ccn_deploy.verdict import Verdict

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

SAMPLES = 500
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def verify_robustness(
    bundle: BundleArgument,
    *,
    runtime: RuntimeOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            help="fgsm, pgd, deepfool, deepfool-fast or cw (slow); give it again for more.",
            show_default="the first three",
        ),
    ] = None,
    epsilons: Annotated[
        str,
        typer.Option("--epsilons", help="Strengths of FGSM and PGD, pixels being 0 to 1."),
    ] = "0.1,0.2,0.3,0.4",
    gradient: Annotated[
        str | None,
        typer.Option(
            "--gradient",
            help="Gradients of the attacks: native (the runtime's own), twin (of PyTorch) or "
            "transfer (crafted on PyTorch wholly).",
            show_default="native where the bundle has the graph, else twin",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images to attack.")] = SAMPLES,
    max_drop: Annotated[
        float,
        typer.Option(
            "--max-drop",
            min=0.0,
            max=1.0,
            help="By how much accuracy may be below the reference's, in every row.",
        ),
    ] = 0.01,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    write_report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write BUNDLE/report.html.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Attack what is deployed, image by image, and compare it with the PyTorch reference."""
    from ccn_deploy.attacks import DEFAULT_ATTACKS, parse_epsilons, suite
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console
    from ccn_deploy.evaluation import evaluation_data
    from ccn_deploy.robustness import judge

    attacks = suite(attack or DEFAULT_ATTACKS, parse_epsilons(epsilons))
    opened = open_bundle(bundle)
    images = evaluation_data(opened, dataset, data_dir)
    try:
        measurement = measure(
            opened,
            dataset=images,
            runtime=runtime,
            precision=precision,
            attacks=attacks,
            gradient=gradient,
            samples=samples,
            seed=seed,
            threads=threads,
        )
    except KeyboardInterrupt:
        console.err.print("Interrupted. The same command goes on from the last whole batch.")
        raise typer.Exit(INTERRUPTED) from None
    result = judge(measurement, max_drop)
    command = shlex.join(["ccn-deploy", *sys.argv[1:]])
    path = report(opened, result, command, dataset=images) if write_report else None
    if as_json:
        console.print_json(result.document())
    else:
        _print(result, path)
    raise typer.Exit(result.verdict.exit_code)


def measure(
    bundle: Bundle,
    *,
    dataset: Dataset,
    runtime: str = "onnxruntime-cpu",
    precision: str = "fp32",
    attacks: tuple[AttackSpec, ...] | None = None,
    gradient: str | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    threads: int | None = None,
) -> Measurement:
    """Collect evidence with a bar on stderr; see :func:`ccn_deploy.robustness.collect`."""
    from ccn_deploy.attacks import suite
    from ccn_deploy.attacks.source import source
    from ccn_deploy.robustness import RobustnessRequest, collect
    from ccn_deploy.runtimes import RuntimeOptions

    request = RobustnessRequest(
        dataset=dataset,
        runtime=runtime,
        precision=precision,
        attacks=attacks or suite(),
        gradient=source(gradient) if gradient else None,
        samples=samples,
        seed=seed,
        options=RuntimeOptions(threads=threads),
    )
    with Display() as display:
        return collect(bundle, request, display)


def report(
    bundle: Bundle,
    result: RobustnessResult,
    command: str,
    parity: ParityResult | None = None,
    *,
    dataset: Dataset,
) -> Path:
    """Write ``report.html`` into the bundle and return its path.

    Args:
        bundle: What was measured.
        result: Its judgement.
        command: What the user typed.
        parity: The judgement of parity, if there is one.
        dataset: What was attacked.
    """
    from ccn_deploy.report import examples_of, write_report

    examples = examples_of(result.measurement, dataset)
    return write_report(
        bundle, result, examples, command, parity.document() if parity is not None else None
    )


class Display:
    """A bar on stderr that starts when something is measured, with the time left of all of it."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from ccn_deploy.cli.console import err

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, what: str, done: float, total: float) -> None:
        """Show how far the measurement is."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, completed=done)  # type: ignore[arg-type]
        self._bar.update(self._task, description=what, completed=done)


def _print(result: RobustnessResult, report_path: Path | None) -> None:
    """Print the table, what to know about it, the gate, and the verdict on the last line."""
    from ccn_deploy.cli.console import out

    out.print(_table(result))
    out.print(f"Gradients on the runtime: {_gradients(result)}.", soft_wrap=True)
    for row in result.minimal:
        name = _titled(row)
        if row.clip:
            out.print(f"{name} d: moved by at most d times the norm of the image.")
        out.print(_rho(row, name if row.clip else f"{name} leaving [0, 1]"))
        if row.unclipped is not None:
            out.print(_rho(row.unclipped, f"{name} leaving [0, 1], not judged"))
    for warning in result.warnings:
        out.print(f"[yellow]note:[/] {warning}", soft_wrap=True)
    for reason, names in _doubts(result).items():
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        shown = names[:2] if more else names
        out.print(f"[yellow]{', '.join(shown)}{more}:[/] {reason}", soft_wrap=True)
    if report_path is not None:
        out.print(f"Report: {report_path}", markup=False, soft_wrap=True)
    colour = _COLOURS[result.verdict.value]
    out.print(
        f"[bold {colour}]{result.verdict.value.upper()}[/]: every row passes if its drop is shown, "
        f"at 95 %, to be at most {result.max_drop:g} (--max-drop), and fails if it is larger.",
        soft_wrap=True,
    )


def _doubts(result: RobustnessResult) -> dict[str, list[str]]:
    """Group the rows that did not pass by the reason."""
    found: dict[str, list[str]] = {}
    for name, gate in result.gates.items():
        if gate.reason:
            found.setdefault(gate.reason, []).append(name)
    return found


def _table(result: RobustnessResult) -> Table:
    from rich import box
    from rich.table import Table

    measurement = result.measurement
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=f"Accuracy (%) under attack on {measurement.n:,} images of "
        f"{measurement.dataset['name']}, with 95 % intervals",
        title_justify="left",
        title_style="bold",
    )
    target = f"{measurement.runtime}\n{measurement.precision}"
    for name in ("attack", "reference\nPyTorch", target, "drop\n(at most)", "differ", "verdict"):
        side = "left" if name in {"attack", "verdict"} else "right"
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in (result.clean, *result.bounded):
        name = "none" if row.norm is None else f"{_titled(row)} {row.epsilon:g}"
        table.add_row(name, _share(row.reference), _share(row.runtime), *_judged(row.gate))
    for minimal in result.minimal:
        if not minimal.clip:
            continue
        for d, gate in minimal.gates.items():
            table.add_row(
                f"{_titled(minimal)} {d:g}",
                _share(minimal.reference.accuracy_at[d]),
                _share(minimal.runtime.accuracy_at[d]),
                *_judged(gate),
            )
    return table


def _gradients(result: RobustnessResult) -> str:
    """Say where the gradients on the runtime came from, and how far to trust the choice."""
    from ccn_deploy.attacks.source import GRADIENTS, source

    name = source(result.measurement.gradient)
    said = f"{name}, {GRADIENTS[name]}"
    agreement = result.measurement.agreement
    if agreement is None:
        return said
    clean, attacked = agreement.clean, agreement.adversarial
    return (
        f"{said}; native and twin agree on {clean.n} clean images (cosine {clean.cosine_mean:.4f}, "
        f"least {clean.cosine_min:.4f}; signs {100 * clean.sign_mean:.1f} %) and on them attacked "
        f"({attacked.cosine_mean:.4f}, {attacked.cosine_min:.4f}; {100 * attacked.sign_mean:.1f} %)"
    )


def _rho(row: MinimalRow, title: str) -> str:
    """Say in one line how far the images had to be moved."""
    reference, runtime = row.reference, row.runtime
    return (
        f"{title}: mean rho_adv {_number(reference.rho_adv)} on the reference, "
        f"{_number(runtime.rho_adv)} on the runtime; nothing found for {reference.failed} and "
        f"{runtime.failed} of {row.n}"
    )


def _titled(row: BoundedRow | MinimalRow) -> str:
    from ccn_deploy.attacks import ATTACKS

    return ATTACKS[row.name].title


def _share(share: Share) -> str:
    low, high = share.ci95
    return f"{100 * share.value:.1f} \\[{100 * low:.0f}, {100 * high:.0f}]"


def _judged(gate: Gate) -> tuple[str, str, str]:
    return (
        f"{100 * gate.drop:.1f} ({100 * gate.upper95:.1f})",
        str(gate.lost + gate.gained),
        _coloured(gate.verdict),
    )


def _coloured(verdict: Verdict) -> str:
    return f"[{_COLOURS[verdict.value]}]{verdict.value}[/]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
