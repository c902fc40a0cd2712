"""The state of a training between two epochs, in one safetensors file.

The file holds the weights (``weights.*``), SGD's momentum (``momentum.*``) and, as metadata, the
epochs done with their metrics and a digest of everything. It is replaced whole after every epoch.
No state of a random generator is kept, because none is carried from one epoch to the next: every
epoch seeds its generators from (seed, epoch, process).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ccn_deploy.errors import IntegrityError
from ccn_deploy.records import LARGEST, Record, decode_line, encode_line
from ccn_deploy.storage import write_atomic
from ccn_deploy.trainers.events import EpochEnded

_HEADER_LENGTH = 8
_ANEW = "Start the run anew with --overwrite."


class _History(Record, frozen=True):
    """The metrics of every epoch done."""

    epochs: tuple[EpochEnded, ...]


class _Header(msgspec.Struct):
    """What a safetensors file says in front of its tensors, as far as it is ours."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__")


@dataclass(frozen=True)
class Checkpoint:
    """The state after some whole epochs.

    Attributes:
        weights: Every entry of the model's state dict, on the CPU.
        momentum: SGD's buffer of every parameter, by the same names.
        epochs: The metrics of every epoch done; their number is the number of epochs done.
    """

    weights: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    epochs: Sequence[EpochEnded]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at ``path``, whole or not at all.

    Raises:
        StorageError: The disk is full or not writable; the file is as it was.
    """
    tensors = {
        f"{kind}.{name}": tensor
        for kind, group in (("weights", checkpoint.weights), ("momentum", checkpoint.momentum))
        for name, tensor in detached(group).items()
    }
    epochs = encode_line(_History(tuple(checkpoint.epochs))).decode()
    metadata = {"epochs": epochs, "sha256": _digest(tensors, epochs)}
    write_atomic(path, save(tensors, metadata=metadata))


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, each with memory of its own, as the file format wants them."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def load_checkpoint(path: Path) -> Checkpoint | None:
    """Read the file at ``path``; None if there is none.

    Raises:
        IntegrityError: The file is not what was written.
    """
    if not path.is_file():
        return None
    data, what = path.read_bytes(), f"The checkpoint {path}"
    try:
        tensors = load(data)
        length = int.from_bytes(data[:_HEADER_LENGTH], "little")
        header = data[_HEADER_LENGTH : _HEADER_LENGTH + length]
        metadata = msgspec.json.decode(header, type=_Header).metadata
        epochs = metadata["epochs"]
        if metadata["sha256"] != _digest(tensors, epochs):
            raise ValueError("its digest differs")
    except (SafetensorError, ValueError, KeyError) as error:
        raise IntegrityError(f"{what} is damaged: {error}.", _ANEW) from error
    history = decode_line(epochs.encode(), _History, what, _ANEW, limit=LARGEST)
    return Checkpoint(_part(tensors, "weights."), _part(tensors, "momentum."), history.epochs)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], epochs: str) -> str:
    digest = hashlib.sha256(epochs.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
