"""The reference network of a bundle in PyTorch: what runtimes are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import InputError, IntegrityError, RuntimeUnavailableError
from ccn_deploy.extras import require
from ccn_deploy.models import Classifier, build_model
from ccn_deploy.runtimes.base import (
    LARGEST_BATCH,
    Array,
    Closing,
    RuntimeOptions,
    RuntimeSpec,
    already_closed,
    check_images,
)

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


def load_reference(bundle: Bundle, dtype: torch.dtype = torch.float32) -> Classifier:
    """Return a bundle's network in PyTorch: on the CPU, in eval mode, parameters frozen.

    Args:
        bundle: An open bundle; the weights are parsed from verified bytes.
        dtype: ``torch.float32``, or ``torch.float64`` for the reference.

    Raises:
        IntegrityError: The weights do not fit the architecture.
    """
    manifest = bundle.manifest
    weights = bundle.read(bundle.file("weights"))
    model = network_from(
        manifest.architecture, manifest.defense, len(manifest.class_names), weights
    )
    if dtype == torch.float32:  # on a CPU, attacks run a quarter to a third faster in this layout
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return model.to(dtype)


def network_from(architecture: str, defense: str, classes: int, weights: bytes) -> Classifier:
    """Build a network around trained weights: float32, in eval mode, parameters frozen.

    Args:
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        classes: Number of logits.
        weights: Bytes of a safetensors file.

    Raises:
        IntegrityError: No safetensors, or tensors of other names, shapes or types.
    """
    safetensors = require("safetensors.torch", "train", "to read weights")
    model = build_model(architecture, defense, classes=classes)
    try:
        state: dict[str, Tensor] = safetensors.load(weights)
    except Exception as error:  # its own error, or whatever a damaged header makes it raise
        raise IntegrityError(
            f"The weights are no safetensors file: {' '.join(str(error).split())[:200]}.",
            "Train the run again, or restore the file.",
        ) from error
    _check_fit(model, state)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class TorchRuntime(Closing):
    """A bundle's network in PyTorch, with exact input gradients.

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
        IntegrityError: The weights do not fit the architecture.
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
        self._model: Classifier | None = load_reference(bundle, self._dtype).to(self._device)
        self._spec = RuntimeSpec(
            name=name,
            precision=precision,
            input_shape=bundle.manifest.input_shape,
            classes=len(bundle.manifest.class_names),
            max_batch=self._options.max_batch or LARGEST_BATCH,
            device=str(self._device),
            versions={"torch": torch.__version__},
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
        """Return the output of every layer that acts in deployment, in order of execution.

        Raises:
            InputError: As for :meth:`logits`.
            UsageError: The runtime is closed.
        """
        model = self._network()
        check_images(images, self._spec, check_range=self._options.check_range)
        found = {}
        with self._settings(), torch.inference_mode():
            x = self._tensor(images)
            for name, layer in model.named_layers():
                x = layer(x)
                if not isinstance(layer, nn.Dropout):
                    found[name] = self._array(x)
        return found

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
        if cotangents.ndim != 3 or cotangents.shape[::2] != (len(images), self._spec.classes):
            raise InputError(
                f"Cotangents must have shape [{len(images)}, K, {self._spec.classes}], got "
                f"{list(cotangents.shape)}.",
                "Give K rows of one weight a logit for each image.",
            )
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

    def _network(self) -> Classifier:
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
            wanted, had = self._options.threads, torch.get_num_threads()
            if wanted is not None and wanted != had:
                stack.callback(torch.set_num_threads, had)
                torch.set_num_threads(wanted)
            yield


def _device(name: str, options: RuntimeOptions) -> torch.device:
    if name == "torch":
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


def _check_fit(model: Classifier, state: dict[str, Tensor]) -> None:
    """Refuse weights of another network.

    Raises:
        IntegrityError: Names the first tensor that is missing, spare, or of another form.
    """
    wanted = model.state_dict()
    name = f"{model.architecture.name} with {model.defense.name}"
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
