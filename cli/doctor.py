"""``ccn-deploy doctor``: what is installed, which runtimes work here, and how to mend the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import JsonOption
from ccn_deploy.cli.text import line, plain

if TYPE_CHECKING:
    from ccn_deploy.diagnosis import Diagnosis, Requirement
    from ccn_deploy.machine import Machine

_STATES = {"works": "green", "builds": "cyan", "absent": "yellow", "broken": "bold red"}


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="A bundle: which of its files run here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try every runtime on this machine and say how to mend those that do not work.

    Exits with 0 if at least one works (and runs the bundle, if one is given) and nothing that is
    installed is broken; else with 3.
    """
    from ccn_deploy import __version__
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console
    from ccn_deploy.diagnosis import diagnose

    opened = None if bundle is None else open_bundle(bundle)
    with console.err.status("Trying every runtime that is installed ..."):
        diagnosis = diagnose(opened)
    if as_json:
        console.print_json({**diagnosis.document(), "version": __version__})
    else:
        _print(diagnosis, __version__)
    raise typer.Exit(diagnosis.exit_code)


def _print(diagnosis: Diagnosis, version: str) -> None:
    machine = diagnosis.machine
    line(f"ccn-deploy {version}, Python {machine.python}, {machine.system} {machine.architecture}")
    _print_gpus(machine)
    line("\n[bold]Runtimes[/]")
    for trial in diagnosis.trials:
        did = plain(", ".join(trial.did))
        why = plain(trial.problem)
        state = f"[{_STATES[trial.state]}]{trial.state:<8}[/]"
        line(f"{state}{trial.runtime:<18}{'. '.join(filter(None, (did, why)))}")
        _print_fix(trial.fix, 26)
    line("\n[bold]Packages[/]")
    _print_packages(diagnosis.requirements)
    if diagnosis.uses is not None:
        line("\n[bold]Bundle[/]")
        for use in diagnosis.uses:
            state = "[green]runs    [/]" if not use.problem else "[yellow]not here[/]"
            name = str(use.fit.target)
            path = plain(use.fit.record.path)
            line(f"{state} {name:<24}{plain(use.problem) or path}")
            _print_fix(use.fix, 33)
    for problem in diagnosis.problems:
        line(f"\n[bold red]broken[/] {plain(problem.what)}")
        _print_fix(problem.fix, 7)
    line("\n" + _verdict(diagnosis))


def _print_gpus(machine: Machine) -> None:
    for gpu in machine.gpus:
        line(
            f"GPU {gpu.index}: {plain(gpu.name)}, compute capability {gpu.compute_capability}, "
            f"{gpu.memory / 2**30:.0f} GiB"
        )
    if machine.driver is not None:
        line(f"NVIDIA driver {machine.driver}")
    if not machine.gpus:
        line(f"No GPU: {plain(machine.no_gpu_reason)}")


def _print_packages(requirements: tuple[Requirement, ...]) -> None:
    """Print a line for each extra: its packages, and what is wrong with them."""
    for extra in dict.fromkeys(r.extra for r in requirements):
        group = [r for r in requirements if r.extra == extra]
        name = plain((f"[{extra}]" if extra else "always").ljust(10))
        words = []
        for r in group:
            have = r.installed or "not installed"
            words.append(
                f"{r.name} {have}" if r.met else f"[yellow]{r.name} {have}[/] (needs {r.needed})"
            )
        line(f"{name}{', '.join(words)}")


def _verdict(diagnosis: Diagnosis) -> str:
    works = [trial.runtime for trial in diagnosis.trials if trial.state == "works"]
    count = f"{len(works)} of {len(diagnosis.trials)} runtimes work here"
    broken = len(diagnosis.problems)
    bad = f"{broken} broken" if broken else "nothing is broken"
    runs = ""
    if diagnosis.uses is not None and all(use.problem for use in diagnosis.uses):
        runs = "; nothing in the bundle runs here"
    colour, word = ("green", "HEALTHY") if diagnosis.healthy else ("red", "UNFIT")
    return f"[bold {colour}]{word}[/]: {count}, {bad}{runs}"


def _print_fix(fix: str, indent: int) -> None:
    if fix:
        line(" " * indent + plain(fix))
