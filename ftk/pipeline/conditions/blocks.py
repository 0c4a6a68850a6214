"""A mosaic of the image's colours: the spatial palette that T2I-Adapter's colour adapter is given."""

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from ftk.configs.section import Section
from ftk.pipeline.conditions.base import Maker


class BlocksSettings(Section):
    """How coarse the mosaic is."""

    size: int = Field(default=64, ge=2, description="px; side of a block, as nearly as whole blocks fill the image")
    colours: int | None = Field(
        default=None, ge=2, le=256, description="colours at most, chosen for each image by median cut; any number by default"
    )


class Blocks:
    """Each block has the mean of its pixels' stored values."""

    Settings: type[BaseModel] = BlocksSettings

    def maker(self, settings: BlocksSettings) -> Maker:
        """Sums are exact; fewer colours by Pillow."""
        return lambda image_HWC, key: _mosaic(image_HWC, settings)


def _mosaic(image_HWC: np.ndarray, settings: BlocksSettings) -> np.ndarray:
    down, across = (_edges(side, settings.size) for side in image_HWC.shape[:2])
    heights, widths = np.diff(down), np.diff(across)
    sums = np.add.reduceat(np.add.reduceat(image_HWC.astype(np.int64), down[:-1], axis=0), across[:-1], axis=1)
    areas = (heights[:, None] * widths)[:, :, None]
    blocks = ((2 * sums + areas) // (2 * areas)).astype(np.uint8)
    if settings.colours is not None:
        blocks = _fewer_colours(blocks, settings.colours)
    mosaic: np.ndarray = blocks.repeat(heights, axis=0).repeat(widths, axis=1)
    return mosaic


def _edges(side: int, size: int) -> np.ndarray:
    """Where blocks begin, and the end of the last."""
    number = max(1, round(side / size))
    return np.arange(number + 1) * side // number


def _fewer_colours(blocks_HWC: np.ndarray, colours: int) -> np.ndarray:
    if len(np.unique(blocks_HWC.reshape(-1, 3), axis=0)) <= colours:
        return blocks_HWC
    palette = Image.fromarray(blocks_HWC).quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return np.asarray(palette.convert("RGB"))


CONDITION = Blocks()
