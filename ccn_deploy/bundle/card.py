"""The model card: what a bundle, a run and an export say of their network."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ccn_deploy.bundle.preprocessing import Preprocessing
from ccn_deploy.errors import UsageError
from ccn_deploy.records import Digest, Record, Text


class Source(Record, frozen=True, kw_only=True):
    """Where a network came from, and what of it was taken into the forward graph.

    Attributes:
        kind: ``"run"`` (a network of this package), ``"module"`` (a torch module) or ``"onnx"``.
        name: Of the run, the factory or the file.
        sha256: Of the weights or of the ONNX file.
        removed: Operators that were taken away, for example ``("Softmax",)``.
        changes: What else was changed, one sentence each.
        preprocessing: What the source takes, which the graph does to images in [0, 1].
        agreement: Figures by name of how far the source and the forward graph differ.
    """

    kind: Literal["run", "module", "onnx"]
    name: Text = ""
    sha256: Digest
    removed: tuple[Text, ...] = ()
    changes: tuple[Text, ...] = ()
    preprocessing: Preprocessing = Preprocessing()
    agreement: dict[str, float] = msgspec.field(default_factory=dict)

    def told(self) -> dict[str, str]:
        """Return what a person should check, by topic: where it came from and what was taken in."""
        said = {"source": f"{self.kind} {self.name}".strip()}
        if self.kind != "run":
            said["source takes"] = str(self.preprocessing)
        if self.removed:
            said["removed"] = f"{', '.join(self.removed)} at the end: logits are the contract"
        if self.changes:
            said["changed"] = " ".join(self.changes)
        if self.agreement:
            figures = (f"{name} {value:.3g}" for name, value in self.agreement.items())
            said["agreement"] = ", ".join(figures)
        return said


class ModelCard(Record, frozen=True, kw_only=True):
    """What is known of a network.

    Attributes:
        name: For people.
        input_shape: (channels, height, width); images are NCHW float32 in [0, 1].
        class_names: One per logit.
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`; empty if it is
            none of ours.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`; empty if it is none of ours.
        compact: Names of the layers that are compact, where they were chosen instead of those
            that the defense says; unset otherwise.
        training: How the weights came about: data set, recipe, seed, epochs, accuracy; may be
            empty.
        evaluation: How the owner of the network makes evaluation images: resize, crop,
            interpolation; empty where nothing is known.
        source: Where the network came from.

    Raises:
        UsageError: A size below one, no class, a class named twice, or a preprocessing that
            images of this shape cannot have.
    """

    name: Text
    input_shape: tuple[int, int, int]
    class_names: tuple[Text, ...]
    architecture: Text = ""
    defense: Text = ""
    # Unset and not None: a card that needs no such word has the bytes that it always had.
    compact: tuple[Text, ...] | msgspec.UnsetType = msgspec.UNSET
    training: dict[str, Any] = msgspec.field(default_factory=dict)
    evaluation: dict[str, Any] = msgspec.field(default_factory=dict)
    source: Source

    def __post_init__(self) -> None:
        if any(not 1 <= size < 1 << 16 for size in self.input_shape):
            raise UsageError(
                f"Images of shape {list(self.input_shape)} are none.",
                "Sizes are [channels, height, width], from 1 to 65535.",
            )
        if not self.class_names:
            raise UsageError("A classifier needs a class.", "Give one name per logit.")
        twice = [name for name in self.class_names if self.class_names.count(name) > 1]
        if twice:
            raise UsageError(
                f"Two classes are named {twice[0]!r}.", "Give every logit a name of its own."
            )
        self.source.preprocessing.check(self.input_shape[0])

    @property
    def title(self) -> str:
        """What headings call it: for networks of the paper, system and architecture."""
        return f"{self.system} on {self.architecture}" if self.architecture else self.name

    @property
    def system(self) -> str:
        """The defense, and the compact layers where they were chosen: ``sm-compact-conv1``."""
        if self.chosen_layers is None:
            return self.defense
        return f"{self.defense}-compact-{'-'.join(self.chosen_layers) or 'none'}"

    @property
    def chosen_layers(self) -> tuple[str, ...] | None:
        """The compact layers where they were chosen; None where the defense says which."""
        return None if isinstance(self.compact, msgspec.UnsetType) else self.compact

    @property
    def classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)
