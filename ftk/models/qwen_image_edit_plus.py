"""Qwen-Image-Edit-2509 and -2511: one to three input images; the text encoder sees each at about 384 x 384 px.

Source: diffusers, `pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`. That -2511 gives references the time 0 is in the
configuration of its transformer (`zero_cond_t`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftk.models.components.geometry import ReferenceRule
from ftk.models.qwen_image_edit import IMAGE_PAD, VISION_END, VISION_START, QwenImageEdit

_SEEN_AREA = 384 * 384


class QwenImageEditPlus(QwenImageEdit):
    """As `QwenImageEdit`, with a list of input images, which the caption can name: `Picture 1`, `Picture 2`."""

    name = "qwen-image-edit-plus"
    pipeline_name = "QwenImageEditPlusPipeline"
    max_references = 3
    tiny_transformer: Mapping[str, Any] = {"zero_cond_t": True}

    @property
    def references(self) -> ReferenceRule:  # type: ignore[override]
        """About a megapixel for the VAE; the text encoder sees fewer pixels."""
        return ReferenceRule(
            multiple=32, area=self.config.reference_area, in_texts=True, seen_area=_SEEN_AREA, most=self.max_references
        )

    def single_file_config(self, tensors: Mapping[str, Any]) -> str:
        """The newest; a file of it holds the transformer alone."""
        return "Qwen/Qwen-Image-Edit-2509"

    def _image_template(self, number: int) -> str:
        """With the image's number, which the pipeline writes for a single one too."""
        return f"Picture {number}: {VISION_START}{IMAGE_PAD}{VISION_END}"

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As musubi-tuner and ai-toolkit write them."""
        return {"modelspec.architecture": "Qwen-Image-Edit-Plus", "ss_base_model_version": "qwen_image_edit_plus"}


FAMILY = QwenImageEditPlus()
