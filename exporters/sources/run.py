"""The network of a training run, from its architecture, its defense and its weights."""

from __future__ import annotations

from torch import Tensor, nn

from ccn_deploy.bundle.card import ModelCard
from ccn_deploy.errors import IntegrityError, one_line
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.extras import require
from ccn_deploy.graph.graph import Graph
from ccn_deploy.models import Classifier, build_model
from ccn_deploy.runs import TrainedRun


def network_from(card: ModelCard, weights: bytes) -> Classifier:
    """Build a network of the paper around trained weights: float32, in eval mode, frozen.

    Args:
        card: Names its architecture, defense and classes, and the compact layers if chosen.
        weights: Bytes of a safetensors file.

    Raises:
        UsageError: An unknown architecture, defense or layer.
        IntegrityError: No safetensors, or tensors of other names, shapes or types.
    """
    model = build_model(
        card.architecture, card.defense, compact=card.chosen_layers, classes=card.classes
    )
    safetensors = require("safetensors.torch", "train", "to read weights")
    try:
        state: dict[str, Tensor] = safetensors.load(weights)
    except Exception as error:  # its own error, or whatever a damaged header makes it raise
        raise IntegrityError(
            f"The weights are no safetensors file: {one_line(error)}.",
            "Train the run again, or restore the file.",
        ) from error
    _check_fit(model, state, f"{card.architecture} with {card.system}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _check_fit(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Refuse weights of another network, by the first tensor that does not fit."""
    wanted = model.state_dict()
    for key in sorted(wanted.keys() ^ state.keys()):
        what = "lack" if key in wanted else "have a spare"
        raise IntegrityError(
            f"The weights do not fit {name}: they {what} {key!r}.", "Train or export it again."
        )
    for key, tensor in state.items():
        want = wanted[key]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise IntegrityError(
                f"The weights do not fit {name}: {key!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"not {want.dtype} {list(want.shape)}.",
                "Train or export it again.",
            )


def run_network(run: TrainedRun) -> tuple[nn.Module, Graph]:
    """Return the network of a run and its forward graph.

    Networks of this package are lowered by our own walk over their layers; a network of the
    user's own is made by its factory again and exported as any torch module is.

    Raises:
        IntegrityError: The weights do not belong to the network.
        UsageError: The factory is not there any more.
    """
    card = run.card
    if not run.network:
        model = network_from(card, run.weights)
        return model, Graph(lower(model))
    from ccn_deploy.exporters.sources.module import export_module, trained_module

    module = trained_module(run)
    return module, Graph(export_module(module, card.input_shape))
