"""Evidence about a bundle that cannot be written to."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ccn_deploy.bundle import MANIFEST, Bundle, open_bundle


@dataclass(frozen=True)
class TemporaryCopy:
    """A bundle, with the evidence it has, in a directory that lasts as long as this object."""

    bundle: Bundle
    _directory: tempfile.TemporaryDirectory[str] = field(repr=False)

    @classmethod
    def of(cls, bundle: Bundle) -> TemporaryCopy:
        """Copy a bundle; the copy is checked like any other when it is opened."""
        directory = tempfile.TemporaryDirectory(prefix="ccn-deploy-")
        root = Path(directory.name) / "bundle"
        names = [MANIFEST, *(record.path for record in bundle.manifest.files)]
        if bundle.evidence.is_dir():
            found = (file for file in bundle.evidence.rglob("*") if file.is_file())
            names += [file.relative_to(bundle.path).as_posix() for file in found]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, root / name)
        return cls(open_bundle(root), directory)


def writable(directory: Path) -> bool:
    """Whether a file can be made there, found out by making one."""
    try:
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
