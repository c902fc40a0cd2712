"""`ccn-deploy quickstart`: the main job, end to end, on real digits."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import MAX_DROP, JsonOption, MaxDropOption, SeedOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from ccn_deploy.attacks import AttackSpec
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.data import Dataset, Split
    from ccn_deploy.parity import ParityResult
    from ccn_deploy.robustness import Measurement, RobustnessResult
    from ccn_deploy.runs import TrainedRun
    from ccn_deploy.tables import Table

    Tell = Callable[[str, float | None], None]
    """Told how far a step is, from 0 to 1; or without a number a note that stays."""

SCHEMA = "ccn-deploy/quickstart/1"
DATASET = "mnist5k"
DEFENSES = ("sm", "ccn")
RUNTIME = "onnxruntime-cpu"


def quickstart(
    *,
    output: Annotated[
        Path, typer.Option("--output", help="Directory for runs and bundles.")
    ] = Path("quickstart"),
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Of training.", show_default="the recipe's"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Test images to attack.")] = 500,
    max_drop: MaxDropOption = MAX_DROP,
    seed: SeedOption = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads for each of the two networks.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Train a plain and a compact network, export both, prove parity, attack what is deployed."""
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require
    from ccn_deploy.robustness.thresholds import parse_max_drop
    from ccn_deploy.verdict import Verdict

    allowed = parse_max_drop(max_drop)
    for module in ("torch", "lightning_fabric", "safetensors", "onnx", "foolbox", "matplotlib"):
        require(module, "train", "for the quickstart")
    require("onnxruntime", "cpu", "for the quickstart")

    pipelines = [
        Pipeline(defense, output, epochs, samples, allowed, seed, threads) for defense in DEFENSES
    ]
    console.err.print("Two networks side by side. For each of them, what these commands do:")
    for command in pipelines[-1].commands():
        console.err.print(f"[bold]$ {command}[/]", soft_wrap=True)
    _go_together(pipelines)

    outcomes = [pipeline.finish() for pipeline in pipelines]
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


@dataclass(frozen=True)
class Outcome:
    """What the quickstart found for one network."""

    run: TrainedRun
    bundle: Bundle
    parity: ParityResult
    robustness: RobustnessResult
    report: Path

    @property
    def title(self) -> str:
        """The paper's name of the defense."""
        from ccn_deploy.defenses import defense_named

        return defense_named(self.run.card.defense).title


@dataclass(frozen=True)
class Pipeline:
    """One network's way from training to attack; a step made before is not made again."""

    defense: str
    output: Path
    epochs: int | None
    samples: int
    max_drop: float
    seed: int
    threads: int

    @property
    def run(self) -> Path:
        """Where the trained network goes."""
        return self.output / "runs" / self.defense

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        return self.output / "bundles" / self.defense

    def commands(self) -> list[str]:
        """Return the steps as commands a user would type."""
        settings = [f"--threads={self.threads}", *([f"--seed={self.seed}"] if self.seed else [])]
        epochs = [f"--epochs={self.epochs}"] if self.epochs else []
        train = ["train", "--defense", self.defense, "--dataset", DATASET, *epochs, *settings]
        attack = ["verify-robustness", self.bundle, "--samples", self.samples,
                  f"--max-drop={100 * self.max_drop:g}%", *settings]  # fmt: skip
        steps: list[list[object]] = [
            [*train, "--output", self.run],
            ["export", self.run, "--output", self.bundle],
            ["verify-parity", self.bundle, *settings],
            [*attack],
        ]
        return [shlex.join(["ccn-deploy", *map(str, step)]) for step in steps]

    def prepare(self, tell: Tell) -> tuple[TrainedRun, Bundle, ParityResult]:
        """Train, export and verify parity."""
        run = self._train(tell)
        bundle = self._export(run, tell)
        return run, bundle, self._verify_parity(bundle, tell)

    def attack(self, specs: tuple[AttackSpec, ...], tell: Tell) -> Measurement:
        """Attack the bundle and the reference."""
        from ccn_deploy.bundle import open_bundle
        from ccn_deploy.robustness import RobustnessRequest, collect
        from ccn_deploy.runtimes import RuntimeOptions

        request = RobustnessRequest(
            _digits(),
            runtime=RUNTIME,
            attacks=specs,
            samples=self.samples,
            seed=self.seed,
            options=RuntimeOptions(threads=self.threads),
        )
        return collect(
            open_bundle(self.bundle),
            request,
            lambda what, done, total: tell(specs[0].label, done / total),
        )

    def finish(self) -> Outcome:
        """Read back what was measured, judge it, and write the report."""
        from ccn_deploy.report import examples_of, write_report
        from ccn_deploy.robustness import judge

        run, bundle, parity = self.prepare(lambda *_: None)
        measurement = self.attack(_attacks(), lambda *_: None)
        robustness = judge(measurement, self.max_drop)
        examples = examples_of(measurement, _digits())
        report = write_report(bundle, robustness, examples, self.commands()[-1], parity.document())
        return Outcome(run, bundle, parity, robustness, report)

    def _train(self, tell: Tell) -> TrainedRun:
        from ccn_deploy.trainers import EpochEnded, Event, Started, Stepped, TrainConfig, train

        def watch(event: Event) -> None:
            if isinstance(event, EpochEnded):
                tell(
                    f"epoch {event.epoch}  loss {event.loss:.3f}  test {event.test_accuracy:.1%}",
                    None,
                )
            elif isinstance(event, Started):
                steps.append(event.steps)
            elif isinstance(event, Stepped):
                tell("train", event.step / steps[0])

        steps: list[int] = []
        config = TrainConfig(
            self.defense, DATASET, epochs=self.epochs, seed=self.seed, threads=self.threads
        )
        train_data, test_data = _digits("train"), _digits()
        return train(config, train_data, test_data, self.run, watcher=watch)

    def _export(self, run: TrainedRun, tell: Tell) -> Bundle:
        """Export a run, or open what an earlier quickstart made of the very same weights."""
        from ccn_deploy.bundle import open_bundle
        from ccn_deploy.exporters import export_bundle
        from ccn_deploy.storage import sha256
        from ccn_deploy.targets import Role

        if self.bundle.exists():
            bundle = open_bundle(self.bundle)
            if bundle.file(Role.WEIGHTS).sha256 == sha256(run.weights):
                return bundle
        bundle = export_bundle(run, self.bundle, overwrite=True)
        files, digest = len(bundle.manifest.files), bundle.manifest.digest[:16]
        tell(f"exported: {files} files, digest {digest}", None)
        return bundle

    def _verify_parity(self, bundle: Bundle, tell: Tell) -> ParityResult:
        from ccn_deploy.parity import ParityRequest, collect, judge

        request = ParityRequest(_digits(), runtime=RUNTIME, seed=self.seed, threads=self.threads)
        evidence = collect(
            bundle, request, progress=lambda what, done, total: tell("parity", done / total)
        )
        result = judge(evidence)
        worst = max(finding.row.deviation.relative for finding in result.inputs)
        tell(
            f"parity {result.verdict.value}: off float64 by at most {worst:.0e} of the scale", None
        )
        return result


def _attacks() -> tuple[AttackSpec, ...]:
    """Return the default suite inside the box: all that the closing table shows."""
    from ccn_deploy.attacks import suite

    return tuple(spec for spec in suite() if spec.clip)


def _digits(split: Split = "test") -> Dataset:
    from ccn_deploy.data import load_dataset

    return load_dataset(DATASET, split)


def _go_together(pipelines: list[Pipeline]) -> None:
    """Take all pipelines at once in a few processes, showing how far they are.

    Two processes of one thread finish sooner than one process of two: the layers are too small
    to be worth sharing, and threads that wait for one another burn the time they save. Each
    attack is a piece of work of its own, the longest first, so that no process is left waiting.
    """
    from ccn_deploy.cli.console import progress
    from ccn_deploy.workers import Workers

    specs = sorted(_attacks(), key=lambda spec: spec.name, reverse=True)
    pairs = [(pipeline, spec) for spec in specs for pipeline in reversed(pipelines)]
    with progress() as bar, Workers(min(len(pipelines), os.cpu_count() or 1)) as workers:
        shown = {p.defense: _Shown(bar, p.defense, len(specs) + 2) for p in pipelines}
        workers.run(
            [partial(_prepare, pipeline) for pipeline in pipelines],
            lambda place, *said: shown[pipelines[place].defense](*said),
        )
        workers.run(
            [partial(_attack, *pair) for pair in pairs],
            lambda place, *said: shown[pairs[place][0].defense](*said),
        )


class _Shown:
    """One network's bar, and above it a line for each note."""

    def __init__(self, bar: Progress, defense: str, steps: int) -> None:
        self._bar, self._defense, self._steps = bar, defense, steps
        self._task = bar.add_task(defense, total=1)
        self._done: dict[str, float] = {}

    def __call__(self, what: str, done: float | None) -> None:
        text = f"{self._defense}: {what}"
        if done is None:
            self._bar.console.print(text, soft_wrap=True)
            return
        self._done[what] = done
        share = sum(self._done.values()) / self._steps
        self._bar.update(self._task, description=text, completed=share)


def _prepare(pipeline: Pipeline, tell: Tell) -> None:
    pipeline.prepare(tell)


def _attack(pipeline: Pipeline, spec: AttackSpec, tell: Tell) -> None:
    pipeline.attack((spec,), tell)


def _print(outcomes: list[Outcome]) -> None:
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.robustness_view import say
    from ccn_deploy.cli.tables import show, show_verdict

    out.print()
    show(_table([outcome.title for outcome in outcomes], [o.robustness for o in outcomes]))
    for outcome in outcomes:
        for finding in outcome.robustness.findings:
            say(finding, f"{outcome.title}: ")
    for outcome in outcomes:
        parity, robustness = outcome.parity, outcome.robustness
        out.print(
            f"{outcome.title}: parity {parity.verdict.value}; {outcome.report}", soft_wrap=True
        )
        show_verdict(robustness.verdict, robustness.shown)


def _table(titles: list[str], results: list[RobustnessResult]) -> Table:
    """Lay the networks side by side: accuracy under attack, in PyTorch and as deployed."""
    from ccn_deploy.tables import Row, Table, number, percent, texts

    rows = []
    for same in zip(*(result.rows for result in results), strict=True):
        shares = (share for row in same for share in (row.reference, row.runtime))
        rows.append(Row(same[0].label, texts(*(percent(share.value) for share in shares))))
    for minimal in zip(*(result.minimal for result in results), strict=True):
        sides = (side for row in minimal for side in (row.reference, row.runtime))
        cells = texts(*(number(side.rho_adv) for side in sides))
        rows.append(Row(f"{minimal[0].title} mean rho", cells))
    heads = [f"{title}\n{side}" for title in titles for side in ("PyTorch", "ONNX Runtime")]
    images = results[0].measurement.n
    return Table(f"Accuracy (%) on {images} test images", ("Attack", *heads), rows)


def _document(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "networks": [
            {
                "defense": outcome.run.card.defense,
                "bundle": str(outcome.bundle.path),
                "report": str(outcome.report),
                "test_accuracy": outcome.run.card.training["test_accuracy"],
                "parity": outcome.parity.document(),
                "robustness": outcome.robustness.document(),
            }
            for outcome in outcomes
        ],
    }
