"""What passes between the stages: rows and manifests, with their schema versions. No behaviour.

Every schema on disk carries a version. A reader refuses a version that it does not know.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

PREPARED_SCHEMA = 1
CACHE_SCHEMA = 1
RUN_SCHEMA = 1

Role = Literal["instance", "class"]


class RejectReason(StrEnum):
    """Why an input is not in the output: a closed list, written to `rejects.parquet`."""

    CAPTION_MISSING = "caption_missing"
    CAPTION_EMPTY = "caption_empty"
    CAPTION_NOT_TEXT = "caption_not_text"
    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    UNSUPPORTED_MODE = "unsupported_mode"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_EXTREME_ASPECT = "too_extreme_aspect"
    CHANGED_WHILE_READING = "changed_while_reading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """One input that did not become a sample."""

    source: str
    path: str
    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One prepared sample; sizes in pixels, `width` and `height` those of the original after its EXIF orientation.

    `content_sha256` is of the file's bytes; `image_id` names the pixels that the sample holds (content and geometry).
    """

    key: str
    source: str
    content_sha256: str
    image_id: str
    width: int
    height: int
    bucket_width: int
    bucket_height: int
    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int
    flipped: bool
    captions: list[str]
    repeats: int
    role: Role
    num_controls: int
    has_mask: bool
    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A committed shard of a prepared dataset, and what it was made from."""

    name: str
    unit_fingerprint: str
    num_samples: int
    num_upscaled: int
    bytes: int
    sha256: str
    table_sha256: str
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedManifest:
    """`dataset.json`: committed last, names only committed shards."""

    schema_version: int
    fingerprint: str
    recipe: dict[str, Any]
    num_samples: int
    num_rejects: int
    num_upscaled: int
    rejects_by_reason: dict[str, int]
    buckets: dict[str, int]
    shards: list[ShardRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheManifest:
    """`cache.json`: what encoded the items, and from which prepared dataset. No absolute path.

    `encoders` maps `latents` and `texts` to the parts of their fingerprint, so that a mismatch can be shown part by part.
    """

    schema_version: int
    family: str
    latents_fingerprint: str
    texts_fingerprint: str
    encoders: dict[str, dict[str, Any]]
    normalisation: dict[str, Any]
    prepared_fingerprint: str
    prepared_recipe: dict[str, Any]
    num_samples: int
    samples_blake3: str
    empty_text: str
    prompts: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSample:
    """One row of `samples.parquet`: which cached items a training sample consists of."""

    key: str
    latents: str
    texts: list[str]
    bucket_width: int
    bucket_height: int
    repeats: int
    role: Role
