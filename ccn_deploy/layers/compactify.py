"""Make any torch module compact: its convolutions and linear layers are replaced in place.

The paper (section 4): compact convolution "can be seamlessly integrated into any existing deep
network architecture".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator

from torch import nn

from ccn_deploy.errors import UsageError
from ccn_deploy.layers.compact import CompactConv2d, CompactLinear

Plain = nn.Conv2d | nn.Linear
Where = str | Collection[str] | Callable[[str, Plain], bool]
"""Which layers: ``"all"``, ``"last"``, ``"none"``, their names, or a function of name and layer."""

_REPLACEABLE = (nn.Conv2d, nn.Linear)
"""Exact types: a subclass may compute something else."""

_NAMES_SHOWN = 5


def compactify(module: nn.Module, where: Where = "all") -> list[str]:
    """Replace convolutions and linear layers of a module by compact ones, in place.

    Only layers whose type is exactly :class:`torch.nn.Conv2d` or :class:`torch.nn.Linear` are
    replaced, as a subclass may compute something else; :func:`left_plain` names what stays. A
    compact layer keeps the very same parameters, and the device, dtype and training mode; its
    alpha is 1 (trainable if the weight is) and its delta the paper's. A layer that has several
    names in the module stays one layer and is replaced under all of them.

    A module that reads the weights of its layers and never calls them is not changed by this; of
    torch's own, the fused path of :class:`torch.nn.TransformerEncoderLayer` does so and is
    switched off.

    Args:
        module: Any module; its parameters may already be held by an optimizer.
        where: ``"all"``; ``"last"``, the one that was registered last, usually the classifier;
            ``"none"``; names as in ``module.named_modules()``; or a function that is given the
            name and the layer and returns whether to replace it.

    Returns:
        The names of the layers that were replaced, in the order of ``named_modules()``.

    Raises:
        UsageError: A name that is none, or of a layer that cannot be replaced; nothing to
            replace with ``"all"`` or ``"last"``; or a layer with hooks, which would be lost. The
            module is then as it was.
    """
    candidates = dict(_candidates(module))
    names = _chosen(module, candidates, where)
    chosen = {id(candidates[name]) for name in names}
    names = [name for name, layer in candidates.items() if id(layer) in chosen]
    for name in names:
        _check(name, candidates[name])
    made: dict[int, nn.Module] = {}
    for name in names:
        layer = candidates[name]
        if id(layer) not in made:
            made[id(layer)] = _compact(layer)
        owner, _, child = name.rpartition(".")
        setattr(module.get_submodule(owner), child, made[id(layer)])
    if names:
        _switch_off_fused_paths(module)
    return names


def left_plain(module: nn.Module) -> list[str]:
    """Return the layers with weights that are not compact, each as ``name (Type)``.

    What counts are convolutions of any kind, linear layers and attention, subclasses included.
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
    return [
        f"{name or 'the module itself'} ({type(layer).__name__})"
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and not isinstance(layer, CompactConv2d | CompactLinear)
    ]


def _candidates(module: nn.Module) -> Iterator[tuple[str, Plain]]:
    """Yield every layer that can be replaced under each of its names."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if name and isinstance(layer, _REPLACEABLE) and type(layer) in _REPLACEABLE:
            yield name, layer


def _chosen(module: nn.Module, candidates: dict[str, Plain], where: Where) -> list[str]:
    """Return the names that are meant."""
    if callable(where):
        return [name for name, layer in candidates.items() if where(name, layer)]
    if isinstance(where, str):
        if where == "none":
            return []
        if where not in ("all", "last"):
            raise UsageError(
                f"Unknown choice of layers {where!r}.",
                "Give 'all', 'last', 'none', a list of names, or a function of name and layer.",
            )
        if not candidates:
            raise UsageError(
                f"{type(module).__name__} has no layer that can be made compact.",
                "Its layers must be torch.nn.Conv2d or torch.nn.Linear, not subclasses of them.",
            )
        return list(candidates) if where == "all" else list(candidates)[-1:]
    for name in where:
        if name not in candidates:
            raise _no_candidate(module, candidates, name)
    return list(where)


def _no_candidate(module: nn.Module, candidates: dict[str, Plain], name: str) -> UsageError:
    """Build the error for a name that cannot be replaced."""
    layer = dict(module.named_modules(remove_duplicate=False)).get(name)
    if layer is not None:
        return UsageError(
            f"The layer {name!r} is a {type(layer).__name__} and cannot be made compact.",
            "Only layers of exactly the types torch.nn.Conv2d and torch.nn.Linear can.",
        )
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}?"
    else:
        some = ", ".join(list(candidates)[:_NAMES_SHOWN])
        more = ", ..." if len(candidates) > _NAMES_SHOWN else ""
        hint = f"There are {len(candidates)} such layers: {some}{more}."
    return UsageError(f"{type(module).__name__} has no layer {name!r}.", hint)


def _compact(layer: Plain) -> nn.Module:
    return CompactConv2d.of(layer) if isinstance(layer, nn.Conv2d) else CompactLinear.of(layer)


def _check(name: str, layer: Plain) -> None:
    """Refuse a layer of which a replacement would lose something."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    if any(hooks) or "weight" not in layer._parameters:
        raise UsageError(
            f"The layer {name!r} has hooks (such as weight_norm's), which a compact one would "
            f"not have.",
            "Remove them first, or leave this layer out.",
        )


def _switch_off_fused_paths(module: nn.Module) -> None:
    """Make transformer layers call their parts in evaluation too, as they do in training."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            # One of the conditions that torch puts on its fused path; no part of the layer's maths.
            layer.activation_relu_or_gelu = 0
