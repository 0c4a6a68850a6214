"""The image shrunk and enlarged again: what a network that adds detail is given, as a tile ControlNet or an upscaler is."""

import numpy as np
from pydantic import BaseModel, Field

from ftk.configs.section import Section
from ftk.pipeline import resize
from ftk.pipeline.conditions.base import Maker


class LowResolutionSettings(Section):
    """How much detail is lost."""

    factor: float = Field(default=4.0, gt=1, le=256, allow_inf_nan=False, description="by how much each side shrinks")


class LowResolution:
    """Both ways by Lanczos, as images are resized themselves; no side becomes shorter than a pixel."""

    Settings: type[BaseModel] = LowResolutionSettings

    def maker(self, settings: LowResolutionSettings) -> Maker:
        """See `ftk.pipeline.resize`."""

        def shrunk(image_HWC: np.ndarray, key: str) -> np.ndarray:
            height, width, _ = image_HWC.shape
            small = max(1, round(width / settings.factor)), max(1, round(height / settings.factor))
            return resize.resize(resize.resize(image_HWC, small, linear=False), (width, height), linear=False)

        return shrunk


CONDITION = LowResolution()
