"""Optional dependencies, imported when they are needed and not before."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from ccn_deploy.errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or say which extra of this package brings it.

    Args:
        module: Name to import, for example ``"torch"``.
        extra: The extra that installs it, for example ``"train"``.
        purpose: What needs it, for the error: ``"to train a network"``.

    Raises:
        MissingExtraError: ``module`` is not installed.
    """
    package = module.partition(".")[0]
    # Foolbox imports GitPython, which raises where there is no git, though nobody asks for it.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, one of its own imports is not
        raise MissingExtraError(
            f"The package {package!r} is needed {purpose} and is not installed.",
            f"Install it with: pip install 'ccn-deploy[{extra}]'",
        ) from error
