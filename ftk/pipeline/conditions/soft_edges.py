"""Soft edges, white on black: the strength of the gradient by Scharr's operator, in place of a network such as HED."""

import functools

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
    height, width, _ = image_HWC.shape
    image = light_vips.load().Image.new_from_memory(np.ascontiguousarray(image_HWC), width, height, 3, "uchar").cast("float")
    if settings.sigma:
        # Both gradients are of one picture: without a copy it would be blurred for each.
        image = image.gaussblur(settings.sigma, precision="float", min_ampl=0.003).copy_memory()
    # Scaled so that a step from black to white is 255.
    across = light_vips.load().Image.new_from_array([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]], scale=16)
    gradients = [image.conv(mask, precision="float") for mask in (across, across.rot90())]
    squares = gradients[0] * gradients[0] + gradients[1] * gradients[1]
    squares_HWC = np.frombuffer(squares.write_to_memory(), np.float32).reshape(height, width, 3)
    # Over the last axis numpy's own maximum takes as long as all the rest.
    strongest_HW = functools.reduce(np.maximum, (squares_HWC[:, :, channel] for channel in range(3)))
    edges_HW: np.ndarray = np.rint(np.sqrt(strongest_HW) * np.float32(settings.gain)).clip(0, 255).astype(np.uint8)
    return edges_HW


CONDITION = SoftEdges()
