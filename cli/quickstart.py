"""`ccn-deploy quickstart`: the main job, end to end, on real digits."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import JsonOption, SeedOption

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from rich.table import Table

    from ccn_deploy.attacks import AttackSpec
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.parity import ParityResult
    from ccn_deploy.robustness import Measurement, RobustnessResult
    from ccn_deploy.runs import TrainedRun

    Tell = Callable[["Note | Step"], None]

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
    seed: SeedOption = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads for each of the two networks.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Train a plain and a compact network, lower both, prove parity, attack what was lowered."""
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require
    from ccn_deploy.verdict import Verdict

    for module in ("torch", "lightning_fabric", "safetensors", "onnx", "foolbox", "matplotlib"):
        require(module, "train", "for the quickstart")
    require("onnxruntime", "cpu", "for the quickstart")

    pipelines = [Pipeline(defense, output, epochs, samples, seed, threads) for defense in DEFENSES]
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
class Note:
    """Something done, worth a line that stays."""

    defense: str
    text: str


@dataclass(frozen=True)
class Step:
    """How far one step of a network's pipeline is, from 0 to 1."""

    defense: str
    what: str
    done: float


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
        attack = ["verify-robustness", self.bundle, "--samples", self.samples, *settings]
        steps: list[list[object]] = [
            [*train, "--output", self.run],
            ["export", self.run, "--output", self.bundle],
            ["verify-parity", self.bundle, *settings],
            [*attack],
        ]
        return [shlex.join(["ccn-deploy", *map(str, step)]) for step in steps]

    def prepare(self, tell: Tell) -> None:
        """Train, export and verify parity."""
        run = self._train(tell)
        self._verify_parity(self._export(run, tell), tell)

    def attack(self, spec: AttackSpec, tell: Tell) -> None:
        """Run one attack on the bundle and on the reference."""
        from ccn_deploy.bundle import open_bundle

        self._measure(open_bundle(self.bundle), (spec,), tell)

    def finish(self) -> Outcome:
        """Read back what was measured, judge it, and write the report."""
        from ccn_deploy.data import load_dataset
        from ccn_deploy.report import examples_of, write_report
        from ccn_deploy.robustness import judge

        run = self._train(_silent)
        bundle = self._export(run, _silent)
        parity = self._verify_parity(bundle, _silent)
        measurement = self._measure(bundle, attacks(), _silent)
        robustness = judge(measurement)
        examples = examples_of(measurement, load_dataset(DATASET, "test"))
        report = write_report(bundle, robustness, examples, self.commands()[-1], parity.document())
        return Outcome(run, bundle, parity, robustness, report)

    def _train(self, tell: Tell) -> TrainedRun:
        from ccn_deploy.data import load_dataset
        from ccn_deploy.trainers import EpochEnded, Event, Started, TrainConfig, train

        def watch(event: Event) -> None:
            if isinstance(event, EpochEnded):
                text = f"epoch {event.epoch}  loss {event.loss:.3f}  test {event.test_accuracy:.1%}"
                tell(Note(self.defense, text))
            elif isinstance(event, Started):
                steps.append(event.steps)
            else:
                tell(Step(self.defense, "train", event.step / steps[0]))

        steps: list[int] = []

        config = TrainConfig(
            self.defense, DATASET, epochs=self.epochs, seed=self.seed, threads=self.threads
        )
        train_data, test_data = load_dataset(DATASET, "train"), load_dataset(DATASET, "test")
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
        digest = bundle.manifest.digest[:16]
        tell(Note(self.defense, f"exported: {len(bundle.manifest.files)} files, digest {digest}"))
        return bundle

    def _verify_parity(self, bundle: Bundle, tell: Tell) -> ParityResult:
        from ccn_deploy.data import load_dataset
        from ccn_deploy.parity import ParityRequest, collect, judge

        def progress(what: str, done: int, total: int) -> None:
            tell(Step(self.defense, "parity", done / total))

        data = load_dataset(DATASET, "test")
        request = ParityRequest(data, runtime=RUNTIME, seed=self.seed, threads=self.threads)
        result = judge(collect(bundle, request, progress=progress))
        worst = max(finding.row.deviation.relative for finding in result.inputs)
        text = f"parity {result.verdict.value}: off float64 by at most {worst:.0e} of the scale"
        tell(Note(self.defense, text))
        return result

    def _measure(self, bundle: Bundle, specs: tuple[AttackSpec, ...], tell: Tell) -> Measurement:
        from ccn_deploy.data import load_dataset
        from ccn_deploy.robustness import RobustnessRequest, collect
        from ccn_deploy.runtimes import RuntimeOptions

        def progress(what: str, done: float, total: float) -> None:
            tell(Step(self.defense, specs[0].label, done / total))

        request = RobustnessRequest(
            load_dataset(DATASET, "test"),
            runtime=RUNTIME,
            attacks=specs,
            samples=self.samples,
            seed=self.seed,
            options=RuntimeOptions(threads=self.threads),
        )
        return collect(bundle, request, progress)


def attacks() -> tuple[AttackSpec, ...]:
    """Return the default suite inside the box: all that the closing table shows."""
    from ccn_deploy.attacks import suite

    return tuple(spec for spec in suite() if spec.clip)


def _silent(event: Note | Step) -> None:
    pass


def _go_together(pipelines: list[Pipeline]) -> None:
    """Take all pipelines at once in a few processes, showing how far they are.

    Two processes of one thread finish sooner than one process of two: the layers are too small
    to be worth sharing, and threads that wait for one another burn the time they save. Each
    attack is a piece of work of its own, the longest first, so that no process is left waiting.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from threading import Thread

    specs = attacks()
    context = multiprocessing.get_context("spawn")
    news: Any = context.SimpleQueue()
    shower = Thread(target=_show, args=(news, pipelines, len(specs) + 2))
    workers = min(len(pipelines), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, _listen, (news,)) as pool:
        shower.start()
        try:
            _all([pool.submit(_prepare, pipeline) for pipeline in pipelines])
            work: list[Future[None]] = []
            for spec in sorted(specs, key=lambda spec: spec.name, reverse=True):
                work += [pool.submit(_attack, pipeline, spec) for pipeline in reversed(pipelines)]
            _all(work)
        finally:
            pool.shutdown(cancel_futures=True)
            news.put(None)
            shower.join()


def _all(work: list[Future[None]]) -> None:
    for future in work:
        future.result()


def _show(news: Any, pipelines: list[Pipeline], steps: int) -> None:
    """Show events until None comes: a line for each note, a bar for each network."""
    from ccn_deploy.cli.console import progress

    parts: dict[tuple[str, str], float] = {}
    with progress() as bar:
        tasks = {
            pipeline.defense: bar.add_task(pipeline.defense, total=100) for pipeline in pipelines
        }
        while (event := news.get()) is not None:
            if isinstance(event, Note):
                bar.console.print(f"{event.defense}: {event.text}", soft_wrap=True)
                continue
            parts[event.defense, event.what] = event.done
            done = sum(part for (defense, _), part in parts.items() if defense == event.defense)
            what = f"{event.defense}: {event.what}"
            bar.update(tasks[event.defense], description=what, completed=int(100 * done / steps))


_news: Any = None
"""In a worker: the queue that its events go to."""


def _listen(news: Any) -> None:
    global _news  # noqa: PLW0603
    _news = news


def _prepare(pipeline: Pipeline) -> None:
    pipeline.prepare(_news.put)


def _attack(pipeline: Pipeline, spec: AttackSpec) -> None:
    pipeline.attack(spec, _news.put)


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
        show_edge=False,
        title=f"Accuracy (%) on {n} test images",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("attack")
    for outcome in outcomes:
        table.add_column(f"{outcome.title}\nPyTorch", justify="right")
        table.add_column(f"{outcome.title}\nONNX Runtime", justify="right")
    results = [outcome.robustness for outcome in outcomes]

    clean = [s for r in results for s in (r.clean.reference, r.clean.runtime)]
    table.add_row("none", *(_percent(share.value) for share in clean))
    for at, bounded in enumerate(results[0].bounded):
        sides = [s for r in results for s in (r.bounded[at].reference, r.bounded[at].runtime)]
        name = f"{bounded.title} {bounded.epsilon:g}"
        table.add_row(name, *(_percent(share.value) for share in sides))
    for at, minimal in enumerate(results[0].minimal):
        both = [s for r in results for s in (r.minimal[at].reference, r.minimal[at].runtime)]
        for d in both[0].accuracy_at:
            table.add_row(
                f"{minimal.title} {d:g}", *(_percent(s.accuracy_at[d].value) for s in both)
            )
        table.add_row(f"{minimal.title} mean rho", *(_number(side.rho_adv) for side in both))
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
