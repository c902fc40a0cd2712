"""What each stage of an audit added: attacks one after another, each on what still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.robustness.evidence import Evidence


@dataclass(frozen=True)
class StageSide:
    """One stage on one target.

    Attributes:
        attacked: Images that it was run on.
        fooled: Images that it fooled, and that none before it did.
        left: Images that hold after it.
        forward: Logits that it asked for, of one image each.
        backward: Input gradients that it asked for, of one image each.
    """

    attacked: int
    fooled: int
    left: int
    forward: int
    backward: int

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attacked": self.attacked,
            "fooled": self.fooled,
            "left": self.left,
            "forward": self.forward,
            "backward": self.backward,
        }


@dataclass(frozen=True)
class StageResult:
    """One stage on reference and runtime; the reference has none that transfers from itself."""

    spec: AttackSpec
    reference: StageSide
    runtime: StageSide

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attack": self.spec.name,
            "title": self.spec.title,
            "norm": self.spec.norm,
            "part": self.spec.part,
            "parameters": dict(self.spec.parameters),
            "reference": self.reference.document(),
            "runtime": self.runtime.document(),
        }


def stages_of(spec: AttackSpec, reference: Evidence, runtime: Evidence) -> tuple[StageResult, ...]:
    """Return what each stage of an attack left on both targets; none of one without stages."""
    sides = zip(_sides(spec, reference), _sides(spec, runtime), strict=True)
    return tuple(StageResult(stage, *both) for stage, both in zip(spec.stages, sides, strict=True))


def _sides(spec: AttackSpec, evidence: Evidence) -> list[StageSide]:
    found = []
    left = int(((evidence.status == "held") | (evidence.status == "fooled")).sum())
    for at, stage in enumerate(spec.stages):
        fooled = int(((evidence.stage == stage.name) & (evidence.status == "fooled")).sum())
        left -= fooled
        queries = np.maximum(evidence.stage_queries[:, at], 0)
        found.append(
            StageSide(
                attacked=int((queries[:, 0] > 0).sum()),
                fooled=fooled,
                left=left,
                forward=int(queries[:, 0].sum()),
                backward=int(queries[:, 1].sum()),
            )
        )
    return found
