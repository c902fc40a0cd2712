"""`ccn-deploy verify-robustness`."""

from __future__ import annotations

import shlex
import sys
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
    ResizeOption,
    RuntimeOption,
    SeedOption,
    ThreadsOption,
    data_options,
    tell_notes,
)

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

    from ccn_deploy.bundle import Bundle
    from ccn_deploy.robustness import Measurement, RobustnessRequest

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

SAMPLES = 500


def verify_robustness(
    bundle: BundleArgument,
    *,
    runtime: RuntimeOption = "onnxruntime-cpu",
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="Precision of the deployed graph: fp32, fp16, bf16, int8, fp8; give it again to "
            "see what each costs.",
            show_default="fp32",
        ),
    ] = None,
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
            help="Gradients of the attacks: native (the runtime's own), reference (of PyTorch) or "
            "transfer (crafted on PyTorch wholly).",
            show_default="native where the bundle has the graph, else reference",
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
    resize: ResizeOption = None,
    crop: CropOption = None,
    interpolation: InterpolationOption = None,
    layout: LayoutOption = None,
    npz_images: NpzImagesOption = None,
    npz_labels: NpzLabelsOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    write_report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write BUNDLE/report.html.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Attack what is deployed, image by image, and compare it with the PyTorch reference."""
    from ccn_deploy.attacks import DEFAULT_ATTACKS, parse_epsilons, suite
    from ccn_deploy.attacks.source import source
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console, robustness_view
    from ccn_deploy.evaluation import evaluation_data
    from ccn_deploy.report import examples_of
    from ccn_deploy.report import write_report as report
    from ccn_deploy.robustness import RobustnessRequest, check, compare, judge
    from ccn_deploy.runtimes import RuntimeOptions

    attacks = suite(attack or DEFAULT_ATTACKS, parse_epsilons(epsilons))
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
    requests = [
        RobustnessRequest(
            dataset=images,
            runtime=runtime,
            precision=name,
            attacks=attacks,
            gradient=source(gradient) if gradient else None,
            samples=samples,
            seed=seed,
            options=RuntimeOptions(threads=threads),
        )
        for name in dict.fromkeys(precision or ["fp32"])
    ]
    for request in requests:  # all of them, before the first takes minutes
        check(opened, request)
    try:
        results = [judge(measure(opened, request), max_drop) for request in requests]
    except KeyboardInterrupt:
        console.err.print("Interrupted. The same command goes on from the last whole batch.")
        raise typer.Exit(INTERRUPTED) from None
    result = compare(results) if len(results) > 1 else results[0]
    path = None
    if write_report:
        command = shlex.join(["ccn-deploy", *sys.argv[1:]])
        path = report(opened, result, examples_of(results[0].measurement, images), command)
    if as_json:
        console.print_json(result.document())
    else:
        robustness_view.show(result, path)
    raise typer.Exit(result.verdict.exit_code)


def measure(bundle: Bundle, request: RobustnessRequest) -> Measurement:
    """Collect evidence with a bar on stderr; see :func:`ccn_deploy.robustness.collect`."""
    from ccn_deploy.robustness import collect

    with Display() as display:
        return collect(bundle, request, display)


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
