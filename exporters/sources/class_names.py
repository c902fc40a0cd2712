"""Names of classes from a file: text, a JSON list, or a mapping from label to name."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.sources.preprocessing_config import read_json, read_text

LARGEST = 16 << 20
"""Bytes of the largest file that is read."""

HINT = 'Give one name per line, a JSON list, {"0": "cat", ...}, or a config.json with id2label.'


def read_class_names(path: str | os.PathLike[str], classes: int) -> tuple[str, ...]:
    """Read one name per logit.

    Args:
        path: Text with a name per line; or, ending in ``.json``, a list of names, a mapping from
            label to name or from name to label, or Hugging Face's ``config.json``.
        classes: Logits of the network.

    Raises:
        UsageError: It cannot be read, is of no such form, has another number of names, an empty
            one, or one twice.
    """
    if str(path).endswith(".json"):
        names = _from_json(read_json(path, LARGEST), path)
    else:
        names = [line.strip() for line in read_text(path, LARGEST).rstrip().splitlines()]
    if len(names) != classes:
        raise UsageError(
            f"{path} has {len(names)} names and the network {classes} logits.",
            "Give one name per logit, in their order.",
        )
    if not all(names):
        raise UsageError(f"Name {names.index('')} in {path} is empty.", HINT)
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UsageError(
            f"{path} names two classes {twice!r}.", "Tell them apart: data is matched by name."
        )
    return tuple(names)


def _from_json(document: Any, path: str | os.PathLike[str]) -> list[str]:
    if isinstance(document, dict):
        document = document.get("id2label", document)
    if isinstance(document, list) and all(isinstance(name, str) for name in document):
        return [name.strip() for name in document]
    if not isinstance(document, dict):
        raise UsageError(f"{path} holds no class names.", HINT)
    pairs = [
        (key, value) if isinstance(value, str) else (value, key) for key, value in document.items()
    ]
    try:
        by_label = {int(label): name.strip() for label, name in pairs}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no class names.", HINT) from error
    if len(by_label) != len(pairs) or sorted(by_label) != list(range(len(pairs))):
        raise UsageError(f"The labels in {path} are not 0 to {len(pairs) - 1}, each once.", HINT)
    return [by_label[label] for label in range(len(pairs))]
