"""Whether a target can be attacked at all: facts of a few images, each a sign of hidden slopes.

A gradient attack shows nothing of a program whose slopes are zero, infinite, rounded away or of
another function. The signs are those of Carlini et al., "On evaluating adversarial robustness"
(2019, https://arxiv.org/abs/1902.06705) and Athalye et al., "Obfuscated gradients give a false
sense of security" (2018), and the active test of Zimmermann et al., "Increasing confidence in
adversarial robustness evaluations" (2022, https://arxiv.org/abs/2206.13991).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import IntegrityError
from ccn_deploy.records import Count, Record, decode_sealed, encode_sealed
from ccn_deploy.robustness.agreement import Agreement, Fraction, GradientAgreement
from ccn_deploy.runtimes.base import Array
from ccn_deploy.storage import canonical_json, read_regular, sha256, write_atomic
from ccn_deploy.targets import Target

SCHEMA = "ccn-deploy/robustness-diagnostics/1"

Length = Annotated[float, msgspec.Meta(ge=0)]


class Slopes(Record, frozen=True):
    """Gradients at some points.

    Attributes:
        n: Points.
        zero: Those where the gradient of the cross-entropy, as an attack is given it, is zero.
        non_finite: Those where it is not finite.
        norm_median: Euclidean norm of the slope away from the label, which unlike that of the
            cross-entropy does not vanish where a network is sure; 0 if there is none.
        norm_max: The largest.
    """

    n: Count
    zero: Count
    non_finite: Count
    norm_median: Length
    norm_max: Length

    @classmethod
    def of(cls, seen: Array, away: Array) -> Slopes:
        """Look at gradients of the cross-entropy and slopes away from the label, [N, C, H, W]."""
        finite = np.isfinite(seen).all(axis=(1, 2, 3))
        norms = np.sqrt(np.square(away.astype(np.float64)).sum(axis=(1, 2, 3)))
        norms = norms[np.isfinite(norms) & (norms > 0)]
        return cls(
            n=len(seen),
            zero=int((seen == 0).all(axis=(1, 2, 3)).sum()),
            non_finite=int((~finite).sum()),
            norm_median=float(np.median(norms)) if len(norms) else 0.0,
            norm_max=float(norms.max()) if len(norms) else 0.0,
        )


class Held(Record, frozen=True):
    """Which of the images that are right hold, under PGD along the target's gradients.

    All columns are of the same images, in the same order.

    Attributes:
        few_steps: At :attr:`Diagnostics.epsilon`, with a quarter of the steps.
        usual: With all of them.
        half: With all of them, at half that epsilon.
        everywhere: At epsilon 1, which allows every image.
        margin: With all of them, up the margin of the logits instead of the cross-entropy.
        scores: With all of them, and under Square, which asks for no gradients, after that.
        transferred: Against the usual attack's images of the reference; empty for the reference.
    """

    few_steps: tuple[bool, ...]
    usual: tuple[bool, ...]
    half: tuple[bool, ...]
    everywhere: tuple[bool, ...]
    margin: tuple[bool, ...]
    scores: tuple[bool, ...]
    transferred: tuple[bool, ...]


class Planted(Record, frozen=True):
    """Adversarial images that are known to be there, and how many of them the attack found.

    Attributes:
        n: Images for which one could be planted.
        found: Those among them for which PGD found one.
    """

    n: Count
    found: Count


class DataFacts(Record, frozen=True):
    """The images that were attacked, and what training left on record.

    Attributes:
        n: Images.
        distinct: Images of which no two are equal.
        trained_on: Images that the network was trained on; None where that is not known.
        recorded: Accuracy on test images when training ended; None where nothing says.
    """

    n: Count
    distinct: Count
    trained_on: Count | None
    recorded: Fraction | None


class Native(Record, frozen=True):
    """A runtime's own gradients against the reference's.

    Attributes:
        agreement: At clean images, and where an attack along the native ones walks.
        crafted: Where an attack on the reference ends; None if no image was attacked.
        norm_ratio: Median norm of native over reference gradients at clean images.
    """

    agreement: GradientAgreement
    crafted: Agreement | None
    norm_ratio: Length


class Diagnostics(Record, frozen=True):
    """What was found on a target.

    Attributes:
        epsilon: Of the attacks (Linf).
        clean: Slopes at images of the data set.
        attacked: Slopes where PGD along the target's gradients ends.
        native: None for the reference, and for a runtime without gradients of its own.
        saturated: Share of images whose softmax is one and zeros in float32.
        gap_median: Of the largest logit over the second.
        repeats: Largest difference between answers to the same batch, logits over their range,
            or gradients over theirs.
        batches: Largest difference of logits in batches of other sizes, over their range.
        background: Share of the gradient (L1) on pixels that are the same in all images.
        held: See :class:`Held`.
        planted: See :class:`Planted`.
        data: See :class:`DataFacts`.
    """

    epsilon: Length
    clean: Slopes
    attacked: Slopes
    native: Native | None
    saturated: Fraction
    gap_median: Length
    repeats: Length
    batches: Length
    background: Fraction
    held: Held
    planted: Planted
    data: DataFacts

    def write(self, path: Path, setting: Mapping[str, Any]) -> None:
        """Keep this with everything it depends on, and a digest of both.

        Raises:
            StorageError: The disk is full or not writable.
        """
        write_atomic(path, encode_sealed(_Kept(dict(setting), self)))

    @classmethod
    def read(cls, path: Path, setting: Mapping[str, Any]) -> Diagnostics | None:
        """Read what :meth:`write` wrote; None if there is no file.

        Raises:
            IntegrityError: The file was changed, or is of something else.
        """
        data = read_regular(path)
        if data is None:
            return None
        hint = f"Delete {path} and measure again."
        kept = decode_sealed(data, _Kept, f"The evidence {path.name}", hint)
        if canonical_json(kept.setting) != canonical_json(setting):
            raise IntegrityError(
                f"The evidence {path.name} was changed: it is of another setting than its name "
                "stands for.",
                hint,
            )
        return kept.diagnostics


class _Kept(Record, frozen=True):
    """The file of diagnostics."""

    setting: dict[str, Any]
    diagnostics: Diagnostics
    schema: Literal["ccn-deploy/robustness-diagnostics/1"] = "ccn-deploy/robustness-diagnostics/1"


def diagnostics_path(bundle: Bundle, setting: Mapping[str, Any], target: Target) -> Path:
    """Return where diagnostics are kept, below ``BUNDLE/evidence``.

    Raises:
        IntegrityError: There is a link on the way.
    """
    key = sha256(canonical_json({"schema": SCHEMA, **setting}))[:16]
    return bundle.evidence_file("robustness", str(target), f"diagnostics-{key}.json")
