"""What was measured, kept as a file that shows whether it was changed. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccn_deploy.errors import IntegrityError
from ccn_deploy.parity.comparison import Deviation
from ccn_deploy.parity.gradients import GradientEvidence
from ccn_deploy.parity.invariance import Claim
from ccn_deploy.storage import canonical_json, sha256, write_atomic

SCHEMA = "ccn-deploy/parity-evidence/2"

KINDS = ("clean", "adversarial", "noise", "zero", "one", "near-mean")
"""Every kind of input, in the order of reports."""


@dataclass(frozen=True)
class InputRow:
    """One kind of input at one batch size.

    Attributes:
        kind: ``"clean"``, ``"adversarial"``, ``"noise"``, ``"zero"``, ``"one"``, ``"near-mean"``.
        batch: Images of one call; the last call may have fewer.
        deviation: From the reference.
    """

    kind: str
    batch: int
    deviation: Deviation

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"kind": self.kind, "batch": self.batch, **self.deviation.document()}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> InputRow:
        """Read the JSON form."""
        return cls(document["kind"], document["batch"], Deviation.from_document(document))


@dataclass(frozen=True)
class LayerRow:
    """One layer on one kind of input.

    Attributes:
        layer: Its name in the network.
        kind: Of input.
        deviation: Of its outputs from the reference's.
    """

    layer: str
    kind: str
    deviation: Deviation

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        document = self.deviation.document()
        del document["argmax_flips"], document["flips"]  # a layer has no labels
        return {"layer": self.layer, "kind": self.kind, **document}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> LayerRow:
        """Read the JSON form."""
        deviation = Deviation.from_document({"argmax_flips": 0, "flips": [], **document})
        return cls(document["layer"], document["kind"], deviation)


@dataclass(frozen=True)
class ParityEvidence:
    """A measurement of one runtime.

    Attributes:
        setting: Everything it depends on: digests, data, seed, sizes, runtime, versions.
        inputs: Rows in order of kind and batch.
        invariance: The same images under other circumstances.
        gradients: Input gradients; None if the runtime has none of its own.
        layers: In order of execution, kinds within a layer; None if not asked for.
    """

    setting: Mapping[str, Any]
    inputs: tuple[InputRow, ...]
    invariance: tuple[Claim, ...]
    gradients: GradientEvidence | None = None
    layers: tuple[LayerRow, ...] | None = None

    @property
    def runtime(self) -> str:
        """Name of the runtime measured."""
        return str(self.setting["runtime"]["name"])

    @property
    def precision(self) -> str:
        """Precision of the runtime measured."""
        return str(self.setting["runtime"]["precision"])

    def write(self, path: Path) -> None:
        """Write to ``path``, with a digest of the canonical form.

        Raises:
            StorageError: The disk is full or not writable.
        """
        document = self._document()
        write_atomic(path, canonical_json({**document, "digest": sha256(canonical_json(document))}))

    @classmethod
    def read(cls, path: Path) -> ParityEvidence:
        """Read what :meth:`write` wrote.

        Raises:
            IntegrityError: The file was changed.
        """
        data = path.read_bytes()
        try:
            document = json.loads(data)
            digest = document.pop("digest")
            whole = digest == sha256(canonical_json(document)) and data == canonical_json(
                {**document, "digest": digest}
            )
            if not whole:
                raise ValueError("its digest does not match")
            return cls(
                setting=document["setting"],
                inputs=tuple(map(InputRow.from_document, document["inputs"])),
                invariance=tuple(map(Claim.from_document, document["invariance"])),
                gradients=None
                if document["gradients"] is None
                else GradientEvidence.from_document(document["gradients"]),
                layers=None
                if document["layers"] is None
                else tuple(map(LayerRow.from_document, document["layers"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"The parity evidence {path} was changed or is damaged: {error}.",
                "Measure again with: ccn-deploy verify-parity BUNDLE --fresh",
            ) from error

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "setting": self.setting,
            "inputs": [row.document() for row in self.inputs],
            "invariance": [claim.document() for claim in self.invariance],
            "gradients": None if self.gradients is None else self.gradients.document(),
            "layers": None if self.layers is None else [row.document() for row in self.layers],
        }


def setting_key(setting: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with anything a measurement depends on."""
    return sha256(canonical_json({"schema": SCHEMA, **setting}))[:16]
