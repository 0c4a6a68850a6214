"""Target groups: which layers the names of a family mean, by an account of blocks and suffixes that is not the code's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from ftk.methods.adapters import targets
from ftk.methods.adapters.targets import TrainedComponent
from ftk.models import base as families
from ftk.models.base import DENOISER, Family, TargetGroup, TrainsEncoders

META = torch.device("meta")
FAMILIES = families.available()
TRAINING_ENCODERS = [name for name in FAMILIES if isinstance(families.get(name), TrainsEncoders)]


@pytest.fixture
def family(name: str) -> Family:
    return families.get(name)


@pytest.fixture
def directory(name: str, tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models(name)


def _component(module: torch.nn.Module, group: TargetGroup, block_classes: tuple[str, ...]) -> TrainedComponent:
    return TrainedComponent(
        name=DENOISER, module=module, owner="this model", groups={"attention": group}, block_classes=block_classes,
        targets="attention", setting="method.targets",
    )  # fmt: skip


def _blocks(module: torch.nn.Module, key: str) -> list[str]:
    """Names of the blocks of a class, or of those that the list called `key` holds."""
    parts = module.named_modules()
    return [path for path, part in parts if path and key in (type(part).__name__, path.rpartition(".")[0])]


def _layers_of_group(module: torch.nn.Module, group: TargetGroup, block_classes: tuple[str, ...]) -> list[str]:
    """Names of the layers that a group means, in the model's order; every suffix and every block must be there."""
    layers = [path for path, part in module.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))]
    reached = set()
    for key, suffixes in group.in_blocks.items():
        blocks = tuple(f"{block}." for block in _blocks(module, key))
        for suffix in suffixes:
            within = {layer for layer in layers if layer.startswith(blocks) and layer.endswith(f".{suffix}")}
            assert within, (key, suffix)
            reached |= within
    keys = {*block_classes, *group.in_blocks}
    in_any_block = tuple(f"{block}." for key in keys for block in _blocks(module, key))
    for suffix in group.outside:
        beside = {layer for layer in layers if not layer.startswith(in_any_block) and f".{layer}".endswith(f".{suffix}")}
        assert beside, suffix
        reached |= beside
    return [layer for layer in layers if layer in reached]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_suffix_of_every_target_group_names_a_layer_in_a_block_that_it_is_given_for(
    family: Family, directory: Path
) -> None:
    denoiser = family.load_denoiser(directory, torch.float32, META)
    assert set(family.block_classes) <= {type(module).__name__ for module in denoiser.modules()}
    linear = [path for path, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    component = targets.denoiser_component(family, denoiser, "attention", "method.targets")
    for group in family.target_groups.values():
        expected = _layers_of_group(denoiser, group, family.block_classes)
        assert targets.names_in_group(component, group) == expected
    everything = targets.names_in_group(component, family.target_groups["all-linear"])
    assert [path for path in linear if path not in everything] == []


@pytest.mark.parametrize("name", TRAINING_ENCODERS)
def test_every_suffix_of_a_text_encoders_groups_names_a_layer_in_a_block(family: Any, directory: Path) -> None:
    for encoder in family.trainable_encoders:
        module = family.load_encoder(directory, encoder, torch.float32, META)
        for group in family.encoder_targets.values():
            expected = _layers_of_group(module, group, ())
            assert targets.names_in_group(_component(module, group, ()), group) == expected


class _Block(torch.nn.Module):
    """A transformer block with one layer, and what holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})


class _Refined(torch.nn.Module):
    """A model with `to_q` in its main blocks, in those of a refiner of the same class, and in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner_blocks = torch.nn.ModuleList([_Block()])
        self.main_blocks = torch.nn.ModuleList([_Block(), _Block()])
        self.text_projection = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
        self.to_q = torch.nn.Linear(4, 4)


_MAIN = ["main_blocks.0.attention.to_q", "main_blocks.1.attention.to_q"]
_REFINER = ["refiner_blocks.0.attention.to_q"]
_OUTSIDE = ["text_projection.to_q", "to_q"]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (TargetGroup(in_blocks={"main_blocks": ("to_q",)}), _MAIN),
        (TargetGroup(in_blocks={"refiner_blocks": ("to_q",)}), _REFINER),
        (TargetGroup(in_blocks={"_Block": ("to_q",)}), _REFINER + _MAIN),
        (TargetGroup(in_blocks={}, outside=("to_q",)), _OUTSIDE),
        (TargetGroup(in_blocks={"main_blocks": ("to_q",)}, outside=("text_projection.to_q",)), [*_MAIN, _OUTSIDE[0]]),
        (TargetGroup(in_blocks={"_Block": ("to_q",)}, outside=("to_q",)), _REFINER + _MAIN + _OUTSIDE),
    ],
    ids=["main", "refiner", "class", "outside", "main-and-projection", "everywhere"],
)
def test_a_group_reaches_the_blocks_that_it_names_alone(group: TargetGroup, expected: list[str]) -> None:
    module = _Refined()
    component = _component(module, group, ("_Block",))
    names = targets.select(component, targets.linear_or_convolution)
    assert names == expected
    # PEFT, which has no such groups, adapts the same layers.
    config = peft.LoraConfig(target_modules=targets.as_peft_targets(component, names))
    adapted = peft.inject_adapter_in_model(config, module)
    assert [path for path, part in adapted.named_modules() if hasattr(part, "lora_A")] == expected
