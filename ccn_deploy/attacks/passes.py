"""Forward passes whose input gradients can be asked for, by the batch and in one call.

An attack asks for logits, decides which images go on and along which logits, and asks for the
gradients of those. A model over a runtime with gradients of its own answers without autograd; any
other Foolbox model over torch answers by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from eagerpy.astensor import astensor, astensor_
from foolbox.attacks.base import get_criterion
from foolbox.criteria import Misclassification
from foolbox.models.base import Model
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.errors import RuntimeUnavailableError
from ccn_deploy.runtimes.base import LossGradient, Runtime


class Pass(Protocol):
    """One forward pass at images [N, C, H, W], begun by :func:`forward`."""

    @property
    def logits(self) -> Tensor:
        """Logits [N, classes] of all images, outside of any graph."""
        ...

    def gradients(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """Return input gradients [n, K, C, H, W] of some of the images.

        Args:
            rows: Their places, int64 [n].
            cotangents: [n, K, classes]; row k asks for the gradient of
                ``sum_j cotangents[n, k, j] * logits[rows[n], j]``.

        NaN stands for the gradient of logits that are not finite.
        """
        ...

    def loss_gradient(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return where the cross-entropy rises: its input gradients [n, C, H, W].

        It is the last thing that a pass is asked for.

        Args:
            rows: As for :meth:`gradients`.
            labels: Theirs, int64 [n].
        """
        ...


def slope(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient [N, classes] of each cross-entropy with respect to the logits.

    The label's part is the sum of the other probabilities, not its own less one: where a network
    is sure, that difference is rounding, and the step would go anywhere.

    Args:
        logits: [N, classes].
        labels: int64 [N].
    """
    rows = torch.arange(len(labels), device=labels.device)
    found = torch.log_softmax(logits, dim=-1).exp()
    found[rows, labels] = 0.0
    found[rows, labels] = -found.sum(dim=-1)
    return found


def labels_of(criterion: Any, attack: str) -> Tensor:
    """Return the labels int64 [N] that an untargeted attack is to leave.

    Args:
        criterion: ``Misclassification``, or labels.
        attack: Begins the error.
    """
    criterion = get_criterion(criterion)
    if not isinstance(criterion, Misclassification):
        raise ValueError(f"{attack} is untargeted and cannot serve {criterion!r}")
    labels: Tensor = criterion.labels.raw
    return labels


def tensor_of(inputs: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return what an attack was given as a tensor, and what gives a tensor back in the same form.

    Raises:
        RuntimeUnavailableError: Not torch, so there are no gradients. Foolbox attacks such models
            all the same, and has been seen to report black images as success.
    """
    x, restore = astensor_(inputs)
    if not isinstance(x.raw, Tensor):
        raise _no_gradients("An array that is no torch tensor")
    return x.raw, lambda result: restore(astensor(result))


def forward(
    model: Model,
    images: Tensor,
    places: Tensor | None = None,
    *,
    labels: Tensor | None = None,
) -> Pass:
    """Begin a pass at ``images`` [N, C, H, W]: the model's own way if it has one, else autograd.

    Every forward and backward pass of our attacks begins here, but those of attacks that ask for
    :func:`scores`.

    Args:
        model: A Foolbox model over torch.
        images: Iterates of images that are still attacked.
        places: Whose iterates they are, int64 [N] in the batch that the attack was given; the
            whole batch if None. Only a :class:`QueryCounter` model asks.
        labels: Of the images, int64 [N], if their :meth:`Pass.loss_gradient` will be asked for: a
            runtime may then compute it with the logits.

    Raises:
        RuntimeUnavailableError: The model gives no gradients.
    """
    if isinstance(model, QueryCounter):
        return model.counted_pass(images, places, labels)
    own: Callable[[Tensor, Tensor | None], Pass] | None = getattr(model, "forward_pass", None)
    return AutogradPass(model, images) if own is None else own(images, labels)


def scores(model: Model, images: Tensor, places: Tensor | None = None) -> Tensor:
    """Return logits [n, classes], for an attack that may know no more of a model.

    The model need not have gradients: none can be asked for.

    Args:
        model: A Foolbox model over torch.
        images: As for :func:`forward`, [n, C, H, W].
        places: As for :func:`forward`, int64 [n].
    """
    if isinstance(model, QueryCounter):
        return model.counted_scores(images, places)
    with torch.no_grad():
        logits: Tensor = model(images.detach())
    return logits


class AutogradPass:
    """By autograd. Few rows go forward once more; else a backward pass takes all of them.

    The K backward passes over one graph are a loop: on a CPU at 64 images it takes 0.6 of the time
    of one vectorised pass (``is_grads_batched``) and 0.3 of that of a copied batch.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self._model = model
        self._images = images.detach().requires_grad_()
        with torch.enable_grad():
            self._logits: Tensor = model(self._images)
        if not self._logits.requires_grad:
            raise _no_gradients("The model")

    @property
    def logits(self) -> Tensor:
        """Logits of all images, computed already."""
        return self._logits.detach()

    def gradients(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """Return the gradients of one backward pass a cotangent."""
        return self._back(rows, cotangents, keep=True)

    def loss_gradient(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the gradients of one last backward pass."""
        # Buffers that are freed on the way back make it 3 to 8 % faster.
        cotangents = slope(self.logits[rows], labels)[:, None]
        return self._back(rows, cotangents, keep=False)[:, 0]

    def _back(self, rows: Tensor, cotangents: Tensor, keep: bool) -> Tensor:
        count = cotangents.shape[1]
        if len(rows) * (count + 2) < len(self._images) * count:  # by the passes each way takes
            fewer = AutogradPass(self._model, self._images[rows])
            return fewer._back(torch.arange(len(rows), device=rows.device), cotangents, keep)
        found = []
        for column in cotangents.to(self._logits.dtype).unbind(dim=1):
            whole = torch.zeros_like(self._logits)
            whole[rows] = column
            (gradient,) = torch.autograd.grad(self._logits, self._images, whole, retain_graph=keep)
            found.append(gradient[rows])
        return torch.stack(found, dim=1)


class NativePass:
    """By the runtime itself, in its own arithmetic: no autograd and no reference.

    Logits come from the forward graph, which costs a fraction of the gradient graph: an image
    that is done by then needs no gradient. A runtime that climbs the cross-entropy by itself gives
    logits and the loss gradient at once, if that is announced.

    Args:
        runtime: A differentiable runtime.
        images: float [N, C, H, W].
        labels: int64 [N], which announce that their cross-entropy is climbed; or None.
    """

    def __init__(self, runtime: Runtime, images: Tensor, labels: Tensor | None = None) -> None:
        self._runtime = runtime
        self._images = images.detach()
        self._labels = labels if labels is not None and isinstance(runtime, LossGradient) else None
        self._logits: Tensor | None = None
        self._loss_gradient: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Logits of all images, when they are first asked for."""
        if self._logits is None:
            if self._labels is None:
                self._logits = self._answer(self._images)
            else:
                self._logits, self._loss_gradient = self._with_logits(self._labels)
        return self._logits

    def _answer(self, images: Tensor) -> Tensor:
        logits = self._runtime.logits(images.contiguous().cpu().numpy())
        return torch.from_numpy(logits).to(images)

    def _with_logits(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, classes] and the gradients of the cross-entropy [N, C, H, W]."""
        assert isinstance(self._runtime, LossGradient)
        images = self._images.contiguous().cpu().numpy()
        found = self._runtime.cross_entropy(images, labels.cpu().numpy())
        logits, loss_gradient = (torch.from_numpy(array).to(self._images) for array in found)
        loss_gradient[~logits.isfinite().all(dim=1)] = torch.nan
        # Whether an image fools the runtime is for its forward graph to say, which may round
        # otherwise.
        gone = logits.argmax(dim=-1) != labels
        if gone.any():
            logits[gone] = self._answer(self._images[gone])
        return logits, loss_gradient

    def loss_gradient(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return what came with the logits, or ask."""
        logits = self.logits[rows]
        if self._loss_gradient is not None:
            return self._loss_gradient[rows]
        return self.gradients(rows, slope(logits, labels)[:, None])[:, 0]

    def gradients(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """Return all gradients in one call of the runtime."""
        asked = cotangents.flatten(1).isfinite().all(dim=1)
        images = self._images[rows[asked]].contiguous().cpu().numpy()
        _, found = self._runtime.vjp(images, cotangents[asked].float().contiguous().cpu().numpy())
        gradients = torch.from_numpy(found).to(self._images)
        if bool(asked.all()):
            return gradients
        shape = (*cotangents.shape[:2], *self._images.shape[1:])
        result = torch.full(shape, torch.nan, dtype=gradients.dtype, device=gradients.device)
        result[asked] = gradients
        return result


def _no_gradients(what: str) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"{what} gives no gradients, which this attack needs.",
        "Attack a torch model, or a runtime as foolbox_model(runtime) makes it.",
    )


class Queries:
    """What an attack asked of a model for each image of its batch.

    A forward query is an image whose logits were asked for; a backward query is one input gradient
    of one image, so that K cotangents are K of them. How the model serves them is its own affair:
    a gradient graph that computes the forward again does not count it.

    Args:
        images: Size N of the batch.
        device: Where the attack computes.
    """

    def __init__(self, images: int, device: Any = "cpu") -> None:
        self._forward = torch.zeros(images, dtype=torch.int64, device=device)
        self._backward = torch.zeros_like(self._forward)

    def add(self, places: Tensor, *, forward: int = 0, backward: int = 0) -> None:
        """Count queries for each of the images at ``places``, int64 [n]; one may be there often."""
        for total, count in ((self._forward, forward), (self._backward, backward)):
            total.index_add_(0, places, torch.full_like(places, count))

    @property
    def forward(self) -> NDArray[np.int64]:
        """Forward queries of each image, int64 [N]."""
        return self._forward.cpu().numpy()

    @property
    def backward(self) -> NDArray[np.int64]:
        """Backward queries of each image, int64 [N]."""
        return self._backward.cpu().numpy()


class QueryCounter(Model):
    """A Foolbox model that counts what is asked of it by :func:`forward` and :func:`scores`.

    Args:
        model: A Foolbox model over torch.
        images: Size of the batch that is attacked.

    Attributes:
        queries: The count so far.
    """

    def __init__(self, model: Any, images: int) -> None:
        self._model = model
        self.device = model.device
        self.queries = Queries(images, model.device)

    @property
    def bounds(self) -> Any:
        """Of the model."""
        return self._model.bounds

    def __call__(self, inputs: Any) -> Any:
        """Refuse: who is asked about is not said, so nothing could be counted."""
        raise TypeError("only attacks that ask through ccn_deploy.attacks.passes can be counted")

    def counted_pass(
        self, images: Tensor, places: Tensor | None, labels: Tensor | None = None
    ) -> Pass:
        """Begin a pass of the model; see :func:`forward`."""
        places = _all_of(images) if places is None else places
        return _CountingPass(forward(self._model, images, labels=labels), places, self.queries)

    def counted_scores(self, images: Tensor, places: Tensor | None) -> Tensor:
        """Return the model's logits; see :func:`scores`."""
        self.queries.add(_all_of(images) if places is None else places, forward=1)
        return scores(self._model, images)


def _all_of(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


class _CountingPass:
    def __init__(self, inner: Pass, places: Tensor, queries: Queries) -> None:
        self._inner = inner
        self._places = places
        self._queries = queries
        self._asked = False

    @property
    def logits(self) -> Tensor:
        self._count_forward()
        return self._inner.logits

    def _count_forward(self) -> None:
        if not self._asked:  # asking again costs nothing
            self._queries.add(self._places, forward=1)
            self._asked = True

    def gradients(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        self._queries.add(self._places[rows], backward=cotangents.shape[1])
        return self._inner.gradients(rows, cotangents)

    def loss_gradient(self, rows: Tensor, labels: Tensor) -> Tensor:
        self._count_forward()  # the slope is made of the logits
        self._queries.add(self._places[rows], backward=1)
        return self._inner.loss_gradient(rows, labels)
