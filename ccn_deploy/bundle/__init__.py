"""A bundle: one directory with weights, graphs, a manifest of digests, and evidence."""

from ccn_deploy.bundle.manifest import MANIFEST, FileRecord, Manifest
from ccn_deploy.bundle.reader import Bundle, open_bundle
from ccn_deploy.bundle.writer import NewFile, write_bundle

__all__ = [
    "MANIFEST",
    "Bundle",
    "FileRecord",
    "Manifest",
    "NewFile",
    "open_bundle",
    "write_bundle",
]
