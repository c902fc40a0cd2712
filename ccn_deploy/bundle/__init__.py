"""A bundle: one directory with weights, graphs, a manifest of digests, and evidence."""

from ccn_deploy.bundle.card import ModelCard, Source
from ccn_deploy.bundle.manifest import MANIFEST, FileRecord, Lineage, Manifest
from ccn_deploy.bundle.preprocessing import Preprocessing, from_images, to_images
from ccn_deploy.bundle.reader import Bundle, open_bundle
from ccn_deploy.bundle.writer import NewFile, write_bundle

__all__ = [
    "MANIFEST",
    "Bundle",
    "FileRecord",
    "Lineage",
    "Manifest",
    "ModelCard",
    "NewFile",
    "Preprocessing",
    "Source",
    "from_images",
    "open_bundle",
    "to_images",
    "write_bundle",
]
