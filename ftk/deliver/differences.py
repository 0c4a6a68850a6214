"""How two models differ, or a model and one with an adapter, tensor by tensor: neither model is ever in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ftk.deliver.low_rank import squared_norm
from ftk.errors import ModelError
from ftk.methods.adapters.layer_change import LayerChange
from ftk.models.components import loading, weights

_LISTED = 10


@dataclass(slots=True)
class Sums:
    """Squared norms, added up: of the base, of the change, and of what the factors leave of it."""

    base: float = 0.0
    change: float = 0.0
    rest: float = 0.0
    ranks: list[int] = field(default_factory=list)

    def add(self, other: "Sums") -> None:
        """Add another's."""
        self.base += other.base
        self.change += other.change
        self.rest += other.rest
        self.ranks += other.ranks

    @property
    def energy(self) -> float:
        """The share of the squared change that the factors have; 1 of no change."""
        return max(0.0, 1.0 - self.rest / self.change) if self.change else 1.0


class Weights:
    """A component's tensors by name, read one at a time from its safetensors files.

    Args:
        file: what the weights are called where they are in one file.
        keys: the module's own names by those in the files, where they differ.

    Raises:
        ModelError: there are none, or a file is damaged.
    """

    def __init__(self, folder: Path, file: str, keys: Mapping[str, str]) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Any, str]] = {}
        try:
            for path in weights.weight_files(folder, file):
                opened: Any = safe_open(path, "pt")
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    name = keys.get(key, key)
                    self.shapes[name] = tuple(opened.get_slice(key).get_shape())
                    self._places[name] = (opened, key)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ModelError(f"{folder}: its weights cannot be read as safetensors: {loading.first_line(error)}") from error

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """In fp32 on the device."""
        file, key = self._places[name]
        tensor: torch.Tensor = file.get_tensor(key)
        return tensor.to(device).float()


class Differences(Protocol):
    """What changes in a component."""

    @property
    def names(self) -> list[str]:
        """Of all tensors that may differ."""

    def difference(self, name: str, device: torch.device) -> tuple[torch.Tensor | None, Sums]:
        """tuned - base, None where they are equal, and the squared norms of it and of the base.

        Raises:
            ModelError: it is not finite.
        """


class OfModels:
    """What a second model has in place of a first one's tensors.

    Raises:
        ModelError: their tensors have other names or shapes: nothing of one could be subtracted from the other.
    """

    def __init__(self, before: Weights, after: Weights) -> None:
        _refuse_other_shapes(before, after)
        self._before, self._after = before, after
        self.names = list(before.shapes)

    def difference(self, name: str, device: torch.device) -> tuple[torch.Tensor | None, Sums]:
        """See `Differences`."""
        base = self._before.tensor(name, device)
        where = f"{self._before.folder} or {self._after.folder}"
        return _measured(name, base, self._after.tensor(name, device) - base, where)


class OfAdapter:
    """What an adapter does to the weights of its layers."""

    def __init__(self, before: Weights, layers: Mapping[str, LayerChange], path: Path) -> None:
        self._before, self._layers, self._path = before, layers, path
        self.names = [f"{layer}.weight" for layer in layers]

    def difference(self, name: str, device: torch.device) -> tuple[torch.Tensor | None, Sums]:
        """See `Differences`."""
        base = self._before.tensor(name, device)
        layer = self._layers[name.removesuffix(".weight")]
        # Of what only adds no digits are lost by adding and subtracting the weight.
        change = layer.delta(base.shape).to(device) if layer.magnitude is None else layer.applied(base) - base
        return _measured(name, base, change, f"{self._before.folder} or {self._path}")


def _measured(name: str, base: torch.Tensor, difference: torch.Tensor, where: str) -> tuple[torch.Tensor | None, Sums]:
    change = squared_norm(difference)
    if change != change or change == float("inf"):
        raise ModelError(f"{name} holds what is no finite number in {where}. Nothing was written.")
    return (difference if change else None), Sums(squared_norm(base), change)


def _refuse_other_shapes(before: Weights, after: Weights) -> None:
    names = sorted(before.shapes.keys() | after.shapes.keys())
    other = [name for name in names if before.shapes.get(name) != after.shapes.get(name)]
    if not other:
        return
    lines = [f"  {name}: {_shape(before, name)} in the base, {_shape(after, name)} in the tuned model" for name in other]
    more = [f"  and {len(other) - _LISTED} more"] if len(other) > _LISTED else []
    raise ModelError(
        f"{before.folder} and {after.folder} are of different architectures: {len(other)} of {len(names)} tensors differ in "
        "name or shape.\n" + "\n".join([*lines[:_LISTED], *more]) + "\nName the model that the other was trained from."
    )


def _shape(weights: Weights, name: str) -> str:
    return "x".join(map(str, weights.shapes[name])) if name in weights.shapes else "none"
