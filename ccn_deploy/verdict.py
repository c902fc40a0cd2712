"""Pass, fail, or not enough evidence to say."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from ccn_deploy.errors import ExitCode


class Verdict(str, Enum):
    """The outcome of a judgement."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> ExitCode:
        """The code a command with this outcome exits with."""
        return {
            Verdict.PASS: ExitCode.PASS,
            Verdict.FAIL: ExitCode.GATE_FAILED,
            Verdict.INCONCLUSIVE: ExitCode.INCONCLUSIVE,
        }[self]

    @classmethod
    def all_of(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """Combine claims that must all hold: one fail fails, else one doubt leaves doubt.

        No claims at all are inconclusive: nothing was shown.
        """
        found = set(verdicts)
        for verdict in (cls.FAIL, cls.INCONCLUSIVE, cls.PASS):
            if verdict in found:
                return verdict
        return cls.INCONCLUSIVE
