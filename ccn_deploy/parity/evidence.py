"""What was measured, kept as a file that shows whether it was changed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import IntegrityError
from ccn_deploy.parity.comparison import Deviation
from ccn_deploy.parity.gradients import GradientEvidence
from ccn_deploy.parity.invariance import Claim
from ccn_deploy.records import Count, Record, Text, decode_sealed, encode_sealed
from ccn_deploy.storage import canonical_json, read_regular, sha256, write_atomic
from ccn_deploy.targets import Target

SCHEMA = "ccn-deploy/parity-evidence/4"

KINDS = ("clean", "adversarial", "noise", "zero", "one", "near-mean")
"""Every kind of input, in the order of reports."""


class InputRow(Record, frozen=True):
    """One kind of input at one batch size.

    Attributes:
        kind: One of :data:`KINDS`.
        batch: Images of one call; the last call may have fewer.
        deviation: From the reference.
    """

    kind: Text
    batch: Count
    deviation: Deviation


class LayerRow(Record, frozen=True):
    """One layer on one kind of input.

    Attributes:
        layer: Its name in the network.
        kind: Of input.
        deviation: Of its outputs from the reference's.
    """

    layer: Text
    kind: Text
    deviation: Deviation


class ParityEvidence(Record, frozen=True):
    """A measurement of one runtime.

    Attributes:
        setting: Everything it depends on: digests, data, seed, sizes, runtime, versions.
        inputs: Rows in order of kind and batch.
        invariance: The same images under other circumstances.
        gradients: Input gradients; None if the runtime has none of its own.
        layers: In order of execution, kinds within a layer; None if not asked for.
    """

    setting: dict[str, Any]
    inputs: tuple[InputRow, ...]
    invariance: tuple[Claim, ...]
    gradients: GradientEvidence | None = None
    layers: tuple[LayerRow, ...] | None = None
    schema: Literal["ccn-deploy/parity-evidence/4"] = "ccn-deploy/parity-evidence/4"

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
        write_atomic(path, encode_sealed(self))

    @classmethod
    def read(cls, path: Path, setting: Mapping[str, Any]) -> ParityEvidence | None:
        """Read what :meth:`write` wrote; None if there is no file.

        Args:
            path: The file.
            setting: What it must be a measurement of; which reference it was compared with is
                known to the file alone.

        Raises:
            IntegrityError: The file was changed, is a measurement of something else, or no file.
        """
        hint = "Measure again with: ccn-deploy verify-parity BUNDLE --fresh"
        data = read_regular(path)
        if data is None:
            return None
        found = decode_sealed(data, cls, f"The parity evidence {path}", hint)
        stored = {key: value for key, value in found.setting.items() if key != REFERENCE}
        if canonical_json(stored) != canonical_json(setting):
            raise IntegrityError(
                f"The parity evidence {path} is of another bundle or setting than its name says.",
                hint,
            )
        return found


REFERENCE = "reference"
"""Key of the setting for what the runtime was compared with."""


def evidence_path(bundle: Bundle, setting: Mapping[str, Any]) -> Path:
    """Return where the evidence of a setting is kept, below ``BUNDLE/evidence``.

    Raises:
        IntegrityError: There is a link on the way.
    """
    asked = {key: value for key, value in setting.items() if key != REFERENCE}
    key = sha256(canonical_json({"schema": SCHEMA, **asked}))[:16]
    target = Target(asked["runtime"]["name"], asked["runtime"]["precision"])
    return bundle.evidence_file("parity", f"{target}-{key}.json")
