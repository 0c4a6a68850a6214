"""The image without its colours: what a network that colours photographs is given."""

import numpy as np
from PIL import Image
from pydantic import BaseModel

from ftk.configs.section import Section
from ftk.pipeline.conditions.base import Maker


class Grayscale:
    """Luma by ITU-R 601, of the stored values."""

    Settings: type[BaseModel] = Section

    def maker(self, settings: Section) -> Maker:
        """Pillow's."""
        return lambda image_HWC, key: np.asarray(Image.fromarray(image_HWC).convert("L"))


CONDITION = Grayscale()
