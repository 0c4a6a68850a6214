"""Which layers a method trains, found by attaching it to the model's shapes: no weights are read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftk.methods.base import prefix
from ftk.models.base import load_model
from ftk.run import Run

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLayer:
    """A layer with something to train in it, or layers that differ in the numbers of their blocks alone.

    Attributes:
        name: from the denoiser's root, or with the text encoder's name in front.
        kind: the module's class.
        weight: the shape of its weight, [out, in] of a linear layer.
        num_layers: 1, or how many layers `name` stands for; its numbers are ranges then.
        num_parameters: what is trained in all of them.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    num_layers: int
    num_parameters: int


def trained_layers(run: Run, model: Path) -> tuple[list[TrainedLayer], int]:
    """Every layer that the run trains, in the model's order, and how many layers with weights the model has.

    Args:
        model: the local folder with the denoiser, and with the text encoders that are trained.

    Raises:
        ConfigError: the method does not fit the model.
    """
    shapes = load_model(run.family, model, run.encoders, torch.float32, torch.device("meta"))
    plain: dict[str, tuple[str, tuple[int, ...]]] = {}
    for component, module in shapes.components.items():
        for name, layer in module.named_modules():
            sizes = {key: tuple(each.shape) for key, each in layer.named_parameters(recurse=False)}
            if sizes:
                plain[prefix(component) + name] = (type(layer).__name__, sizes.get("weight", next(iter(sizes.values()))))
    counts: dict[str, int] = {}
    for name, parameter in run.method.attach(shapes, run.settings, 0).items():
        layer_name = _layer_of(name, plain)
        counts[layer_name] = counts.get(layer_name, 0) + parameter.numel()
    order = {name: position for position, name in enumerate(plain)}
    layers = [
        TrainedLayer(name=name, kind=plain[name][0], weight=plain[name][1], num_layers=1, num_parameters=counts[name])
        for name in sorted(counts, key=lambda name: order.get(name, len(order)))
        if name in plain
    ]
    added = [
        TrainedLayer(name=name, kind="added by the method", weight=(), num_layers=1, num_parameters=count)
        for name, count in counts.items()
        if name not in plain
    ]
    return layers + added, len(plain)


def _layer_of(parameter: str, plain: Mapping[str, Any]) -> str:
    """The module of the plain model that a parameter lies in; the parameter itself where it lies in none."""
    place = parameter
    while place and place not in plain:
        place = place.rpartition(".")[0]
    return place or parameter


def summarised(layers: Iterable[TrainedLayer]) -> list[TrainedLayer]:
    """Layers of equal kind and shape that differ in the numbers of their blocks alone, as one line."""
    groups: dict[tuple[str, str, tuple[int, ...], int], list[TrainedLayer]] = {}
    for layer in layers:
        groups.setdefault((_NUMBER.sub("#", layer.name), layer.kind, layer.weight, layer.num_parameters), []).append(layer)
    lines = []
    for members in groups.values():
        numbers = [list(map(int, column)) for column in zip(*(_NUMBER.findall(each.name) for each in members), strict=True)]
        ranges = iter([_range(column) for column in numbers])
        lines.append(
            replace(
                members[0],
                name=_NUMBER.sub(lambda _, ranges=ranges: next(ranges), members[0].name),  # type: ignore[misc]
                num_layers=len(members),
                num_parameters=sum(each.num_parameters for each in members),
            )
        )
    return lines


def _range(numbers: list[int]) -> str:
    """`7`, `0-59`, or `0,2,5` where numbers are missing in between."""
    present = sorted(set(numbers))
    if len(present) == 1:
        return str(present[0])
    if present[-1] - present[0] + 1 == len(present):
        return f"{present[0]}-{present[-1]}"
    return ",".join(map(str, present))
