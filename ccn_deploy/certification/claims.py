"""The claims, as pytest items: named for what they say, failing in a few lines.

=====================  =============================================================
claim                  what it says
=====================  =============================================================
``intact``             every file of the bundle is the file that was exported
``derived``            the graph is what its pass makes of its sources; skipped where the bundle
                       begins with it
``parity``             the runtime computes the reference's logits, and its slopes if it gives
                       any, kind of input by kind
``batch-invariant``    an image's answer does not depend on the images beside it
``deterministic``      the same images give the same answer again
``accurate``           without an attack, the runtime loses no more than allowed, and is as
                       accurate as required
``sane``               nothing undermines the numbers of the evaluation under attack
``no-worse``           under an attack, the runtime loses no more than allowed to the reference
``robust``             under an attack, as much is left as is required; only where something is
=====================  =============================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from ccn_deploy.certification.certify import sessions_of
from ccn_deploy.certification.findings import Finding
from ccn_deploy.certification.plugin import DATA_OPTIONS, NOTE, UNFIT
from ccn_deploy.certification.policy import NEVER_WAIVED, Policy, Waiver, read_policy
from ccn_deploy.certification.session import Certification, Options
from ccn_deploy.data import DataOptions
from ccn_deploy.errors import CcnDeployError, EnvironmentUnfitError, UsageError
from ccn_deploy.robustness.options import AttackOptions
from ccn_deploy.verdict import Verdict

_SUITE = pytest.StashKey["Suite"]()


@dataclass(frozen=True)
class Suite:
    """Everything that one run of the claims judges.

    Attributes:
        sessions: One a target.
        policy: Where the demands come from; None for the command line.
    """

    sessions: tuple[Certification, ...]
    policy: Policy | None = None

    @property
    def note(self) -> str:
        """What a reader of the results should know; empty if nothing."""
        return next((session.note for session in self.sessions if session.note), "")

    def claims(self) -> Iterator[tuple[str, Callable[[], Finding], Waiver | None]]:
        """Yield the name of each claim, what judges it, and the waiver that lets it go.

        Of several targets, each claim says which it is about, and what concerns the bundle alone is
        claimed once.
        """
        for at, session in enumerate(self.sessions):
            for name, check in session.claims():
                waiver = self.policy.waiver_for(name, session.target) if self.policy else None
                if at and name.startswith(NEVER_WAIVED):
                    continue
                told = name
                if len(self.sessions) > 1 and not name.startswith(NEVER_WAIVED):
                    kind, _, what = name.partition("[")
                    about = str(session.target)
                    told = name if what.startswith(about) else f"{kind}[{about}-{what}"
                yield told, check, waiver


def begin(config: pytest.Config) -> Suite:
    """Read the options, once a run.

    Raises:
        pytest.UsageError: One of them means nothing.
    """
    if _SUITE not in config.stash:
        try:
            config.stash[_SUITE] = _suite(config)
        except CcnDeployError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_SUITE]


def _suite(config: pytest.Config) -> Suite:
    bundle = Path(config.getoption("--ccn-bundle"))
    path = config.getoption("--ccn-policy")
    if path is None:
        options = Options(
            bundle=bundle,
            attack=AttackOptions(**_given(config, _ATTACK_FIELDS)),
            data=DataOptions(**_given(config, _DATA_FIELDS)),
            **_given(config, _FIELDS),
        )
        return Suite((Certification(options),))
    every = {**_FIELDS, **_ATTACK_FIELDS, **_DATA_FIELDS}
    for field, name in every.items():
        if field not in _OF_THE_MACHINE and config.getoption(f"--ccn-{name}") is not None:
            raise UsageError(
                f"--ccn-{name} was given beside --ccn-policy, which says that.",
                "Leave it out, or change the policy.",
            )
    policy = read_policy(path)
    policy.check(datetime.now(timezone.utc).date())
    here = {
        field: value for field, value in _given(config, _FIELDS).items() if field in _OF_THE_MACHINE
    }
    return Suite(sessions_of(policy, bundle, **here), policy)


_OF_THE_MACHINE = ("data_dir", "threads", "recheck")
"""Options that a policy does not say."""

_FIELDS = {
    name.replace("-", "_"): name
    for name in ("runtime", "precision", "max-drop", "min-robust", "min-accuracy", "recheck",
                 "samples", "parity-samples", "dataset", "data-dir", "threads")
}  # fmt: skip
_ATTACK_FIELDS = {
    name.replace("-", "_"): name
    for name in ("epsilons", "epsilons-l2", "steps", "step-size", "restarts")
} | {"attacks": "attack"}
_DATA_FIELDS = {
    {"npz-images": "images_key", "npz-labels": "labels_key"}.get(name, name): name
    for name in DATA_OPTIONS
}
"""By field of the options that a claim reads: the option that gives it, without ``--ccn-``."""


def _given(config: pytest.Config, fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the options that were given, by field."""
    found = {field: config.getoption(f"--ccn-{name}") for field, name in fields.items()}
    return {field: value for field, value in found.items() if value is not None}


class ClaimsFile(pytest.File):
    """Collects the claims; no evidence is looked at yet."""

    def collect(self) -> Iterator[Claim]:
        """Yield one item per claim."""
        for name, check, waiver in begin(self.config).claims():
            yield Claim.from_parent(self, name=name, check=check, waiver=waiver)


class Claim(pytest.Item):
    """One claim about the bundle."""

    def __init__(
        self, *, check: Callable[[], Finding], waiver: Waiver | None = None, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self._check = check
        self._waiver = waiver
        if self.config.pluginmanager.hasplugin("timeout"):
            # The first claim of a kind collects evidence for all of its kind, which takes minutes;
            # a limit that is meant for unit tests must not cut that short.
            self.add_marker(pytest.mark.timeout(0))

    def runtest(self) -> None:
        """Judge the claim, collecting its evidence if nobody has."""
        try:
            with warnings.catch_warnings():
                # A bundle is judged: that a library warns is no fault of it, however a project's
                # own tests take warnings.
                warnings.simplefilter("default")
                finding = self._check()
        except EnvironmentUnfitError:
            self.user_properties.append((UNFIT, True))
            raise
        if finding.void:
            pytest.skip(finding.void)
        self.user_properties += [("measured", finding.measured), ("bound", finding.bound)]
        if note := begin(self.config).note:
            self.user_properties.append((NOTE, note))
        if finding.verdict is not Verdict.PASS:
            if (waiver := self._waiver) is not None:
                pytest.xfail(
                    f"waived by {waiver.owner} until {waiver.expires}: {waiver.reason}; "
                    f"{finding.verdict.value}: {finding.measured}"
                )
            raise BrokenClaimError(finding)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return a few lines instead of a traceback, which would say nothing of the bundle."""
        if isinstance(excinfo.value, BrokenClaimError):
            return str(excinfo.value)
        if isinstance(excinfo.value, CcnDeployError):
            return f"could not be judged: {excinfo.value}"
        return super().repr_failure(excinfo)

    @property
    def location(self) -> tuple[str, int | None, str]:
        """Where the claim stands, the same on every machine."""
        return self.nodeid.split("::", 1)[0], None, self.name

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return what heads the claim's failure."""
        return self.path, None, self.name


class BrokenClaimError(Exception):
    """A claim that does not hold."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
