"""What Foolbox calls of our untargeted attacks: images and labels in, images out.

Everything else is each attack's own search on tensors.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack, raise_if_kwargs
from foolbox.models.base import Model
from torch import Tensor

from ccn_deploy.attacks.passes import labels_of, tensor_of


class BoundedAttack(FixedEpsilonAttack):
    """An attack inside a ball around each image."""

    title: ClassVar[str]
    """Begins the error of a criterion that the attack cannot serve."""

    def run(
        self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any
    ) -> Any:
        """Return attacked images, whether they fool the model or not.

        Args:
            model: A Foolbox model over torch.
            inputs: Images [N, C, H, W] within the model's bounds.
            criterion: ``Misclassification``, or labels int64 [N] to leave.
            epsilon: Radius of the ball.
            **kwargs: None are taken.

        Raises:
            RuntimeUnavailableError: The model gives no gradients, and the attack needs some.
        """
        raise_if_kwargs(kwargs)
        labels = labels_of(criterion, self.title)
        images, restore_type = tensor_of(inputs)
        return restore_type(self._search(model, images, labels, epsilon))

    @abstractmethod
    def _search(self, model: Model, origin: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """Return attacked images for ``origin`` [N, C, H, W] and ``labels`` int64 [N]."""


class MinimumNormAttack(MinimizationAttack):
    """A search for the smallest perturbation."""

    title: ClassVar[str]
    """As of :class:`BoundedAttack`."""

    def run(
        self,
        model: Model,
        inputs: Any,
        criterion: Any,
        *,
        early_stop: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return attacked images, whether they fool the model or not.

        Args:
            model: A Foolbox model over torch.
            inputs: Images [N, C, H, W] within the model's bounds.
            criterion: ``Misclassification``, or labels int64 [N] to leave. To start from the
                model's own predictions, give those.
            early_stop: Unused; the search is for the smallest perturbation.
            **kwargs: None are taken.

        Raises:
            RuntimeUnavailableError: The model gives no gradients, and the attack needs some.
        """
        raise_if_kwargs(kwargs)
        labels = labels_of(criterion, self.title)
        images, restore_type = tensor_of(inputs)
        return restore_type(self._search(model, images, labels))

    @abstractmethod
    def _search(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        """Return attacked images for ``images`` [N, C, H, W] and ``labels`` int64 [N]."""
