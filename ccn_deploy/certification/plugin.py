"""The pytest plugin: options, and the door to the claims.

pytest loads this in every test run of every project that has this package installed. It imports
the standard library and pytest, and without ``--ccn-bundle`` it does nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ccn_deploy.certification.claims import ClaimsFile

PACKAGE = "ccn_deploy.certification"
DIRECTORY = Path(__file__).parent
CLAIMS = DIRECTORY / "claims.py"

NOTE = "ccn-note"
"""Property of a test report with what the reader of all results should know."""

UNFIT = "ccn-unfit"
"""Property of a claim that this machine could not judge, for want of a kernel or a package."""

ENVIRONMENT = 3
"""Exit code of a run whose claims fail for no other reason: as of the commands."""

NOTHING_JUDGED = 4
"""Exit code of a run in which no claim holds and none fails: inconclusive, as of the commands."""

DATA_OPTIONS = {
    "resize": "MODE",
    "crop": "MODE",
    "interpolation": "NAME",
    "layout": "NAME",
    "npz-images": "KEY",
    "npz-labels": "KEY",
}
"""Options of data, each with what its help shows for the value."""

_LIKEWISE = (
    "How images are made of a directory or an .npz file: as --{} of `ccn-deploy verify-parity`."
)
_OPTIONS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("bundle", "BUNDLE", "Directory written by `ccn-deploy export`.", {}),
    (
        "policy",
        "FILE.toml",
        "What is demanded, as for `ccn-deploy certify`; it says what the options below would.",
        {"type": Path},
    ),
    ("runtime", "NAME", "What runs the model (default: onnxruntime-cpu).", {}),
    ("precision", "NAME", "Precision of the deployed graph (default: fp32).", {}),
    (
        "max-drop",
        "SHARE",
        "How much accuracy under attack the runtime may lose to the reference, such as 1% or "
        "0.01 (default: as for `ccn-deploy verify-robustness`).",
        {},
    ),
    (
        "min-robust",
        "ATTACK@STRENGTH=SHARE",
        "What must be left under an attack, such as apgd@0.1=55%; may be given several times. "
        "Without it nothing is claimed but that the runtime is no worse than the reference.",
        {"action": "append"},
    ),
    (
        "recheck",
        "all|N",
        "Ask runtime and attack again about so many images of evidence that was read, chosen at "
        "random; 0 for none (default: a tenth).",
        {},
    ),
    ("min-accuracy", "SHARE", "What accuracy must be without an attack, such as 95%.", {}),
    ("samples", "N", "Images to attack (default likewise).", {"type": int}),
    (
        "parity-samples",
        "N",
        "Images of each kind to compare with the reference (default: as for `ccn-deploy "
        "verify-parity`).",
        {"type": int},
    ),
    (
        "attack",
        "NAME",
        "A name that `ccn-deploy verify-robustness` takes; may be given several times (default "
        "likewise).",
        {"action": "append"},
    ),
    ("epsilons", "LIST", "Strengths of attacks in Linf, with commas (default likewise).", {}),
    ("epsilons-l2", "LIST", "Strengths of attacks bounded in L2 (default likewise).", {}),
    ("steps", "N", "Of PGD and APGD (default likewise).", {"type": int}),
    ("step-size", "SHARE", "Of PGD, relative to epsilon (default likewise).", {"type": float}),
    ("restarts", "N", "Of PGD and APGD (default likewise).", {"type": int}),
    (
        "dataset",
        "NAME|DIR|FILE.npz",
        "Data set to measure on: a name, a directory of class folders, or an .npz file (default: "
        "the one the model was trained on).",
        {},
    ),
    ("data-dir", "DIR", "Directory with the files of a data set that has a name.", {"type": Path}),
    *((name, metavar, _LIKEWISE.format(name), {}) for name, metavar in DATA_OPTIONS.items()),
    ("threads", "N", "CPU threads (default: the runtime's choice).", {"type": int}),
)
"""Options without ``--ccn-``: what stands for the value, the help, and how pytest reads it."""

_USAGE = (
    f"The claims need a bundle to judge.\nGive one: pytest --pyargs {PACKAGE} --ccn-bundle BUNDLE"
)


_NOT_ASKED = (
    "--ccn-bundle was given, and the claims about it were not asked for: nothing would be judged.\n"
    f"Run them by their name: pytest --pyargs {PACKAGE} --ccn-bundle BUNDLE"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; each has the name and the meaning it has in the commands."""
    group = parser.getgroup("ccn-deploy", "certification of a bundle (ccn-deploy)")
    for name, metavar, what, more in _OPTIONS:
        shown = what.replace("%", "%%")  # a percent sign is argparse's own
        group.addoption(f"--ccn-{name}", metavar=metavar, help=shown, **more)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a run that asks for the claims and cannot judge them, before anything starts.

    Raises:
        pytest.UsageError: No bundle, no such bundle, or an option that means nothing.
    """
    if not _asked_for_claims(config):
        if config.getoption("--ccn-bundle"):
            raise pytest.UsageError(_NOT_ASKED)
        return
    if not config.getoption("--ccn-bundle"):
        raise pytest.UsageError(_USAGE)
    from ccn_deploy.certification.claims import begin

    begin(config)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> ClaimsFile | None:
    """Collect the claims where pytest finds the file that holds them."""
    if file_path.name != CLAIMS.name or file_path.resolve() != CLAIMS.resolve():
        return None
    if not parent.config.getoption("--ccn-bundle"):
        return None
    from ccn_deploy.certification.claims import ClaimsFile

    return ClaimsFile.from_parent(parent, path=file_path, nodeid=f"{PACKAGE}.{CLAIMS.stem}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a run that this machine is not fit for end otherwise than one of a bad bundle."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = reporter.stats if reporter is not None else {}
    failed = [*stats.get("failed", ()), *stats.get("error", ())]
    if failed and all((UNFIT, True) in getattr(r, "user_properties", ()) for r in failed):
        session.exitstatus = ENVIRONMENT
    if (
        _asked_for_claims(session.config)
        and not hasattr(session.config, "workerinput")  # of pytest-xdist, which judges a part
        and not session.config.option.collectonly
        and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        and not stats.get("passed")
    ):
        session.exitstatus = NOTHING_JUDGED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once what concerns all claims; the reports bring it from every worker."""
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())
    ]
    notes = dict.fromkeys(
        str(value)
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == NOTE
    )
    for note in notes:
        terminalreporter.section("ccn-deploy")
        terminalreporter.write_line(note)


def _asked_for_claims(config: pytest.Config) -> bool:
    """Whether an argument of the command line names this package or its directory."""
    for argument in config.args:
        name = argument.split("::", 1)[0].split("[", 1)[0]
        if name in (PACKAGE, f"{PACKAGE}.{CLAIMS.stem}"):
            return True
        if Path(name).resolve() in (DIRECTORY.resolve(), CLAIMS.resolve()):
            return True
    return False
