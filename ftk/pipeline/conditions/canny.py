"""Canny edges (Canny 1986), white on black, as ControlNet's and T2I-Adapter's annotators draw them: by OpenCV, of the RGB."""

from typing import Any, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from ftk.configs.section import Section
from ftk.errors import ConfigError
from ftk.pipeline.conditions.base import Maker


class CannySettings(Section):
    """The thresholds of hysteresis, on the sum of the absolute derivatives across and down (3 x 3 Sobel)."""

    low: float = Field(default=100, ge=0, allow_inf_nan=False, description="weaker edges are dropped")
    high: float = Field(
        default=200, ge=0, allow_inf_nan=False, description="stronger edges are kept; those between if they touch one of these"
    )

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"`low` {self.low:g} lies above `high` {self.high:g}")
        return self


class Canny:
    """Edges of one pixel's width."""

    Settings: type[BaseModel] = CannySettings

    def maker(self, settings: CannySettings) -> Maker:
        """OpenCV's own."""
        cv2 = _opencv()

        def edges(image_HWC: np.ndarray, key: str) -> np.ndarray:
            edges_HW: np.ndarray = cv2.Canny(np.ascontiguousarray(image_HWC), settings.low, settings.high)
            return edges_HW

        return edges


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f'data.sources: `make: canny` needs OpenCV, which cannot be imported ({error}). Do: pip install "ftk[canny]"'
        ) from None
    cv2.setNumThreads(1)  # the stage runs as many workers as there are cores
    return cv2


CONDITION = Canny()
