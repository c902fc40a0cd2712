"""What an evaluation found, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks.spec import AttackSpec, Norm, Setting
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest, Proportion
from ccn_deploy.robustness.query_stats import QueryStatsPair
from ccn_deploy.robustness.stages import StageResult
from ccn_deploy.verdict import Verdict


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy of the two under one attack at one strength, or without one: what is judged.

    Attributes:
        name: For sentences, such as ``"FGSM at epsilon 0.1"``.
        label: For tables, such as ``"FGSM 0.1"``.
        reference: Proportion of images that are right and stay right on the reference.
        runtime: The same on the runtime.
        gate: The comparison.
    """

    name: str
    label: str
    reference: Proportion
    runtime: Proportion
    gate: NonInferiorityTest


def label_of(title: str, strength: float | None) -> str:
    """Return what tables call an attack at a strength, epsilon or d; none without one."""
    return "none" if strength is None else f"{title} {strength:g}"


def settings_text(parameters: Mapping[str, Setting]) -> str:
    """Return settings on a line, such as ``"steps 40, decay yes"``; "none" if there are none."""
    said = (
        f"{name} {('no', 'yes')[value] if isinstance(value, bool) else _plain(value)}"
        for name, value in parameters.items()
    )
    return ", ".join(said) or "none"


@dataclass(frozen=True)
class FixedEpsilonResult:
    """One attack at one epsilon, or no attack at all.

    Attributes:
        spec: The attack; None without one.
        reference: Proportion of images that are right and stay right on the reference.
        runtime: The same on the runtime.
        already_wrong: Images that the runtime gets wrong without an attack.
        invalid: Attacks on the runtime that returned no legal image.
        flips: Images that one of the two gets right and the other does not.
        gate: The comparison.
        effort: What the two attacks took.
        stages: What each stage left, of an attack that is several one after another.
    """

    spec: AttackSpec | None
    reference: Proportion
    runtime: Proportion
    already_wrong: int
    invalid: int
    flips: int
    gate: NonInferiorityTest
    effort: QueryStatsPair
    stages: tuple[StageResult, ...] = ()

    @property
    def name(self) -> str:
        """That of the attack, or ``"clean"``."""
        return "clean" if self.spec is None else self.spec.name

    @property
    def norm(self) -> str | None:
        """In which epsilon is measured; None without an attack."""
        return None if self.spec is None else self.spec.norm

    @property
    def epsilon(self) -> float:
        """Strength; 0 without an attack."""
        return 0.0 if self.spec is None else float(self.spec.epsilon or 0.0)

    @property
    def title(self) -> str:
        """The attack, for people; its strength is :attr:`epsilon`."""
        return "no attack" if self.spec is None else self.spec.title

    @property
    def row(self) -> AccuracyRow:
        """What is judged."""
        clean = self.spec is None
        return AccuracyRow(
            self.title if clean else f"{self.title} at epsilon {self.epsilon:g}",
            label_of(self.title, None if clean else self.epsilon),
            self.reference,
            self.runtime,
            self.gate,
        )

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attack": self.name,
            "title": self.title,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "parameters": {} if self.spec is None else dict(self.spec.parameters),
            "n": self.runtime.n,
            "already_wrong": self.already_wrong,
            "invalid": self.invalid,
            "reference": self.reference.document("robust_accuracy"),
            "runtime": self.runtime.document("robust_accuracy"),
            "verdict_flips": self.flips,
            **self.gate.document(),
            "seconds": round(self.effort.seconds, 3),
            "effort": self.effort.document(),
            "stages": [stage.document() for stage in self.stages],
        }


@dataclass(frozen=True)
class MinimizationSide:
    """What the smallest perturbations say of one target (paper, equations 8 and 9).

    Arrays are of the images where something was found.

    Attributes:
        already_wrong: Images wrong without an attack.
        failed: Images for which nothing was found; their rho stands for infinity.
        failed_correct: Those among them that are right without an attack.
        found: Proportion of all images for which something was found: the attack's success.
        rho: Euclidean norm of the perturbation over that of the image.
        l2: Euclidean norm of the perturbation.
        linf: Largest change of a pixel.
        rho_correct: Of the images that are right without an attack.
        accuracy_at: By d: share that is right, and not fooled within ``rho <= d``, or within
            ``linf <= d`` if that is what the attack makes small.
    """

    already_wrong: int
    failed: int
    failed_correct: int
    found: Proportion
    rho: NDArray[np.float64]
    l2: NDArray[np.float64]
    linf: NDArray[np.float64]
    rho_correct: NDArray[np.float64]
    accuracy_at: dict[float, Proportion]

    @property
    def rho_adv(self) -> float | None:
        """Mean rho over the images where something was found (paper, equation 9)."""
        return _mean(self.rho)

    @property
    def rho_median(self) -> float | None:
        """Median rho of the same images."""
        return _median(self.rho)

    @property
    def l2_mean(self) -> float | None:
        """Mean L2 distance of the images that were found (paper, tables 11 and 12)."""
        return _mean(self.l2)

    @property
    def linf_mean(self) -> float | None:
        """Mean Linf distance of the images that were found."""
        return _mean(self.linf)

    @property
    def linf_median(self) -> float | None:
        """Median Linf distance of the same images."""
        return _median(self.linf)

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "already_wrong": self.already_wrong,
            "failed": self.failed,
            "rho_adv_mean": self.rho_adv,
            "rho_adv_median": self.rho_median,
            "l2_mean": self.l2_mean,
            "l2_median": _median(self.l2),
            "linf_mean": self.linf_mean,
            "linf_median": self.linf_median,
            "success": self.found.value,
            "success_ci95": list(self.found.ci95),
            "accuracy_at": {f"{d:g}": share.value for d, share in self.accuracy_at.items()},
            "accuracy_at_ci95": {
                f"{d:g}": list(share.ci95) for d, share in self.accuracy_at.items()
            },
            "without_already_wrong": {
                "failed": self.failed_correct,
                "rho_adv_mean": _mean(self.rho_correct),
                "rho_adv_median": _median(self.rho_correct),
            },
        }


@dataclass(frozen=True)
class MinimizationResult:
    """An attack that looks for the smallest perturbation.

    Attributes:
        spec: The attack, which has no epsilon.
        n: Images.
        reference: The reference, attacked itself.
        runtime: The runtime, attacked itself.
        invalid: Attacks on the runtime that returned no legal image.
        flips: Images on whose verdict the two differ at some d.
        gates: One comparison per d.
        effort: What the two attacks took.
        unclipped: The same attack without the box, for comparison with the paper; not judged.
    """

    spec: AttackSpec
    n: int
    reference: MinimizationSide
    runtime: MinimizationSide
    invalid: int
    flips: int
    gates: dict[float, NonInferiorityTest]
    effort: QueryStatsPair
    unclipped: MinimizationResult | None = None

    @property
    def name(self) -> str:
        """That of the attack."""
        return self.spec.name

    @property
    def norm(self) -> Norm:
        """In which the perturbation is small."""
        return self.spec.norm

    @property
    def clip(self) -> bool:
        """Whether images stayed in [0, 1]."""
        return self.spec.clip

    @property
    def title(self) -> str:
        """The attack, for people."""
        return self.spec.title

    @property
    def full_title(self) -> str:
        """The attack, and whether it left the box."""
        return self.title if self.clip else f"{self.title} leaving [0, 1]"

    @property
    def rows(self) -> tuple[AccuracyRow, ...]:
        """What is judged: a row for each d inside the box, and nothing outside."""
        return tuple(
            AccuracyRow(
                f"{self.title} at d = {d:g}",
                label_of(self.title, d),
                self.reference.accuracy_at[d],
                self.runtime.accuracy_at[d],
                gate,
            )
            for d, gate in self.gates.items()
            if self.clip
        )

    @property
    def gate(self) -> NonInferiorityTest:
        """The gate that decides: the first that fails, else the first in doubt, else the worst."""
        rank = [Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS]
        return min(self.gates.values(), key=lambda gate: (rank.index(gate.verdict), -gate.upper95))

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        document = {
            "attack": self.name,
            "title": self.title,
            "norm": self.norm,
            "epsilon": None,
            "clip": self.clip,
            "parameters": dict(self.spec.parameters),
            "n": self.n,
            "already_wrong": self.runtime.already_wrong,
            "failed": self.runtime.failed,
            "invalid": self.invalid,
            "reference": self.reference.document(),
            "runtime": self.runtime.document(),
            "verdict_flips": self.flips,
            "seconds": round(self.effort.seconds, 3),
            "effort": self.effort.document(),
        }
        if self.clip:
            document |= self.gate.document()
            document["gates"] = {f"{d:g}": gate.document() for d, gate in self.gates.items()}
        if self.unclipped is not None:
            document["unclipped"] = self.unclipped.document()
        return document


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None
