"""What is to be in a bundle: a new network's files, or those of a bundle that gets more."""

from __future__ import annotations

from ccn_deploy.bundle import Bundle, NewFile
from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.bundle_graphs import OURS, forward_file
from ccn_deploy.exporters.sources.opening import NetworkSource
from ccn_deploy.runs import WEIGHTS
from ccn_deploy.targets import Role


class BundleDraft:
    """The files of a bundle that is being made.

    Attributes:
        card: What is known of the network.
        files: In the order of the manifest.
        added: Paths of those that were not there from the start.
    """

    def __init__(self, source: NetworkSource | Bundle) -> None:
        self.added: list[str] = []
        self.card = source.card
        if isinstance(source, Bundle):
            self.files = [NewFile.copy(source, record) for record in source.manifest.files]
            if self.find(Role.FORWARD, "fp32") is None:
                raise UsageError(
                    f"{source.path} has no float32 forward graph, of which all others are made.",
                    "Export the network again.",
                )
        else:
            self.files = []
            if source.weights:
                self.add(NewFile(WEIGHTS, source.weights, Role.WEIGHTS, made_by=OURS))
            self.add(forward_file(source.forward, tuple(file.path for file in self.files)))

    def find(self, role: Role, precision: str = "", runtime: str = "") -> NewFile | None:
        """Return the first of :meth:`every`, or None."""
        return next(iter(self.every(role, precision, runtime)), None)

    def every(self, role: Role, precision: str = "", runtime: str = "") -> list[NewFile]:
        """Return the files of a role, precision and runtime; of engines there may be several."""
        wanted = (role, precision, runtime)
        return [file for file in self.files if (file.role, file.precision, file.runtime) == wanted]

    def add(self, file: NewFile) -> NewFile:
        """Add a file and return it."""
        self.files.append(file)
        self.added.append(file.path)
        return file

    def free_path(self, stem: str, suffix: str) -> str:
        """Return ``stem + suffix``, or the first of ``stem-2``, ``stem-3``, ... that is free."""
        taken = {file.path for file in self.files}
        path, number = stem + suffix, 1
        while path in taken:
            number += 1
            path = f"{stem}-{number}{suffix}"
        return path
