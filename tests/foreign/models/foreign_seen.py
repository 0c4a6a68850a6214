"""A family whose text encoder sees the references: every value of a text rises by the mean of their pixels."""

from collections.abc import Sequence

import torch
from ftk.models.foreign_edit import Encoders, ForeignEdit

from ftk.models.components.geometry import ReferenceRule


class ForeignSeen(ForeignEdit):
    """As `ForeignEdit` but for the texts, which depend on the input images, as those of Qwen-Image-Edit do."""

    name = "foreign-seen"
    references = ReferenceRule(multiple=16, in_texts=True)

    def encode_texts(
        self, encoder: Encoders, captions: Sequence[str], references: Sequence[Sequence[torch.Tensor]] = ()
    ) -> list[dict[str, torch.Tensor]]:
        """Those of `ForeignEdit`, plus the mean of each caption's references."""
        items = super().encode_texts(encoder, captions)
        for item, images in zip(items, references or [()] * len(items), strict=True):
            for image_CHW in images:
                item["embeds"] += image_CHW.mean()
        return items


FAMILY = ForeignSeen()
