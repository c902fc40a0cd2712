"""A user's own network: a factory named on the command line, and weights for it from a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, load, nn

from ccn_deploy.errors import UsageError, first_line

_FORM = "Give package.module:factory or path/to/file.py:factory."
_CLASSES = ("classes", "num_classes")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIX = "module."
_SHOWN = 3


def load_factory(name: str, *, classes: int | None = None) -> nn.Module:
    """Call a factory and return the module that it makes.

    The file or package is imported, so its code runs. A file's own directory is searched for
    what it imports, as if Python ran it.

    Args:
        name: ``"package.module:factory"`` or ``"path/to/file.py:factory"``. The factory is a
            function or class that can be called without arguments, or is a module already.
        classes: Given to a factory that takes ``classes`` or ``num_classes``.

    Raises:
        UsageError: Nothing there, an import or the factory raises, or it returns no module.
    """
    factory = _find(name)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(
            f"{name} is a {type(factory).__name__}, which cannot be called.",
            "Name a function or class that returns a torch.nn.Module.",
        )
    arguments = _arguments(factory, classes)
    try:
        made = factory(**arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UsageError(
            f"The factory {name} raises when called with ({given}): {first_line(error)}",
            "It must work without arguments (classes or num_classes is given where it takes it).",
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"The factory {name} returns a {type(made).__name__}, not a torch.nn.Module.",
            "Let it return the network.",
        )
    return made


def _find(name: str) -> Any:
    """Import what comes before the colon and return the attribute after it."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"{name!r} names no factory.", _FORM)
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UsageError(f"There is no file {place}.", _FORM)
    try:
        module = _import_file(Path(place)) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        hint = _FORM if not is_file else "Install what the file imports."
        own = Path(*place.split(".")).with_suffix(".py")
        if error.name == place.partition(".")[0] and own.is_file():
            # An installed command does not search the directory that it is started in.
            hint = f"Give the file: {own}:{attribute}"
        raise UsageError(f"{place} cannot be imported: {first_line(error)}", hint) from error
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UsageError(
            f"{place} raises when it is imported: {first_line(error)}",
            f'See where with: python -c "import runpy; runpy.run_path({place!r})"'
            if is_file
            else f'See where with: python -c "import {place}"',
        ) from error
    found: Any = module
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UsageError(f"{place} has no {attribute!r}.", _names_in(module)) from error
    return found


def _import_file(path: Path) -> Any:
    """Import a file under its own name, with its directory searched first."""
    path = path.resolve()
    loaded = sys.modules.get(path.stem)
    if getattr(loaded, "__file__", None) == str(path):
        return loaded
    # Not under its bare name where another module has that: that one must stay importable.
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_as_factory"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes defined in it can then be pickled
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def _names_in(module: Any) -> str:
    """Return a hint with the functions and classes that a module defines itself."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return f"It has: {', '.join(own)}." if own else _FORM


def _arguments(factory: Callable[..., Any], classes: int | None) -> dict[str, int]:
    """Return the number of classes under the name that the factory has for it."""
    if classes is None:
        return {}
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    return {name: classes for name in _CLASSES if name in parameters}


def load_weights(module: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Load a file of weights into a module, in place, every one of them and nothing else.

    A ``.pth`` or ``.pt`` file is read by ``torch.load(weights_only=True)``: nothing in it is
    executed. A state dict inside ``{"state_dict": ...}`` or ``{"model": ...}`` is taken out, and a
    prefix ``module.`` that every name has (from ``DataParallel``) is removed.

    Args:
        module: Its state dict must have the same names and shapes.
        path: A ``.safetensors``, ``.pth`` or ``.pt`` file.

    Returns:
        What was done to the names, one sentence each; often nothing.

    Raises:
        UsageError: No such file, another format, a file that needs unpickling, or weights that do
            not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"There is no file {file}.", "Give a .safetensors, .pth or .pt file.")
    changes: list[str] = []
    weights = _read(file)
    for key in _WRAPPERS:
        inner = weights.get(key)
        if isinstance(inner, Mapping):
            weights = inner
            changes.append(f"The weights were taken from the entry {key!r} of {file.name}.")
            break
    if weights and all(isinstance(n, str) and n.startswith(_PREFIX) for n in weights):
        expected = module.state_dict()
        if not all(name.startswith(_PREFIX) for name in expected):
            weights = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
            changes.append(f"The prefix {_PREFIX!r} was removed from every name.")
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        what = f"{others[0]!r} is no tensor" if others else "it is empty"
        raise UsageError(
            f"{file} holds no state dict: {what}.",
            "Save it with: torch.save(model.state_dict(), FILE)",
        )
    _check_fit(module, weights, file)
    module.load_state_dict({**module.state_dict(), **weights})
    return tuple(changes)


def _read(file: Path) -> Mapping[str, Any]:
    """Read a file without executing anything in it."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(
                f"{file} is no safetensors file: {first_line(error)}",
                "Give the file that the weights were saved to.",
            ) from error
    if file.suffix not in (".pth", ".pt"):
        raise UsageError(f"{file} is of no known format.", "Give a .safetensors, .pth or .pt file.")
    try:
        weights = load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors, zip's and torch's own
        raise UsageError(
            f"{file} cannot be read without running code that is in it, or is damaged.",
            "Convert it where you trust it: torch.save(torch.load(FILE, weights_only=False)"
            '.state_dict(), "weights.pth"), without .state_dict() if it holds a dict.',
        ) from error
    if not isinstance(weights, Mapping):
        raise UsageError(
            f"{file} holds a {type(weights).__name__}, not a state dict.",
            "Save one with: torch.save(model.state_dict(), FILE)",
        )
    return weights


def _check_fit(module: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Refuse weights with other names or shapes, naming the first of each kind."""
    expected = module.state_dict()
    # Files older than torch 0.4.1 lack this counter, and torch itself does without.
    missing = [n for n in expected if n not in weights and not n.endswith(".num_batches_tracked")]
    spare = [name for name in weights if name not in expected]
    other = [
        f"{name} {list(weights[name].shape)} for {list(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for names, what in ((missing, "missing"), (spare, "spare"), (other, "of another shape"))
        if names
    ]
    if parts:
        raise UsageError(
            f"The weights in {file} do not fit the module ({'; '.join(parts)}).",
            "Give the weights of this very network, and its factory the same settings.",
        )


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return what a module makes of images, if that is logits.

    Args:
        network: As it is to be called: in evaluation mode, or not.
        images: float32 [N, C, H, W] in [0, 1].

    Raises:
        UsageError: It raises, or returns anything but finite logits [N, classes].
    """
    shape = list(images.shape)
    try:
        logits = network(images.clone())
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"The module raises on images of shape {shape}: {first_line(error)}",
            "It must take float32 images [N, C, H, W] in [0, 1], with any N.",
        ) from error
    hint = "Let it return one tensor of logits [N, classes]; a small wrapper module can pick it."
    if not isinstance(logits, Tensor):
        raise UsageError(f"The module returns a {type(logits).__name__}, not a tensor.", hint)
    if not logits.is_floating_point():
        raise UsageError(f"The module returns {logits.dtype}, not floating-point logits.", hint)
    if logits.dim() != 2 or len(logits) != len(images):
        raise UsageError(
            f"The module returns shape {list(logits.shape)} for images of shape {shape}.", hint
        )
    if not bool(logits.isfinite().all()):
        raise UsageError(
            "The module returns logits that are no numbers for images in [0, 1].",
            "Check its weights and what it divides by.",
        )
    return logits
