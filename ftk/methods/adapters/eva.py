"""EVA: LoRA's A starts from the directions in which a layer's inputs vary most, found on the data that it will train on.

Source: Paischer et al. 2024 (arXiv 2410.07170), section 3.1, by the incremental PCA of PEFT. Every layer keeps the rank that it
was given: the paper's second part, which moves ranks between layers, is left out (its rho is 1).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftk.methods.adapters import injection

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
_SEED = 0


@dataclass(slots=True, kw_only=True)
class _Directions:
    """The principal directions of a layer's inputs so far; rows wait until there are as many as directions."""

    pca: Any
    waiting: "list[torch.Tensor]" = field(default_factory=list)

    def add(self, inputs: "torch.Tensor") -> None:
        """`inputs` [...,I]: rows of one forward pass."""
        import torch

        self.waiting.append(inputs.detach().reshape(-1, inputs.shape[-1]).float())
        if sum(map(len, self.waiting)) >= self.pca.n_components:
            self.pca.partial_fit(torch.cat(self.waiting))
            self.waiting.clear()


def start(models: Iterable[Any], predictions: "Iterable[Callable[[], torch.Tensor]]") -> None:
    """Set A [r,I] of each linear layer to the first r principal directions of its inputs; B is zero and stays so.

    Args:
        models: with a LoRA attached.
        predictions: each passes a micro-batch through the models.
    """
    import torch

    found = [(layer, _Directions(pca=_pca(layer))) for model in models for layer in _linear(model)]
    with torch.no_grad(), _listening(found):
        for predict in predictions:
            predict()
    num_left = 0
    for layer, seen in found:
        A, directions = layer.lora_A[injection.ADAPTER].weight, getattr(seen.pca, "components_", None)
        if directions is None:
            num_left += 1
            continue
        with torch.no_grad():
            A.copy_(directions[: len(A)])
    if num_left:
        LOGGER.warning(
            "initialisation eva: %d of %d linear layers saw fewer inputs than their rank and start as `default` does. "
            "Raise method.eva_batches.", num_left, len(found),
        )  # fmt: skip


def _linear(model: Any) -> list[Any]:
    """The layers that are looked at. Convolutions, whose inputs overlap, start as `default` does."""
    import torch

    return [layer for layer in injection.adapted(model).values() if isinstance(layer.get_base_layer(), torch.nn.Linear)]


def _pca(layer: Any) -> Any:
    from peft.utils.incremental_pca import IncrementalPCA

    rank = len(layer.lora_A[injection.ADAPTER].weight)
    return IncrementalPCA(n_components=rank, copy=False, lowrank=True, lowrank_seed=_SEED)


@contextmanager
def _listening(found: Sequence[tuple[Any, _Directions]]) -> Iterator[None]:
    def listen(seen: _Directions) -> Callable[[Any, Any], None]:
        return lambda _module, inputs: seen.add(inputs[0])

    handles = [layer.register_forward_pre_hook(listen(seen)) for layer, seen in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
