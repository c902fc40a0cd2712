"""`ccn-deploy verify-robustness`."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import (
    BundleArgument,
    DataDirOption,
    DatasetOption,
    JsonOption,
    RuntimeOption,
    SeedOption,
    ThreadsOption,
    takes_data_options,
    tell_notes,
)

if TYPE_CHECKING:
    from ccn_deploy.data import DataOptions

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

SAMPLES = 500


@takes_data_options
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
    data: DataOptions,
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
    from ccn_deploy.robustness import RobustnessRequest, collect_all, compare, judge
    from ccn_deploy.runtimes import RuntimeOptions

    attacks = suite(attack or DEFAULT_ATTACKS, parse_epsilons(epsilons))
    opened = open_bundle(bundle)
    images = evaluation_data(opened, dataset, data_dir, data)
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
    try:
        with console.Bar() as bar:
            measurements = collect_all(opened, requests, bar)
    except KeyboardInterrupt:
        console.err.print("Interrupted. The same command goes on from the last whole batch.")
        raise typer.Exit(INTERRUPTED) from None
    results = [judge(measurement, max_drop) for measurement in measurements]
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
