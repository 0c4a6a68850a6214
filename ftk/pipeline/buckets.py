"""Aspect-ratio buckets: sizes that images are resized and cropped to, so that a batch has one shape. All sides in pixels."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How an image reaches its bucket: resize to (resize_width, resize_height), then crop the bucket at (crop_x, crop_y)."""

    bucket_width: int
    bucket_height: int
    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int

    def upscales(self, width: int, height: int) -> bool:
        """Whether the image is smaller than what its bucket needs."""
        return self.resize_width > width or self.resize_height > height


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """All (width, height) that are multiples of `step`, of at most `resolution` squared pixels and about that many.

    Each width gets the largest height that keeps the area, so memory is bounded by the square; both orientations of every
    size are there, and no side ratio exceeds `max_aspect`.
    """
    area = resolution * resolution
    edge = resolution // step * step
    sizes: set[tuple[int, int]] = {(edge, edge)} if edge else set()
    for width in range(step, int(resolution * math.sqrt(max_aspect)) + step, step):
        height = area // width // step * step
        if height and max(width, height) <= max_aspect * min(width, height):
            sizes |= {(width, height), (height, width)}
    # Of several sizes with one width the tallest wins: (height, width) pairs can fall short of the area.
    tallest = {width: max(h for w, h in sizes if w == width) for width, _ in sizes}
    kept = {(width, height) for width, height in tallest.items()}
    return sorted(kept | {(height, width) for width, height in kept})


def place(width: int, height: int, sizes: list[tuple[int, int]]) -> Placement:
    """The bucket nearest by aspect ratio, which is the one that loses least to the crop; the crop is central."""
    aspect = width / height
    bucket_width, bucket_height = min(
        sizes, key=lambda size: (abs(math.log(size[0] / size[1] / aspect)), -size[0] * size[1], size)
    )
    scale = max(bucket_width / width, bucket_height / height)
    resize_width = max(bucket_width, round(width * scale))
    resize_height = max(bucket_height, round(height * scale))
    return Placement(
        bucket_width=bucket_width,
        bucket_height=bucket_height,
        resize_width=resize_width,
        resize_height=resize_height,
        crop_x=(resize_width - bucket_width) // 2,
        crop_y=(resize_height - bucket_height) // 2,
    )
