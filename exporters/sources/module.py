"""A torch module as a forward graph, by way of ``torch.onnx``."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ccn_deploy.errors import IntegrityError, UsageError, first_line, one_line
from ccn_deploy.exporters.sources.module_graph import readable_graph
from ccn_deploy.exporters.sources.module_layers import WRAPPED, traceable, translations
from ccn_deploy.extras import require
from ccn_deploy.factory import load_factory, logits_of
from ccn_deploy.graph.builder import OPSET
from ccn_deploy.graph.signature import BATCH, INPUT, OUTPUT
from ccn_deploy.layers import compactify
from ccn_deploy.runs import TrainedRun

_RELATIVE = 1e-3
"""Allowed difference between an image's logits alone and in a batch, relative to the largest.
Rounding of float32 stays orders below; statistics of a batch are orders above."""


class _Network(nn.Module):
    """The module under a fixed name, so that its own names can be told from torch's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.add_module(WRAPPED, network)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = getattr(self, WRAPPED)(images)
        return result


def export_module(module: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Return the forward graph of a module: ``images`` [batch, C, H, W] to ``logits``.

    The module is exported as it is in evaluation mode, in float32, from a copy: nothing of it
    changes. Compact layers become the nodes of the paper's figure 4
    (:mod:`ccn_deploy.exporters.compact_nodes`); all else is what ``torch.onnx`` makes of it, which
    folds batch normalisation into the convolution before it. Nodes and tensors are named after
    the module's own layers, and the bytes depend on nothing but the module and torch's version.

    Args:
        module: Takes float32 [N, C, H, W] in [0, 1] and returns float [N, classes].
        input_shape: (C, H, W).

    Raises:
        UsageError: The module raises, returns anything else than logits, is random in evaluation,
            lets the images of a batch depend on each other, or cannot be traced.
        MissingExtraError: onnxscript is not installed.
    """
    require("onnxscript", "train", "to export a module")
    network = _copy_of(module)
    with torch.no_grad():
        classes = _check(network, input_shape)
    traceable(network)
    with quiet():
        model = _trace(network, input_shape)
    return readable_graph(
        model,
        network,
        {INPUT: [BATCH, *input_shape]},
        {OUTPUT: [BATCH, classes]},
    )


def input_shape_of(
    module: nn.Module, input_size: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Return the (C, H, W) that a module takes.

    Args:
        module: The channels are those of its first convolution. Where no size is given, the whole
            shape is its ``input_shape``, or ``input_size`` in timm's ``pretrained_cfg``.
        input_size: (height, width).

    Raises:
        UsageError: It cannot be known; the hint says how to give it.
    """
    config = getattr(module, "pretrained_cfg", None)
    known = getattr(module, "input_shape", None)
    if known is None and isinstance(config, dict):
        known = config.get("input_size")
    known = tuple(known) if isinstance(known, Sequence) and len(known) == 3 else None
    if input_size is None and known is not None:
        return known
    if input_size is None:
        raise UsageError(
            "The module does not say which size its images have.", "Give it as --input-size HxW."
        )
    convolutions = (m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
    channels = known[0] if known is not None else next(convolutions, None)
    if channels is None:
        raise UsageError(
            "The module has no convolution that would tell how many channels its images have.",
            "Give the module an attribute input_shape = (channels, height, width).",
        )
    return (channels, *input_size)


def trained_module(run: TrainedRun) -> nn.Module:
    """Return the network of a run whose network is the user's own, with its trained weights.

    Raises:
        UsageError: The factory is not there any more, or makes another network.
        IntegrityError: The weights do not fit it.
    """
    module = load_factory(run.network, classes=run.card.classes)
    compactify(module, run.compact)
    try:
        module.load_state_dict(load(run.weights))
    except (RuntimeError, SafetensorError) as error:
        raise IntegrityError(
            f"The weights of {run.path} do not fit what {run.network} makes now: "
            f"{one_line(error)}.",
            "Bring the factory back to what it was in training, or train again.",
        ) from error
    return module.eval().requires_grad_(False)


def _copy_of(module: nn.Module) -> nn.Module:
    """Return the module in float32 on the CPU, in evaluation mode."""
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"What is to be exported is a {type(module).__name__}, not a torch.nn.Module.",
            "Give a module that takes images and returns logits.",
        )
    try:
        return copy.deepcopy(module).to("cpu", torch.float32).eval()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"The module cannot be copied: {first_line(error)}",
            "Keep no tensors with a history, open files or locks as attributes of a module.",
        ) from error


def _check(network: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Return the number of classes, once the module is known to be a classifier."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, *input_shape, generator=generator)
    logits = logits_of(network, images)
    scale = max(float(logits.abs().max()), 1e-30)
    if not _close(logits_of(network, images), logits, scale):
        raise UsageError(
            "The module is random in evaluation mode: the same images got other logits.",
            "Let its random layers act in training mode only, as torch.nn.Dropout does.",
        )
    for count in (1, 2):
        if not _close(logits_of(network, images[:count]), logits[:count], scale):
            raise UsageError(
                "An image's logits depend on the other images of its batch.",
                "Normalise with running statistics (track_running_stats=True), not the batch's.",
            )
    if torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2]):
        raise UsageError(
            "The module gives every image the same logits.",
            "Load its trained weights: many networks start with zeros in their last layer.",
        )
    return logits.shape[1]


def _close(a: Tensor, b: Tensor, scale: float) -> bool:
    return float((a - b).abs().max()) <= _RELATIVE * scale


def _trace(network: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Run torch's exporter with a symbolic batch."""
    images = (torch.rand(2, *input_shape),)
    try:
        program = torch.onnx.export(
            _captured(_Network(network), images),
            images,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            custom_translation_table=translations(),
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # torch raises errors of a dozen kinds here
        raise UsageError(
            f"torch.onnx cannot export the module: {_reason(error)}",
            "Avoid branches and loops on values of tensors, and sizes of the batch as numbers.",
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _captured(network: nn.Module, images: tuple[Tensor]) -> torch.export.ExportedProgram:
    """Capture a network for every batch.

    Not left to ``torch.onnx``, whose last resort is a graph for the batch that it was shown. Its
    two ways are tried: running the code, and reading it, which alone knows that ``len(x)`` is the
    batch.
    """
    dynamic = ({0: torch.export.Dim(BATCH)},)
    try:
        return torch.export.export(network, images, dynamic_shapes=dynamic, strict=False)
    except Exception:  # as above
        try:
            return torch.export.export(network, images, dynamic_shapes=dynamic, strict=True)
        except Exception:  # the first error says more of the user's code
            pass
        raise


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch's exporter prints, warns and logs to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
