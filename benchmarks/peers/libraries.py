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
    """Import a library; None if it is not installed."""
    if find_spec(name) is None:
        return None
    with _placeholders(*_UNUSED.get(name, ())):
        return importlib.import_module(f"{name}.attacks" if name == "adv_lib" else name)


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
