"""Aspect-ratio buckets: sizes that images are resized and cropped to, so that a batch has one shape. All sides in pixels."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction


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
        return self.enlargement(width, height) > 1

    def enlargement(self, width: int, height: int) -> float:
        """Times that the image's sides grow to cover the bucket; less than 1 when they shrink."""
        return max(self.bucket_width / width, self.bucket_height / height)

    @property
    def slack(self) -> tuple[int, int]:
        """Pixels of the resized image that the crop leaves out: (across, down). One of them is 0."""
        return self.resize_width - self.bucket_width, self.resize_height - self.bucket_height

    def at(self, crop_x: int, crop_y: int) -> "Placement":
        """The same size, cropped as near to (crop_x, crop_y) as the resized image allows."""
        across, down = self.slack
        return replace(self, crop_x=min(max(crop_x, 0), across), crop_y=min(max(crop_y, 0), down))


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
    nearest = min(sizes, key=lambda size: (abs(math.log(size[0] / size[1] / aspect)), -size[0] * size[1], size))
    return cover(width, height, nearest)


def place_exactly(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> Placement:
    """The size of a given list that loses least to the crop, which is central.

    Of several of one aspect ratio it is the largest that the image need not be enlarged for, or else the smallest. Of two
    that lose the same, one to the left and right and one above and below, the upright.
    """

    def kept_share(size: tuple[int, int]) -> Fraction:
        ratio = Fraction(size[0] * height, size[1] * width)
        return min(ratio, 1 / ratio)

    most = max(map(kept_share, sizes))
    upright = min(Fraction(*size) for size in sizes if kept_share(size) == most)
    fitting = sorted((size for size in sizes if Fraction(*size) == upright), key=lambda size: size[0])
    smaller = [size for size in fitting if size[0] <= width and size[1] <= height]
    return cover(width, height, smaller[-1] if smaller else fitting[0])


def cover(width: int, height: int, bucket: tuple[int, int]) -> Placement:
    """The smallest resize that covers the bucket, cropped at its centre."""
    bucket_width, bucket_height = bucket
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


def follow(leader: Placement, width: int, height: int) -> Placement:
    """Where a mask or control of its own size goes: it covers the leader's bucket, cropped at the same relative place.

    A companion of the leader's own size gets the leader's placement.
    """
    own = cover(width, height, (leader.bucket_width, leader.bucket_height))

    def same_place(slack: int, leader_slack: int, leader_crop: int) -> int:
        return round(slack * leader_crop / leader_slack) if leader_slack else slack // 2

    return own.at(
        same_place(own.slack[0], leader.slack[0], leader.crop_x),
        same_place(own.slack[1], leader.slack[1], leader.crop_y),
    )


def largest_part(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """(width, height) of the largest part of an image that has this ratio of width to height; all of it for None."""
    if aspect is None:
        return width, height
    return max(1, round(min(Fraction(width), height * aspect))), max(1, round(min(Fraction(height), width / aspect)))


def share_out(aspects: Sequence[str], content_sha256: str, crops: int) -> dict[str, list[int]]:
    """Which of an image's crops, by number, are cut to which aspect.

    They take the aspects in turn, from one on that the content's hash decides: one crop is of a random one, and as many
    crops as there are aspects are one of each.
    """
    first = int.from_bytes(hashlib.sha256(f"ftk aspect {content_sha256}".encode()).digest()[:8], "big")
    shares: dict[str, list[int]] = {}
    for number in range(crops):
        shares.setdefault(aspects[(first + number) % len(aspects)], []).append(number)
    return shares


def random_crops(placement: Placement, content_sha256: str, numbers: Iterable[int]) -> tuple[Placement, ...]:
    """Crops anywhere in the resized image, equal ones once; drawn from the content's hash and the crop's number alone.

    No library's generator takes part, so that a crop stays where it is whatever is upgraded, and an image keeps its crops
    when others come or go.
    """
    across, down = placement.slack
    drawn: list[Placement] = []
    for number in numbers:
        digest = hashlib.sha256(f"ftk crop {content_sha256} {number}".encode()).digest()
        x, y = (int.from_bytes(digest[start : start + 8], "big") for start in (0, 8))
        # 64-bit fractions of the places that there are.
        drawn.append(placement.at(x * (across + 1) >> 64, y * (down + 1) >> 64))
    return tuple(dict.fromkeys(drawn))
