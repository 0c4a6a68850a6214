"""Which of diffusers' T2I-Adapters fits a U-Net: the one whose features have the channels and sides of its levels.

Sources: Mou et al. 2023 (arXiv 2302.08453); diffusers, `T2IAdapter` and where `UNet2DConditionModel` adds its features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftk.errors import ConfigError

TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")
_LARGER = {"full_adapter_xl": (1, 1, 2)}
"""How many times as many pixels a side as in the first feature a cell of each has, where it is not doubled each time; the last
stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What is added at one place of a U-Net: its channels, and how many pixels a side one of its cells stands for."""

    channels: int
    pixels: int

    def __str__(self) -> str:
        return f"{self.channels} channels at 1/{self.pixels}"


def taken(unet: Any, factor: int) -> list[Feature]:
    """What a U-Net takes: after each level, and after its middle; the last only where it is of the middle's own shape.

    A level with attention takes it before it halves the sides, one without after that.

    Args:
        unet: its shapes alone (`meta`) are enough.
        factor: pixels a side of a latent cell.
    """
    features, pixels = [], factor
    for channels, block in zip(unet.config.block_out_channels, unet.down_blocks, strict=True):
        before = pixels
        pixels *= 2 if block.downsamplers is not None else 1
        has_attention = getattr(block, "has_cross_attention", False)
        features.append(Feature(channels=channels, pixels=before if has_attention else pixels))
    return [*features, Feature(channels=unet.config.block_out_channels[-1], pixels=pixels)]


def made(adapter_type: str, channels: Sequence[int], factor: int) -> list[Feature]:
    """The features of a `T2IAdapter` with these settings; `factor` is its `downscale_factor`."""
    widths = [*channels, channels[-1]] if adapter_type == "light_adapter" else list(channels)
    larger = _LARGER.get(adapter_type)
    times = [2**number if larger is None else larger[min(number, len(larger) - 1)] for number in range(len(widths))]
    return [Feature(channels=width, pixels=factor * each) for width, each in zip(widths, times, strict=True)]


def settings(adapter_type: str | None, features: Sequence[Feature]) -> Mapping[str, Any]:
    """`adapter_type`, `channels` and `downscale_factor` of the adapter that gives a U-Net what it takes.

    Args:
        adapter_type: one of `TYPES`, or the first of them that fits.
        features: as `taken` lists them.

    Raises:
        ConfigError: none fits, or this one does not.
    """
    fitting = {each: found for each in TYPES if (found := _fitting(each, features)) is not None}
    if adapter_type is None and fitting:
        return next(iter(fitting.values()))
    if adapter_type in fitting:
        return fitting[adapter_type]
    named = "no type of T2IAdapter" if adapter_type is None else f"not {adapter_type}"
    others = f" What fits: {', '.join(fitting)}." if fitting else " Train a ControlNet instead."
    raise ConfigError(
        f"method.adapter_type: {named} fits this U-Net, whose levels take {', '.join(map(str, features[:-1]))}.{others}"
    )


def _fitting(adapter_type: str, features: Sequence[Feature]) -> Mapping[str, Any] | None:
    """The settings of this type, with a feature for the middle if it can have one of the middle's shape."""
    is_light = adapter_type == "light_adapter"
    for count in (len(features), len(features) - 1):
        wanted = list(features[:count])
        channels = [each.channels for each in wanted[: count - 1 if is_light else count]]
        if not channels or (adapter_type == "full_adapter_xl" and len(set(channels[2:])) > 1):
            continue
        if made(adapter_type, channels, wanted[0].pixels) == wanted:
            return {"adapter_type": adapter_type, "channels": channels, "downscale_factor": wanted[0].pixels}
    return None
