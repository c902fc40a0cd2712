"""What is installed, which runtimes work here, which do not, and how to mend that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import CcnDeployError, EngineUnfitError, ExitCode, MissingExtraError
from ccn_deploy.machine import Machine, release, this_machine
from ccn_deploy.runtimes.compatibility import (
    Candidate,
    candidates_for,
    no_gpu,
    onnxruntime_problem,
)
from ccn_deploy.smoke_test import Trial, try_runtime
from ccn_deploy.targets import RUNTIMES, Target

SCHEMA = "ccn-deploy/doctor/1"
TRIED = tuple(RUNTIMES)
"""Every runtime, in the order of the table."""

EXTRAS = ("", "cpu", "gpu", "rtx", "triton", "train")
"""Groups of requirements that users install; the first is the package itself."""


@dataclass(frozen=True)
class Requirement:
    """A package that this one needs.

    Attributes:
        extra: That brings it; empty for what is always needed.
        name: Of the distribution.
        needed: For example ``">=1.20"``.
        installed: Its version; None if it is not there.
    """

    extra: str
    name: str
    needed: str
    installed: str | None

    @property
    def met(self) -> bool:
        """Whether it is installed in a version that is good."""
        return self.installed is not None and satisfies(self.installed, self.needed)


@dataclass(frozen=True)
class Problem:
    """Something that is broken, and what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Use:
    """Whether one file of a bundle runs here; the fix is empty if it does."""

    fit: Candidate
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        machine: What it is.
        requirements: What this package needs, installed or not.
        trials: How every runtime fared.
        problems: What is broken. A runtime that is not installed, or has no device, is not.
        uses: Of the bundle that was asked about, every way to run it; None without one.
    """

    machine: Machine
    requirements: tuple[Requirement, ...]
    trials: tuple[Trial, ...]
    problems: tuple[Problem, ...]
    uses: tuple[Use, ...] | None = None

    @property
    def healthy(self) -> bool:
        """Whether a runtime works, the bundle (if any) runs in one, and nothing is broken."""
        works = any(trial.state == "works" for trial in self.trials)
        runs = self.uses is None or any(not use.problem for use in self.uses)
        return works and runs and not self.problems

    @property
    def exit_code(self) -> ExitCode:
        """What the command exits with."""
        return ExitCode.PASS if self.healthy else ExitCode.ENVIRONMENT

    def document(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        document = {
            "schema": SCHEMA,
            "healthy": self.healthy,
            "machine": self.machine.document(),
            "requirements": [{**asdict(r), "met": r.met} for r in self.requirements],
            "runtimes": [trial.document() for trial in self.trials],
            "problems": [asdict(problem) for problem in self.problems],
        }
        if self.uses is not None:
            document["bundle"] = [
                {
                    "runtime": use.fit.target.runtime,
                    "precision": use.fit.target.precision,
                    "path": use.fit.record.path,
                    "runs": not use.problem,
                    "problem": use.problem,
                    "fix": use.fix,
                }
                for use in self.uses
            ]
        return document


def diagnose(bundle: Bundle | None = None) -> Diagnosis:
    """Look at the machine and try every runtime that is installed, each in a process of its own.

    Args:
        bundle: One to ask about as well.
    """
    machine = this_machine()
    with ThreadPoolExecutor(max_workers=2) as pool:
        trials = tuple(pool.map(lambda runtime: _try(runtime, machine), TRIED))
    requirements = read_requirements(machine)
    return Diagnosis(
        machine=machine,
        requirements=requirements,
        trials=trials,
        problems=tuple(_problems(machine, requirements, trials)),
        uses=None if bundle is None else tuple(_uses(bundle, machine, trials)),
    )


def _try(runtime: str, machine: Machine) -> Trial:
    """Try a runtime unless it is known not to be here."""
    without = _absence(runtime, machine)
    if without is None:
        return try_runtime(runtime)
    absent = isinstance(without, MissingExtraError) or (
        isinstance(without, EngineUnfitError) and not machine.gpu_broken
    )
    return Trial(runtime, "absent" if absent else "broken", (), without.what, without.hint)


def _absence(runtime: str, machine: Machine) -> CcnDeployError | None:
    """Return why there is nothing to try. A library of engines is tried without a GPU, too."""
    kind = RUNTIMES[runtime]
    if kind.family == "onnxruntime":
        return onnxruntime_problem(Target(runtime), machine)
    if kind.distribution not in machine.packages:
        return MissingExtraError(
            f"The package {kind.distribution!r} is not installed.",
            f"Install it with: pip install 'ccn-deploy[{kind.extra}]'",
        )
    if kind.runs_engines or not kind.on_gpu:
        return None
    version = machine.packages["torch"]
    if version.endswith("+cpu"):
        return MissingExtraError(
            f"The installed torch {version} is built without CUDA.",
            "Install another build of it, as https://pytorch.org/get-started/locally says.",
        )
    return no_gpu(machine, 0, f"{runtime} cannot run", "gpu")


def read_requirements(machine: Machine) -> tuple[Requirement, ...]:
    """Return what the installed package asks for; nothing if its metadata is not there."""
    try:
        lines = importlib.metadata.requires("ccn-deploy") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    found = []
    for line in lines:
        package, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
        parts = re.match(r"\s*([A-Za-z0-9._-]+)\s*(\[[^\]]*\])?\s*\(?([^)]*)", package)
        group = extra.group(1) if extra else ""
        older = re.search(r"""python_version\s*<\s*["']([0-9.]+)""", marker)
        needless = older is not None and release(machine.python) >= release(older.group(1))
        if parts is None or group not in EXTRAS or needless:
            continue
        name = re.sub(r"[-_.]+", "-", parts.group(1)).lower()
        needed = ",".join(sorted(parts.group(3).replace(" ", "").split(","), reverse=True))
        found.append(Requirement(group, name, needed, machine.packages.get(name)))
    return tuple(sorted(found, key=lambda requirement: EXTRAS.index(requirement.extra)))


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


def satisfies(version: str, needed: str) -> bool:
    """Return whether a version is in a range such as ``">=1.26,<3"``, by its numbers alone."""
    for part in filter(None, needed.split(",")):
        sign = re.match(r"[<>=!]=?", part)
        if sign is None or sign.group() not in _COMPARE:
            continue  # a kind of bound that this package does not use
        if not _COMPARE[sign.group()](release(version), release(part[sign.end() :])):
            return False
    return True


def _problems(
    machine: Machine, requirements: Sequence[Requirement], trials: Iterable[Trial]
) -> Iterable[Problem]:
    python = _needed_python()
    if not satisfies(machine.python, python):
        yield Problem(
            f"Python {machine.python} is not supported; it must be {python}.",
            "Make an environment with another Python.",
        )
    for extra in EXTRAS:
        group = [r for r in requirements if r.extra == extra]
        if extra and any(r.installed is None for r in group):
            continue  # an extra that is not in use; some of its packages are here for other reasons
        yield from (_unmet(requirement) for requirement in group if not requirement.met)
    if not {"onnxruntime", "onnxruntime-gpu"} & set(machine.packages):
        yield from _leftovers("onnxruntime")
    yield from (Problem(f"{t.runtime}: {t.problem}", t.fix) for t in trials if t.state == "broken")


def _needed_python() -> str:
    try:
        return importlib.metadata.metadata("ccn-deploy")["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unmet(requirement: Requirement) -> Problem:
    name, needed = requirement.name, requirement.needed
    have = f"{name} {requirement.installed}" if requirement.installed else f"no {name}"
    return Problem(
        f"{have} is installed; ccn-deploy{f'[{requirement.extra}]' if requirement.extra else ''} "
        f"needs {name}{needed}.",
        f"Install it with: pip install '{name}{needed}'",
    )


def _leftovers(module: str) -> Iterable[Problem]:
    """Find a directory that Python imports as an empty package: what an uninstall left."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.origin is None:
        where = ", ".join(spec.submodule_search_locations or ())
        yield Problem(
            f"{module} is not installed and an uninstall left files of it, which Python imports "
            f"as an empty package: {where}.",
            "Remove that directory, then: pip install 'ccn-deploy[cpu]' (or [gpu])",
        )


def _uses(bundle: Bundle, machine: Machine, trials: Iterable[Trial]) -> Iterable[Use]:
    """Join what fits by the manifest with what works by trial."""
    of = {trial.runtime: trial for trial in trials}
    for fit in candidates_for(bundle, machine):
        trial = of[fit.target.runtime]
        if fit.problem is not None:
            yield Use(fit, fit.problem.what, fit.problem.hint)
        elif trial.state != "works":
            yield Use(fit, trial.problem, trial.fix)
        else:
            yield Use(fit)
