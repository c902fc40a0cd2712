"""`ccn-deploy train`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ccn_deploy.cli.options import (
    DataDirOption,
    JsonOption,
    SeedOption,
    takes_data_options,
    tell_notes,
)
from ccn_deploy.cli.text import plain

if TYPE_CHECKING:
    from ccn_deploy.data import DataOptions
    from ccn_deploy.runs import TrainedRun
    from ccn_deploy.trainers import Event

ADVERSARIAL = "Adversarial training"
"""Heading of its options in --help."""


class Device(str, Enum):
    """What ``--device`` takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@takes_data_options
def train(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the run; resumed if it is there.")
    ],
    defense: Annotated[
        str | None,
        typer.Option(
            "--defense", help="sm, ls, brelu, l2sm, ccn, ccn+ls, bn or lrn.", show_default="ccn"
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            metavar="NAME|DIR|FILE.npz",
            help="mnist5k, mnist, fashion-mnist, cifar10, imagenet, a directory of class folders "
            "or an .npz file.",
        ),
    ] = "mnist5k",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", help="quick, pgd-mnist, paper-mnist, paper-cifar10 or paper-imagenet."
        ),
    ] = "quick",
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture",
            help="mnist-cnn, mnist-cnn-2d, vgg11-cifar10 or vgg11-imagenet.",
            show_default="the one for the data set's images",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--network",
            metavar="FACTORY",
            help="A network of your own instead: package.module:factory or file.py:factory. "
            "Its code is run.",
        ),
    ] = None,
    compact: Annotated[
        str | None,
        typer.Option(
            "--compact",
            metavar="all|last|none|NAME,...",
            help="Which layers are compact, by name: conv1 to fc3, or those of your own network.",
            show_default="what the defense says",
        ),
    ] = None,
    label_smoothing: Annotated[
        float,
        typer.Option(
            "--label-smoothing", help="Share of the targets for the other classes; own networks."
        ),
    ] = 0.0,
    adversarial: Annotated[
        str | None,
        typer.Option(
            "--adversarial",
            metavar="KIND",
            help="Train against perturbations: fgsm, pgd or trades.",
            show_default="the recipe's, or none",
            rich_help_panel=ADVERSARIAL,
        ),
    ] = None,
    epsilon: Annotated[
        str | None,
        typer.Option(
            "--epsilon",
            metavar="NUMBER",
            help="Their largest size in Linf: 0.3 or 8/255.",
            show_default="the recipe's, or 0.3 for MNIST's shape and 8/255 for others",
            rich_help_panel=ADVERSARIAL,
        ),
    ] = None,
    attack_steps: Annotated[
        int | None,
        typer.Option(
            "--attack-steps",
            min=1,
            help="Gradients an image, of pgd and trades.",
            show_default="the recipe's, or 7 for pgd and 10 for trades",
            rich_help_panel=ADVERSARIAL,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            "--beta",
            help="Weight of the divergence in trades.",
            show_default="the recipe's, or 6",
            rich_help_panel=ADVERSARIAL,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Passes over the data.", show_default="the recipe's"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Images per step, all devices together.",
            show_default="the recipe's",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Before the schedule's drops.", show_default="the recipe's"
        ),
    ] = None,
    seed: SeedOption = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="CPU threads of each process.", show_default="torch's choice"
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option("--device", help="auto: cuda if there is a GPU, else cpu.")
    ] = Device.auto,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="GPUs, or processes on the CPU.")
    ] = 1,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=0,
            help="Processes that read and decode images, for each device; 0: threads.",
        ),
    ] = 0,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at an image that cannot be read, instead of leaving it out."
        ),
    ] = False,
    data_dir: DataDirOption = None,
    data: DataOptions,
    download: Annotated[
        bool, typer.Option("--download", help="Download the data set if it is not there.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the run that is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a network into a run directory; an interrupted run goes on with the same command."""
    from ccn_deploy.defenses import defense_named
    from ccn_deploy.extras import require

    if defense is not None:
        defense_named(defense)  # before the seconds that importing torch takes
    for module in ("torch", "lightning_fabric", "safetensors"):
        require(module, "train", "to train a network")
    from ccn_deploy.architectures import architecture_named
    from ccn_deploy.cli.console import print_json, resumable
    from ccn_deploy.data import ModelInput, load_dataset
    from ccn_deploy.trainers import TrainConfig
    from ccn_deploy.trainers import train as train_run

    takes = ModelInput(architecture_named(architecture).input_shape) if architecture else None
    train_data = load_dataset(
        dataset, "train", data_dir, download=download, options=data, like=takes
    )
    takes = ModelInput(train_data.input_shape, train_data.class_names)
    test_data = load_dataset(dataset, "test", data_dir, download=download, options=data, like=takes)
    tell_notes(train_data, test_data)
    config = TrainConfig(
        defense=defense,
        dataset=train_data.name,
        recipe=recipe,
        architecture=architecture,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
        device=device.value,
        devices=devices,
        network=network,
        compact=compact if compact in (None, "all", "last", "none") else tuple(compact.split(",")),
        label_smoothing=label_smoothing,
        adversarial=adversarial,
        epsilon=_epsilon(epsilon),
        attack_steps=attack_steps,
        beta=beta,
        workers=workers,
        strict=strict,
    )
    display = Display(network.rpartition(":")[2] if network else defense or "ccn")
    with resumable("from the last whole epoch"), display:
        run = train_run(config, train_data, test_data, output, watcher=display, overwrite=overwrite)
    if as_json:
        print_json(_document(run, already_finished=not display.started))
    else:
        _print(run, already_finished=not display.started)


def _epsilon(text: str | None) -> float | None:
    from ccn_deploy.attacks.spec import number
    from ccn_deploy.errors import UsageError

    if text is None:
        return None
    value = number(text.strip())
    if value is None:
        raise UsageError(f"--epsilon: {text!r} is not a number.", "Give one such as 0.3 or 8/255.")
    return value


class Display:
    """A progress bar on stderr that is fed the events of a training; a line per epoch stays."""

    def __init__(self, title: str) -> None:
        from ccn_deploy.cli.console import Bar

        self.title = title
        self.started = False
        self.skipped: set[str] = set()
        self._bar = Bar()
        self._steps = 0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        from ccn_deploy.trainers import Skipped, Started, Stepped

        if isinstance(event, Started):
            self.started = True
            self._steps = event.steps
            self._bar(self.title, event.step, event.steps)
            if event.step:
                self._bar.say(f"{self.title}: resumed after step {event.step}")
        elif isinstance(event, Stepped):
            what = f"{self.title}  epoch {event.epoch}  loss {event.loss:.3f}  "
            self._bar(f"{what}accuracy {event.accuracy:.1%}", event.step, self._steps)
        elif isinstance(event, Skipped):
            if event.what not in self.skipped:  # it comes again in every epoch
                self.skipped.add(event.what)
                self._bar.say(plain(f"left out: {event.what}"))
        else:
            held = event.crafted_accuracy
            crafted = "" if held is None else f"crafted {held:.2%}  "
            self._bar.say(
                f"{self.title}  epoch {event.epoch}  loss {event.loss:.3f}  "
                f"train {event.train_accuracy:.2%}  {crafted}test {event.test_accuracy:.2%}  "
                f"rate {event.learning_rate:.3g}  {event.seconds:.0f} s"
            )


def _print(run: TrainedRun, *, already_finished: bool) -> None:
    from ccn_deploy.cli.console import out

    if already_finished:
        out.print("This run is finished already; --overwrite trains it anew.", soft_wrap=True)
    training = run.card.training
    if run.network:
        compact = ", ".join(run.compact) or "no layer"
        out.print(f"Made compact: {compact}.", markup=False, soft_wrap=True)
    what = run.network or f"{run.card.system}, {run.card.architecture}"
    skipped = {split: training.get(f"skipped_{split}", 0) for split in ("train", "test")}
    if any(skipped.values()):
        out.print(
            f"Left out, since their files cannot be read: {skipped['train']:,} training images, "
            f"{skipped['test']:,} test images.",
            soft_wrap=True,
        )
    out.print(
        f"Clean accuracy {training['test_accuracy']:.2%} on "
        f"{training['test_images'] - skipped['test']:,} test "
        f"images of {training['dataset']}; {what}, "
        f"seed {training['seed']}, {training['device']}.",
        soft_wrap=True,
    )
    if adversary := training["recipe"].get("adversary"):  # older runs lack it
        out.print(_told(adversary), soft_wrap=True)
    out.print(f"Run in {run.path}", markup=False, soft_wrap=True)
    bundle = Path("bundles") / run.path.name
    out.print(
        f"Next: ccn-deploy export {shlex.quote(str(run.path))} --output {shlex.quote(str(bundle))}",
        markup=False,
        soft_wrap=True,
    )


def _told(adversary: Mapping[str, Any]) -> str:
    """Say against what the network was trained."""
    kind, epsilon, steps = (adversary[key] for key in ("kind", "epsilon", "steps"))
    each = f", {steps} steps of {adversary['rel_step'] * epsilon:.3g}" if kind != "fgsm" else ""
    beta = f", beta {adversary['beta']:g}" if adversary["beta"] is not None else ""
    return f"Adversarial training: {kind}, epsilon {epsilon:.4g}{each}{beta}."


def _document(run: TrainedRun, *, already_finished: bool) -> dict[str, Any]:
    from ccn_deploy.storage import sha256

    return {
        "schema": "ccn-deploy/train/1",
        "run": str(run.path),
        "architecture": run.card.architecture,
        "defense": run.card.defense,
        "network": run.network,
        "compact": list(run.compact),
        "already_finished": already_finished,
        "weights_sha256": sha256(run.weights),
        "skipped_train": 0,
        "skipped_test": 0,
        **run.card.training,
    }
