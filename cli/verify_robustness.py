"""`ccn-deploy verify-robustness`."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.attacks import ATTACKS, DEFAULT_ATTACKS, DEFAULT_EPSILONS, DEFAULT_L2_EPSILONS
from ccn_deploy.cli.options import (
    MAX_DROP,
    BundleArgument,
    DataDirOption,
    DatasetOption,
    JsonOption,
    MaxDropOption,
    RuntimeOption,
    SeedOption,
    ThreadsOption,
    takes_data_options,
    tell_notes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccn_deploy.data import DataOptions

SAMPLES = 500


def _strengths(epsilons: Sequence[float]) -> str:
    return ",".join(f"{epsilon:g}" for epsilon in epsilons)


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
            help=f"{', '.join(ATTACKS)}; give it again for more. audit and audit-l2 are the "
            "recommended sets: strong attacks, each on what the ones before it left.",
            show_default=", ".join(DEFAULT_ATTACKS),
        ),
    ] = None,
    epsilons: Annotated[
        str | None,
        typer.Option(
            "--epsilons",
            help="Strengths of attacks in Linf, pixels being 0 to 1.",
            show_default=_strengths(DEFAULT_EPSILONS),
        ),
    ] = None,
    epsilons_l2: Annotated[
        str | None,
        typer.Option(
            "--epsilons-l2",
            help="Strengths of attacks that are bounded in L2.",
            show_default=_strengths(DEFAULT_L2_EPSILONS),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Of PGD and APGD.", show_default="each attack's own"),
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(
            "--step-size",
            help="Of PGD, relative to epsilon; every step is then that long.",
            show_default="a decaying one",
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            "--restarts", min=1, help="Of PGD and APGD.", show_default="each attack's own"
        ),
    ] = None,
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
    max_drop: MaxDropOption = MAX_DROP,
    min_robust: Annotated[
        list[str] | None,
        typer.Option(
            "--min-robust",
            metavar="ATTACK@STRENGTH=SHARE",
            help="What must be left under an attack, such as apgd@0.1=55% or apgd@8/255=0.55; "
            "strength is epsilon, or d for attacks without one. Give it again for more.",
            show_default=False,
        ),
    ] = None,
    min_accuracy: Annotated[
        str | None,
        typer.Option(
            "--min-accuracy",
            metavar="SHARE",
            help="What accuracy must be without an attack.",
            show_default=False,
        ),
    ] = None,
    recheck: Annotated[
        str | None,
        typer.Option(
            "--recheck",
            metavar="all|N",
            help="Ask runtime and attack again about so many images of evidence that was read, "
            "chosen at random; 0 for none.",
            show_default="a tenth",
        ),
    ] = None,
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
    from ccn_deploy.attacks.source import source
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console, robustness_view
    from ccn_deploy.evaluation import evaluation_data
    from ccn_deploy.report import examples_of
    from ccn_deploy.report import write_report as report
    from ccn_deploy.robustness import RobustnessRequest, collect_all, compare, judge
    from ccn_deploy.robustness.options import AttackOptions, parse_recheck, rechecked
    from ccn_deploy.robustness.thresholds import parse_max_drop, thresholds_of
    from ccn_deploy.runtimes import RuntimeOptions

    allowed, again = parse_max_drop(max_drop), parse_recheck(recheck)
    thresholds = thresholds_of(min_robust or (), min_accuracy)
    asked = AttackOptions(
        attack or DEFAULT_ATTACKS, epsilons, epsilons_l2, steps, step_size, restarts
    )
    attacks = asked.suite(thresholds)
    for added in asked.added(thresholds):
        console.err.print(f"{added.label} is run too: --min-robust asks for it.", soft_wrap=True)
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
    with console.resumable("from the last whole batch"):
        with console.Bar() as bar:
            measurements = collect_all(opened, requests, bar)
        rechecks = [
            rechecked(opened, request, measurement, again)
            for request, measurement in zip(requests, measurements, strict=True)
        ]
    results = [
        judge(measurement, allowed, thresholds, epsilons=asked.linf, recheck=found)
        for measurement, found in zip(measurements, rechecks, strict=True)
    ]
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
