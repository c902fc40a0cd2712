"""One file from the network: checked before it is written, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ccn_deploy.errors import EnvironmentUnfitError, IntegrityError
from ccn_deploy.storage import write_atomic

TIMEOUT = 30.0
"""Seconds without a byte after which a server counts as gone."""


@dataclass(frozen=True)
class RemoteFile:
    """A published file that never changes.

    Attributes:
        url: Where it is.
        size: In bytes; reading stops beyond it.
        sha256: Of its bytes, lower-case hex.
    """

    url: str
    size: int
    sha256: str

    def read(self) -> bytes:
        """Return the bytes of the file, checked.

        Raises:
            EnvironmentUnfitError: The server cannot be reached or does not have it.
            IntegrityError: It sent something else.
        """
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"not a web address: {self.url}")
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as response:
                data: bytes = response.read(self.size + 1)
        except (OSError, http.client.HTTPException) as error:  # OSError: URLError and HTTPError too
            raise EnvironmentUnfitError(
                f"Could not download {self.url}: {error}.",
                "Check the connection and any proxy, or fetch the file elsewhere and give its "
                "directory with --data-dir.",
            ) from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise IntegrityError(
                f"{self.url} did not send the file expected (SHA-256 differs); nothing was kept.",
                "Try again; if it happens again, fetch the file elsewhere and give its directory "
                "with --data-dir.",
            )
        return data

    def save(self, path: Path) -> None:
        """Download to ``path``.

        Raises:
            EnvironmentUnfitError: As for :meth:`read`, or the disk is full.
            IntegrityError: As for :meth:`read`.
        """
        write_atomic(path, self.read())
