"""What an attack took: queries of each image, and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ccn_deploy.robustness.evidence import Evidence


@dataclass(frozen=True)
class QueryStats:
    """What one or several attacks on one target took.

    Attributes:
        attacked: Images that were attacked; one that is wrong already is left alone by an attack
            with an epsilon.
        forward: Logits that the attack asked for, of one image each.
        backward: Input gradients that it asked for, of one image each.
        seconds: Of the attack and of deciding what became of every image.
    """

    attacked: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, evidence: Evidence) -> QueryStats:
        """Count what the evidence says of every image."""
        return cls(
            attacked=int((evidence.forward > 0).sum()),
            forward=int(evidence.forward.sum()),
            backward=int(evidence.backward.sum()),
            seconds=evidence.seconds,
        )

    @classmethod
    def sum(cls, efforts: Iterable[QueryStats]) -> QueryStats:
        """Put several attacks together."""
        every = list(efforts)
        return cls(
            attacked=sum(e.attacked for e in every),
            forward=sum(e.forward for e in every),
            backward=sum(e.backward for e in every),
            seconds=sum(e.seconds for e in every),
        )

    @property
    def forward_mean(self) -> float | None:
        """Forward queries an attacked image; None without one."""
        return self.forward / self.attacked if self.attacked else None

    @property
    def backward_mean(self) -> float | None:
        """Backward queries an attacked image; None without one."""
        return self.backward / self.attacked if self.attacked else None

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attacked": self.attacked,
            "forward_mean": self.forward_mean,
            "backward_mean": self.backward_mean,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class QueryStatsPair:
    """What an attack took on both sides, each attacked by itself."""

    reference: QueryStats = QueryStats()
    runtime: QueryStats = QueryStats()

    @classmethod
    def sum(cls, efforts: Iterable[QueryStatsPair]) -> QueryStatsPair:
        """Put several attacks together, each side by itself."""
        every = list(efforts)
        return cls(
            QueryStats.sum(e.reference for e in every), QueryStats.sum(e.runtime for e in every)
        )

    @property
    def seconds(self) -> float:
        """Of both sides."""
        return self.reference.seconds + self.runtime.seconds

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {"reference": self.reference.document(), "runtime": self.runtime.document()}
