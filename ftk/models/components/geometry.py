"""Sizes: of latents, of where a sample's pixels come from, and of the input images of an edit model. No torch."""

from dataclasses import dataclass, fields


def nearest_multiple(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size whose sides are multiples of so many px and that is nearest; of two as near the smaller."""
    width, height = (max(1, -(-(2 * side - multiple) // (2 * multiple))) * multiple for side in size)
    return width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    """How pixels become latent cells, `factor` a side to a cell, and cells become tokens, `patch` a side to a token.

    A U-Net has no tokens of its own; there a patch is what its levels halve, so that no side ends in half a cell.
    """

    channels: int
    factor: int
    patch: int

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.factor * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGeometry:
    """Where a sample's pixels come from, in pixels: an image, resized, the bucket cropped from it, and then mirrored."""

    width: int
    height: int
    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int
    bucket_width: int
    bucket_height: int
    flipped: bool

    def numbers(self) -> list[int]:
        """The fields in their order: a row of `Conditions.geometry_BG`."""
        return [int(getattr(self, each.name)) for each in fields(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRule:
    """The size at which an edit model sees a reference image, whatever the size of the image that it makes.

    Attributes:
        multiple: sides are multiples of this many pixels.
        area: px; each reference is scaled to about this area, keeping its aspect ratio. None: it keeps its own size.
        sizes: (width, height) of which the one with the nearest aspect ratio is taken, in place of `area`.
        in_texts: whether the text encoder sees the references too: a text then depends on them.
        seen_area: px; about the area at which it sees them, where that is not the size above.
        most: how many a sample may have; None: any number.
    """

    multiple: int
    area: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    in_texts: bool = False
    seen_area: int | None = None
    most: int | None = None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of a reference whose file has these sides."""
        ratio = width / height
        if self.sizes:
            return min(self.sizes, key=lambda size: abs(size[0] / size[1] - ratio))
        if self.area is None:
            return self._at_least_one(width // self.multiple), self._at_least_one(height // self.multiple)
        return self._of_area(self.area, ratio)

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels at which the text encoder sees such a reference."""
        return self.size(width, height) if self.seen_area is None else self._of_area(self.seen_area, width / height)

    def _of_area(self, area: int, ratio: float) -> tuple[int, int]:
        # As diffusers' `calculate_dimensions` of the Qwen-Image edit pipelines: the height comes from the unrounded width.
        exact_width = (area * ratio) ** 0.5
        exact_height = exact_width / ratio
        return (
            self._at_least_one(round(exact_width / self.multiple)),
            self._at_least_one(round(exact_height / self.multiple)),
        )

    def _at_least_one(self, count: int) -> int:
        return max(1, count) * self.multiple
