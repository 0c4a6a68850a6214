"""The image with holes, or the mask of these holes: what an inpainting ControlNet is given.

Black is what the inpainting ControlNets of Stable Diffusion 3, FLUX.1 and Qwen-Image see there: their pipelines in diffusers
set masked pixels to -1 of [-1, 1]. The one of Stable Diffusion 1.5 was trained on -1 of [0, 1], which no image file can hold.
A mask is white in the holes, as these pipelines take it.
"""

import math
import random
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from ftk.configs.section import Section, require_default
from ftk.pipeline.conditions.base import Maker

_FILLS = {"black": 0, "gray": 127, "white": 255}
_BOXES = 0.5
"""How many of the shapes are boxes."""
_MOST_SHAPES = 1000


class HolesSettings(Section):
    """How much is covered, and what is given."""

    seed: int = Field(default=0, ge=0, description="another seed is another set of holes; equal ones give the same holes")
    share: tuple[float, float] = Field(
        default=(0.1, 0.5), description="of the image that holes cover: least and most, between which each image draws its own"
    )
    fill: Literal["black", "gray", "white"] = Field(default="black", description="what is seen in a hole")
    output: Literal["image", "mask"] = Field(
        default="image",
        description="mask: white in the holes of an entry with this `seed` and `share`, and black elsewhere",
    )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        least, most = self.share
        if not 0 < least <= most < 1:
            raise ValueError(f"`share`: write two numbers above 0 and below 1, the least first (found {least:g}, {most:g})")
        if self.output == "mask":
            require_default(self, "fill", "output: image")
        return self


class Holes:
    """Boxes and brush strokes, laid one over the other until they cover what was drawn; the last is cut off there."""

    Settings: type[BaseModel] = HolesSettings

    def maker(self, settings: HolesSettings) -> Maker:
        """Holes follow from the seed and the sample's image alone."""

        def punched(image_HWC: np.ndarray, key: str) -> np.ndarray:
            height, width, _ = image_HWC.shape
            holes_HW = _holes(height, width, settings.share, random.Random(f"{settings.seed} {key}"))  # noqa: S311
            if settings.output == "mask":
                return np.where(holes_HW, 255, 0).astype(np.uint8)
            return np.where(holes_HW[:, :, None], _FILLS[settings.fill], image_HWC).astype(np.uint8)

        return punched


def _holes(height: int, width: int, share: tuple[float, float], draw: random.Random) -> np.ndarray:
    """[H,W], true in a hole. Of `draw` only `random()` is used, which gives the same numbers in every version of Python."""
    wanted = max(1, round((share[0] + (share[1] - share[0]) * draw.random()) * height * width))
    holes_HW = np.zeros((height, width), bool)
    for _ in range(_MOST_SHAPES):
        shape_HW = (_box if draw.random() < _BOXES else _stroke)(height, width, draw)
        fresh = np.flatnonzero(shape_HW & ~holes_HW)
        missing = wanted - int(holes_HW.sum())
        holes_HW.flat[fresh[:missing]] = True
        if len(fresh) >= missing:
            break
    return holes_HW


def _box(height: int, width: int, draw: random.Random) -> np.ndarray:
    box_HW = np.zeros((height, width), bool)
    slices = []
    for side in (height, width):
        extent = max(1, round(side * (0.1 + 0.4 * draw.random())))
        start = round(side * draw.random()) - extent // 2
        slices.append(slice(max(0, start), max(0, start + extent)))
    box_HW[tuple(slices)] = True
    return box_HW


def _stroke(height: int, width: int, draw: random.Random) -> np.ndarray:
    """A line of some straight pieces, each of which turns a little from the one before, with round ends."""
    stroke_HW = np.zeros((height, width), bool)
    shorter = min(height, width)
    radius = max(0.5, shorter * (0.02 + 0.06 * draw.random()))
    y, x, angle = height * draw.random(), width * draw.random(), math.tau * draw.random()
    for _ in range(2 + int(5 * draw.random())):
        angle += math.pi * (draw.random() - 0.5)
        length = shorter * (0.1 + 0.2 * draw.random())
        end_y, end_x = y + length * math.sin(angle), x + length * math.cos(angle)
        _paint(stroke_HW, (y, x), (end_y, end_x), radius)
        y, x = min(max(end_y, 0), height), min(max(end_x, 0), width)
    return stroke_HW


def _paint(picture_HW: np.ndarray, start: tuple[float, float], end: tuple[float, float], radius: float) -> None:
    """Set the pixels whose centres lie within `radius` of the line between two places (y, x)."""
    (y0, x0), (y1, x1) = start, end
    top, first = (max(0, math.floor(min(pair) - radius)) for pair in ((y0, y1), (x0, x1)))
    bottom, last = (max(0, math.ceil(max(pair) + radius)) for pair in ((y0, y1), (x0, x1)))
    part_HW = picture_HW[top:bottom, first:last]
    ys = np.arange(top, top + part_HW.shape[0])[:, None] + 0.5
    xs = np.arange(first, first + part_HW.shape[1]) + 0.5
    along = ((ys - y0) * (y1 - y0) + (xs - x0) * (x1 - x0)) / ((y1 - y0) ** 2 + (x1 - x0) ** 2)
    along = along.clip(0, 1)
    part_HW |= (ys - y0 - along * (y1 - y0)) ** 2 + (xs - x0 - along * (x1 - x0)) ** 2 <= radius**2


CONDITION = Holes()
