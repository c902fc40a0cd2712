"""The reference network of a bundle in PyTorch: what runtimes are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.errors import GraphError, IntegrityError, RuntimeUnavailableError
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.reader import read_graph
from ccn_deploy.runtimes.base import (
    LARGEST_BATCH,
    Array,
    Closing,
    RuntimeOptions,
    RuntimeSpec,
    already_closed,
    check_cotangent_shape,
    check_images,
)
from ccn_deploy.targets import RUNTIMES, Role, Target

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads of the CPU in a block; None for as many as it does."""
    before = torch.get_num_threads()
    changed = count is not None and count != before
    if count is not None and changed:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if changed:
            torch.set_num_threads(before)


def load_reference(bundle: Bundle, dtype: torch.dtype = torch.float32) -> GraphModule:
    """Return the reference network of a bundle: its float32 forward graph, evaluated in PyTorch.

    It is on the CPU, in eval mode, and its constants are buffers, so nothing is trainable.

    Args:
        bundle: An open bundle; the graph is parsed from verified bytes.
        dtype: ``torch.float32``, or ``torch.float64`` for the exact reference.

    Raises:
        IntegrityError: The graph is damaged, or has what no exporter of this package writes.
        RuntimeUnavailableError: The bundle has no float32 forward graph.
    """
    return GraphModule(forward_graph(bundle), dtype).eval()


def forward_graph(bundle: Bundle) -> Graph:
    """Read the float32 forward graph of a bundle: what every other graph of it is derived from.

    Raises:
        IntegrityError: The graph is damaged, or has what no exporter of this package writes.
        RuntimeUnavailableError: The bundle has no float32 forward graph.
    """
    return _read(bundle, bundle.file(Role.FORWARD, "fp32"))


def check_programs(bundle: Bundle, target: Target) -> None:
    """Read the graphs that a target executes, or that its engines are built from.

    What they compute is then a function of the images: no operator in them draws random numbers or
    is unknown here. No number of measurements would show that.

    Raises:
        IntegrityError: A graph holds what no exporter of this package writes; names the node.
    """
    precision = "fp32" if target.is_reference else target.precision
    for role in (Role.FORWARD, Role.GRADIENT):
        for runtime in ("", target.runtime):
            for record in bundle.files(role, precision, runtime):
                _read(bundle, record)


def _read(bundle: Bundle, record: FileRecord) -> Graph:
    try:
        return read_graph(bundle.read(record), record.path)
    except GraphError as error:
        raise IntegrityError(
            error.what, "Export the bundle again; nothing in it was used."
        ) from error


class TorchRuntime(Closing):
    """The float32 forward graph of a bundle in PyTorch, with exact input gradients.

    Several threads may call at once. ``options.threads`` is set around each call and then put
    back; PyTorch keeps that number for the whole process, so calls that overlap may run with one
    another's. TF32 is off.

    Args:
        bundle: An open bundle.
        name: ``"torch"`` for the CPU, ``"torch-cuda"`` for a GPU.
        precision: ``"fp32"`` or ``"fp64"``.
        options: Threads, device, batch limit, range check.

    Raises:
        RuntimeUnavailableError: No such GPU here, or no such precision.
        IntegrityError: The forward graph is damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        name: str = "torch",
        precision: str = "fp32",
        options: RuntimeOptions | None = None,
    ) -> None:
        self._options = options or RuntimeOptions()
        if precision not in PRECISIONS:
            raise RuntimeUnavailableError(
                f"The runtime {name} does not compute in {precision}.",
                f"It has: {', '.join(PRECISIONS)}.",
            )
        self._dtype = PRECISIONS[precision]
        self._device = _device(name, self._options)
        self._model: GraphModule | None = load_reference(bundle, self._dtype).to(self._device)
        self._spec = RuntimeSpec(
            name=name,
            precision=precision,
            input_shape=bundle.card.input_shape,
            classes=bundle.card.classes,
            max_batch=self._options.max_batch or LARGEST_BATCH,
            device=str(self._device),
            versions={"torch": str(torch.__version__)},
            thread_safe=True,
        )

    @property
    def spec(self) -> RuntimeSpec:
        """What this runtime is and takes."""
        return self._spec

    @property
    def differentiable(self) -> bool:
        """True: gradients come from autograd."""
        return True

    def logits(self, images: Array) -> Array:
        """Return [N, classes] in this runtime's precision for float32 images [N, C, H, W].

        Raises:
            InputError: Wrong shape or dtype, a NaN, or a value outside [0, 1].
            UsageError: The runtime is closed.
        """
        model = self._network()
        check_images(images, self._spec, check_range=self._options.check_range)
        with self._settings(), torch.inference_mode():
            pieces = [self._array(model(self._tensor(piece))) for piece in self._split(images)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def activations(self, images: Array) -> dict[str, Array]:
        """Return the output of every layer, in order of execution, the logits last.

        Raises:
            InputError: As for :meth:`logits`.
            UsageError: The runtime is closed.
        """
        model = self._network()
        check_images(images, self._spec, check_range=self._options.check_range)
        layers = layer_outputs(model.graph)
        with self._settings(), torch.inference_mode():
            values = model.values(self._tensor(images), set(layers.values()))
            return {name: self._array(values[tensor]) for name, tensor in layers.items()}

    def vjp(self, images: Array, cotangents: Array) -> tuple[Array, Array]:
        """Return logits [N, classes] and K input gradients an image [N, K, C, H, W].

        The forward is computed once; each of the K gradients is one backward over the same graph,
        which on the CPU is faster than all of them in one vectorised backward.

        Args:
            images: float32 [N, C, H, W].
            cotangents: [N, K, classes]; see :meth:`ccn_deploy.runtimes.base.Runtime.vjp`.

        Raises:
            InputError: Images as for :meth:`logits`, or cotangents of another shape.
            UsageError: The runtime is closed.
        """
        model = self._network()
        check_images(images, self._spec, check_range=self._options.check_range)
        check_cotangent_shape(cotangents, len(images), self._spec)
        logits, gradients = [], []
        with self._settings(), torch.enable_grad():
            for x, c in zip(self._split(images), self._split(cotangents), strict=True):
                leaf = self._tensor(x).requires_grad_(True)
                out = model(leaf)
                rows = self._tensor(c).unbind(1)
                found = [torch.autograd.grad(out, leaf, row, retain_graph=True)[0] for row in rows]
                stacked = (
                    torch.stack(found, 1) if found else leaf.new_empty(len(x), 0, *x.shape[1:])
                )
                logits.append(self._array(out.detach()))
                gradients.append(self._array(stacked))
        return np.concatenate(logits), np.concatenate(gradients)

    def close(self) -> None:
        """Release the network. Calling twice is harmless."""
        self._model = None

    def _network(self) -> GraphModule:
        model = self._model
        if model is None:
            raise already_closed(self._spec.name)
        return model

    def _split(self, array: Array) -> list[Array]:
        """Cut a batch into pieces that run at once; an empty batch is one empty piece."""
        size = self._spec.max_batch
        return [array[at : at + size] for at in range(0, max(len(array), 1), size)]

    def _tensor(self, array: Array) -> Tensor:
        # A read-only array would be shared with a tensor that could write into it; torch warns.
        ready = array if array.flags.writeable else array.copy()
        return torch.from_numpy(np.ascontiguousarray(ready)).to(self._device, self._dtype)

    def _array(self, tensor: Tensor) -> Array:
        array: Array = tensor.cpu().numpy()
        return array

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Hold this process's settings to what was asked for, then put them back."""
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            stack.enter_context(torch_threads(self._options.threads))
            yield


def _device(name: str, options: RuntimeOptions) -> torch.device:
    if not RUNTIMES[name].on_gpu:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device >= count:
        raise RuntimeUnavailableError(
            f"PyTorch {torch.__version__} sees {count} GPUs here; device {options.device} is not "
            "one of them.",
            "Install PyTorch with CUDA on a machine with an NVIDIA GPU, or use --runtime torch "
            "for the CPU.",
        )
    return torch.device("cuda", options.device)
