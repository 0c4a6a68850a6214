"""What training needs of delivery: the weights that it hands over while it runs. `ftk.deliver` implements it, a layer above."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ftk.models.base import Model
from ftk.train.ranks import Ranks

if TYPE_CHECKING:
    from ftk.train.inputs import Inputs


class Delivery(Protocol):
    """Writes the trained weights into the run's folder. Equal states give equal bytes, however often they are written."""

    def export(self, step: int, folder: str) -> None:
        """Write the weights as they are in the model now; called by every process that has a part of them."""

    def renew_cards(self, step: int) -> None:
        """Put the sample images of a step on the model cards of its weights: they are drawn after those are written."""


MakeDelivery = Callable[["Inputs", Model, Ranks], Delivery]
"""Builds the delivery of a run, once its model is in memory."""
