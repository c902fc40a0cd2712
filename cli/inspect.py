"""``ccn-deploy inspect``: what is inside a bundle, and what of it runs here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ccn_deploy.cli.options import BundleArgument, JsonOption
from ccn_deploy.cli.text import line, plain

_INDENT = 13


def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Say what is inside a bundle: files, digests, precisions, and which machines they run on.

    Digests are checked. Nothing in the bundle is parsed, deserialized or run.
    """
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.cli import console
    from ccn_deploy.inventory import inventory
    from ccn_deploy.machine import this_machine

    document = inventory(open_bundle(bundle), this_machine())
    if as_json:
        console.print_json(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    line(f"[bold]{plain(document['bundle'])}[/]: {plain(document['title'])}")
    names = document["class_names"]
    shape = ", ".join(map(str, document["input"]["shape"]))
    _field("input", f"float32 [N, {shape}] in [0, 1]", 0)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    _field("classes", f"{len(names)}: {shown}", 0)
    if document["training"]:
        _field("training", _training(document["training"]), 0)
    for topic, text in document["source"].items():
        _field(topic, text, 0)
    if document["evaluation"]:
        _field("evaluation", _pairs(document["evaluation"]), 0)
    _field("digest", document["digest"], 0)
    line("")
    _print_files(document["files"])
    told: set[str] = set()
    for file in document["files"]:
        _print_file(file, told)
    if document["evidence"]:
        line("\n[bold]evidence[/] (not covered by the digest)")
    for file in document["evidence"]:
        line(f"  {plain(file['path'])}  {file['bytes']:,} bytes")


def _print_files(files: list[dict[str, Any]]) -> None:
    """Print a table whose columns are as wide as what is in them, whatever the terminal."""
    rows = [("file", "role", "precision", "bytes", "sha256")]
    for file in files:
        role = file["role"] + (f":{file['runtime']}" if file["runtime"] else "")
        path, size = plain(file["path"]), f"{file['bytes']:,}"
        rows.append((path, role, file["precision"], size, file["sha256"][:16]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{'>' if at == 3 else '<'}{widths[at]}}" for at, cell in enumerate(row)]
        line("  ".join(cells).rstrip())


def _print_file(file: dict[str, Any], told: set[str]) -> None:
    """Print all that is known of a file; ``told`` holds fixes that need no second telling."""
    line(f"\n[bold]{plain(file['path'])}[/]")
    if file["made_by"]:
        _field("made by", _pairs(file["made_by"]))
    if file["lineage"] is not None:
        lineage = file["lineage"]
        _field(
            "step", ", from ".join(filter(None, (lineage["step"], ", ".join(lineage["sources"]))))
        )
    for key, value in sorted(file["details"].items()):
        for text in _told(key, value):
            _field(key.removeprefix("compute_").replace("_", " "), text)
    for here in file["here"]:
        if here["runs"]:
            _field("runs on", here["runtime"], style="green")
            continue
        _field("not here", f"{here['runtime']}: {here['problem']}", style="yellow")
        if here["fix"] not in told:
            line(" " * (_INDENT + 2) + plain(here["fix"]))
            told.add(here["fix"])


def _field(name: str, text: str, indent: int = 2, style: str = "dim") -> None:
    line(f"{' ' * indent}[{style}]{plain(name).ljust(_INDENT)}[/]{plain(text)}")


def _told(key: str, value: Any) -> list[str]:
    """Return a detail of the manifest as lines; one that has not the known form, as it is."""
    try:
        return _KNOWN.get(key, _plainly)(value)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        return _plainly(value)


def _plainly(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [_pairs(value)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [", ".join(value) or "none"]
    return [value if isinstance(value, str) else json.dumps(value)]


def _pairs(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_plainly(item)[0]}" for key, item in value.items())


def _training(value: Mapping[str, Any]) -> str:
    """Tell the training in a line; all of it is in the JSON document."""
    recipe = value.get("recipe")
    if not isinstance(recipe, Mapping):
        return _pairs(value)
    told = {key: value[key] for key in ("seed", "test_accuracy") if key in value}
    adversary, against = recipe.get("adversary"), ""
    if isinstance(adversary, Mapping):
        against = f"against {adversary.get('kind')} within {adversary.get('epsilon')}, "
    return (
        f"{value.get('dataset')}, recipe {recipe.get('name')}, {recipe.get('epochs')} epochs, "
        f"{against}{_pairs(told)}"
    )


def _ops(value: Mapping[str, int]) -> list[str]:
    return [", ".join(f"{count} {op}" for op, count in value.items())]


def _layers(value: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Group the layers by what computes them: one line for each way."""
    groups: dict[str, list[str]] = {}
    for layer, parts in value.items():
        way = parts["compute"] + (f", norm in {parts['norm']}" if "norm" in parts else "")
        groups.setdefault(way, []).append(layer)
    return [f"{way}: {', '.join(layers)}" for way, layers in groups.items()]


def _numeric(value: Mapping[str, Any]) -> list[str]:
    """Tell the extremes over all compact layers, and every warning."""
    layers = value["layers"]
    if not layers:
        return ["no compact layers"]
    largest = max(layers, key=lambda layer: layer["largest_sum"])
    smallest = min(layers, key=lambda layer: layer["smallest_sum"])
    divisor = min(layers, key=lambda layer: layer["smallest_divisor"])
    return [
        f"{value['images']} images; sums of squares from {smallest['smallest_sum']:.2g} "
        f"({smallest['layer']}) to {largest['largest_sum']:.3g} ({largest['layer']}, "
        f"{largest['headroom']:.3g} times below fp16's largest); smallest denominator "
        f"{divisor['smallest_divisor']:.2g} ({divisor['layer']})",
        *value["warnings"],
    ]


def _profiles(value: list[Mapping[str, Mapping[str, list[int]]]]) -> list[str]:
    return [
        "; ".join(
            f"{name} {sizes['min']} to {sizes['max']}, best at {sizes['opt']}"
            for name, sizes in profile.items()
        )
        for profile in value
    ]


_KNOWN: dict[str, Callable[[Any], list[str]]] = {
    "layers": _layers,
    "log": lambda value: [str(text) for text in value] or ["empty"],
    "numeric": _numeric,
    "ops": _ops,
    "profiles": _profiles,
}
