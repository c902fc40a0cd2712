"""`ccn-deploy quickstart`: the main job, end to end, on real digits."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import JsonOption, SeedOption, ThreadsOption

if TYPE_CHECKING:
    from rich.table import Table

    from ccn_deploy.bundle import Bundle
    from ccn_deploy.parity.judge import ParityResult
    from ccn_deploy.robustness import RobustnessResult
    from ccn_deploy.runs import TrainedRun

SCHEMA = "ccn-deploy/quickstart/1"
DATASET = "mnist5k"
DEFENSES = ("sm", "ccn")
RUNTIME = "onnxruntime-cpu"


@dataclass(frozen=True)
class Outcome:
    """What the quickstart found for one defense."""

    title: str
    run: TrainedRun
    bundle: Bundle
    parity: ParityResult
    robustness: RobustnessResult
    report: Path


def quickstart(
    *,
    output: Annotated[
        Path, typer.Option("--output", help="Directory for runs and bundles.")
    ] = Path("quickstart"),
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Of training.", show_default="the recipe's"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Test images to attack.")] = 300,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a plain and a compact network, lower both, prove parity, attack what was lowered."""
    from ccn_deploy.cli import console
    from ccn_deploy.defenses import DEFENSES as KNOWN
    from ccn_deploy.extras import require
    from ccn_deploy.verdict import Verdict

    for module in ("torch", "lightning_fabric", "safetensors", "onnx", "foolbox", "matplotlib"):
        require(module, "train", "for the quickstart")
    require("onnxruntime", "cpu", "for the quickstart")

    outcomes = [
        _one(name, KNOWN[name].title, output, epochs, samples, seed, threads) for name in DEFENSES
    ]
    if as_json:
        console.print_json(_document(outcomes))
    else:
        _print(outcomes)
    held = all(
        o.parity.verdict is Verdict.PASS and o.robustness.verdict is not Verdict.FAIL
        for o in outcomes
    )
    # A demonstration on few images may be inconclusive; it must not have failed.
    raise typer.Exit((Verdict.PASS if held else Verdict.FAIL).exit_code)


def _one(  # noqa: PLR0917
    defense: str,
    title: str,
    output: Path,
    epochs: int | None,
    samples: int,
    seed: int,
    threads: int | None,
) -> Outcome:
    """Take one network down the whole road, saying each step as the command that does it alone."""
    from ccn_deploy.cli import verify_parity, verify_robustness
    from ccn_deploy.cli.console import err
    from ccn_deploy.cli.train import Display
    from ccn_deploy.data import load_dataset
    from ccn_deploy.parity import judge as judge_parity
    from ccn_deploy.robustness import judge as judge_robustness
    from ccn_deploy.trainers import TrainConfig, train

    run_path, bundle_path = output / "runs" / defense, output / "bundles" / defense
    given = [*(["--seed", seed] if seed else []), *(["--threads", threads] if threads else [])]
    train_data, test_data = load_dataset(DATASET, "train"), load_dataset(DATASET, "test")

    _say("train", "--defense", defense, "--dataset", DATASET, "--output", run_path,
         *(["--epochs", epochs] if epochs else []), *given)  # fmt: skip
    config = TrainConfig(
        defense=defense, dataset=DATASET, epochs=epochs, seed=seed, threads=threads
    )
    with Display(defense) as display:
        run = train(config, train_data, test_data, run_path, watcher=display)
    err.print(f"  {run.training['test_accuracy']:.1%} of {len(test_data):,} test images right")

    _say("export", run_path, "--output", bundle_path)
    bundle = _export(run, bundle_path)
    err.print(f"  {len(bundle.manifest.files)} files, digest {bundle.manifest.digest[:16]}")

    _say("verify-parity", bundle_path, *given)
    parity = judge_parity(
        verify_parity.measure(
            bundle, dataset=test_data, runtime=RUNTIME, seed=seed, threads=threads
        )
    )
    worst = max(finding.row.deviation.relative for finding in parity.inputs)
    err.print(
        f"  {parity.verdict.value}: off float64 by at most {worst:.0e} of the largest logit, on "
        f"{len(parity.inputs)} kinds and sizes of input"
    )

    command = _say("verify-robustness", bundle_path, "--samples", samples, *given)
    measurement = verify_robustness.measure(
        bundle, dataset=test_data, runtime=RUNTIME, samples=samples, seed=seed, threads=threads
    )
    robustness = judge_robustness(measurement)
    report = verify_robustness.report(bundle, robustness, command, parity)
    err.print(f"  {robustness.verdict.value}; {report}")
    return Outcome(title, run, bundle, parity, robustness, report)


def _export(run: TrainedRun, path: Path) -> Bundle:
    """Export a run, or open what an earlier quickstart made of the very same weights."""
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.exporters import export_run
    from ccn_deploy.storage import sha256

    if path.exists():
        bundle = open_bundle(path)
        if bundle.file("weights").sha256 == sha256(run.weights):
            return bundle
    return export_run(run, path, overwrite=True)


def _say(*words: object) -> str:
    """Print a command as a user would type it, and return it."""
    from ccn_deploy.cli.console import err

    command = shlex.join(["ccn-deploy", *map(str, words)])
    err.print(f"[bold]$ {command}[/]", soft_wrap=True)
    return command


def _print(outcomes: list[Outcome]) -> None:
    from ccn_deploy.cli.console import out

    out.print()
    out.print(_table(outcomes))
    for outcome in outcomes:
        for warning in outcome.robustness.warnings:
            out.print(f"{outcome.title}: {warning}", soft_wrap=True)
    for outcome in outcomes:
        parity, robustness = outcome.parity, outcome.robustness
        out.print(
            f"{outcome.title}: parity {parity.verdict.value}, robustness "
            f"{robustness.verdict.value}; {outcome.report}",
            soft_wrap=True,
        )


def _table(outcomes: list[Outcome]) -> Table:
    """Lay the networks side by side: accuracy under attack, in PyTorch and as deployed."""
    from rich import box
    from rich.table import Table

    n = outcomes[0].robustness.measurement.n
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"Accuracy (%) on {n} test images",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("attack")
    for outcome in outcomes:
        table.add_column(f"{outcome.title}\nPyTorch", justify="right")
        table.add_column(f"{outcome.title}\nONNX Runtime", justify="right")
    results = [outcome.robustness for outcome in outcomes]

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    row("none", [_percent(s.value) for r in results for s in (r.clean.reference, r.clean.runtime)])
    for at, bounded in enumerate(results[0].bounded):
        sides = [s for r in results for s in (r.bounded[at].reference, r.bounded[at].runtime)]
        row(f"{bounded.name.upper()} {bounded.epsilon:g}", [_percent(s.value) for s in sides])
    for at, _ in enumerate(results[0].minimal):
        both = [s for r in results for s in (r.minimal[at].reference, r.minimal[at].runtime)]
        for d in both[0].accuracy_at:
            row(f"DeepFool d={d:g}", [_percent(side.accuracy_at[d].value) for side in both])
        row("DeepFool mean rho", [_number(side.rho_adv) for side in both])
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _document(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "networks": [
            {
                "defense": outcome.bundle.manifest.defense,
                "bundle": str(outcome.bundle.path),
                "report": str(outcome.report),
                "test_accuracy": outcome.run.training["test_accuracy"],
                "parity": outcome.parity.document(),
                "robustness": outcome.robustness.document(),
            }
            for outcome in outcomes
        ],
    }
