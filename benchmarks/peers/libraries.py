"""Importing libraries that pin other versions of what is here, or need what cannot be had."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

PACKAGES = {
    "foolbox": "foolbox",
    "art": "adversarial-robustness-toolbox",
    "torchattacks": "torchattacks",
    "adv_lib": "adv-lib",
}
"""The package that has each module."""

_UNUSED = {"adv_lib": ("torchvision", "torchvision.models", "visdom")}
"""What a library imports as a whole and none of the attacks that are measured here uses: a
perceptual distance and a plotter. torchvision must be of torch's own build, which the index of the
CPU builds may not have; visdom is a server."""


def library(name: str) -> ModuleType | None:
    """Import a module of a library; None if that is not installed."""
    package = name.partition(".")[0]
    if find_spec(package) is None:
        return None
    with _placeholders(*_UNUSED.get(package, ())):
        return importlib.import_module(name)


@contextmanager
def _placeholders(*names: str) -> Iterator[None]:
    """Put empty modules in the places of those that are not installed, for one import."""
    missing = [name for name in names if find_spec(name.partition(".")[0]) is None]
    modules = {name: ModuleType(name) for name in missing}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
