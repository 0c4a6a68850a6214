"""Soft edges, white on black: the strength of the gradient by Scharr's operator, in place of a network such as HED."""

from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from ftk.configs.section import Section
from ftk.pipeline import light_vips
from ftk.pipeline.conditions.base import Maker


class SoftEdgesSettings(Section):
    """How fine the edges are, and how bright."""

    sigma: float = Field(
        default=1.0, ge=0, le=64, allow_inf_nan=False, description="px; of the Gaussian blur that comes first; 0: none"
    )
    gain: float = Field(
        default=4.0, gt=0, le=255, allow_inf_nan=False, description="brightness of an edge from black to white, in times white"
    )


class SoftEdges:
    """Of each pixel the strongest of its three channels' gradients."""

    Settings: type[BaseModel] = SoftEdgesSettings

    def maker(self, settings: SoftEdgesSettings) -> Maker:
        """By libvips, in float32."""
        return lambda image_HWC, key: _edges(image_HWC, settings)


def _edges(image_HWC: np.ndarray, settings: SoftEdgesSettings) -> np.ndarray:
    vips = light_vips.load()
    height, width, _ = image_HWC.shape
    image = vips.Image.new_from_memory(np.ascontiguousarray(image_HWC), width, height, 3, "uchar").cast("float")
    if settings.sigma:
        image = image.gaussblur(settings.sigma, precision="float", min_ampl=0.003)
    # Scaled so that a step from black to white is 255.
    across = vips.Image.new_from_array([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]], scale=16)
    squares: Any = [image.conv(mask, precision="float") ** 2 for mask in (across, across.rot90())]
    strongest = (squares[0] + squares[1]).bandsplit()
    edges = (strongest[0].bandrank(strongest[1:], index=2) ** 0.5 * settings.gain).rint().cast("uchar")
    return np.frombuffer(edges.write_to_memory(), np.uint8).reshape(height, width)


CONDITION = SoftEdges()
