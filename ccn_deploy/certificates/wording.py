"""What a certificate says, in the words that its page and its model card have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from ccn_deploy.certificates.statement import (
    AttackResult,
    Certificate,
    CertifiedTarget,
    ClaimResult,
    Proportion,
    WaiverUse,
)
from ccn_deploy.tables import Mark

HEADLINES: Mapping[str, str] = MappingProxyType(
    {
        "pass": "Certified",
        "fail": "Not certified",
        "inconclusive": "Inconclusive, so not certified",
    }
)
"""Verdicts, as the claim begins with them."""

LATE = (
    "The policy was not committed before every result: its thresholds may have been set to fit "
    "them."
)

CHECK = "ccn-deploy verify {} --bundle BUNDLE --key KEY.pub"
"""The command that checks a certificate, but for the name of its file."""

_WORDS = {"pass": "Met", "fail": "Not met", "inconclusive": "Not shown", "void": "Not judged"}
_SEES = {
    "gradients": "gradients (white box)",
    "scores": "scores only",
    "labels": "labels only",
}


def headline(verdict: str, targets: Iterable[CertifiedTarget]) -> Mark:
    """Return a verdict on targets in words that nobody can take for another."""
    waived = sum(claim.waived for certified in targets for claim in certified.claims)
    but = f", with {waived} waived" if waived and verdict == "pass" else ""
    return Mark(f"{HEADLINES[verdict]}{but}", verdict)


def claimed(said: Certificate) -> str:
    """Return the claim without its first words, which are the headline."""
    return said.claim.removeprefix(f"{HEADLINES[said.verdict]}: ")


def outcome(claim: ClaimResult) -> Mark:
    """Return what became of a claim."""
    word = _WORDS[claim.verdict]
    return Mark(f"{word}, waived", "inconclusive") if claim.waived else Mark(word, claim.verdict)


def demanded(certified: CertifiedTarget) -> Sequence[ClaimResult]:
    """Return the claims about a target, those that do not hold first."""
    return sorted(certified.claims, key=lambda claim: claim.verdict in ("pass", "void"))


def summary(certified: CertifiedTarget) -> str:
    """Return how many claims about a target are met, and what became of the others."""
    counts = Counter(outcome(claim).word.lower() for claim in certified.claims)
    met, n = counts.pop("met", 0), len(certified.claims)
    first = f"All {n} claims are met" if met == n else f"{met} of {n} claims are met"
    return "; ".join([first, *(f"{count} {word}" for word, count in counts.items())]) + "."


def waiver_of(claim: ClaimResult, certified: CertifiedTarget, waivers: Sequence[WaiverUse]) -> str:
    """Return who let a claim about a target go, until when and why; empty if nobody did."""
    return " ".join(
        f"Waived by {waiver.owner} until {waiver.expires}: {waiver.reason}"
        for waiver in waivers
        if waiver.lets(claim, certified.target)
    )


def told(share: Proportion) -> str:
    """Return a proportion on a line, with its interval and of how many images it is."""
    low, high = (100 * side for side in share.ci95)
    return f"{100 * share.value:.1f} % ({low:.1f} to {high:.1f}) of {share.n} images"


def sees(attack: AttackResult) -> str:
    """Return what an attacker is told of every image."""
    return _SEES[attack.threat.knowledge]


def strength(attack: AttackResult) -> str:
    """Return an attack with its epsilon, or with the distance at which accuracy is counted."""
    size = attack.threat.epsilon if attack.distance is None else attack.distance
    return attack.title if size is None else f"{attack.title} {size:g}"
