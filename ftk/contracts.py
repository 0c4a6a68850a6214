"""What passes between the stages: rows and manifests, with their schema versions. No behaviour.

Every schema on disk carries a version. A reader refuses a version that it does not know.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

PREPARED_SCHEMA = 2
CACHE_SCHEMA = 2
RUN_SCHEMA = 2

Role = Literal["instance", "class"]


class RejectReason(StrEnum):
    """Why an input is not in the output: a closed list, written to `rejects.parquet`."""

    CAPTION_MISSING = "caption_missing"
    CAPTION_EMPTY = "caption_empty"
    CAPTION_NOT_TEXT = "caption_not_text"
    FILE_MISSING = "file_missing"
    UNREACHABLE = "unreachable"
    NOT_A_FILE = "not_a_file"
    NAME_TAKEN = "name_taken"
    DUPLICATE = "duplicate"
    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    ANIMATED = "animated"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_EXTREME_ASPECT = "too_extreme_aspect"
    MASK_MISSING = "mask_missing"
    MASK_UNREADABLE = "mask_unreadable"
    MASK_MISMATCHED = "mask_mismatched"
    CONTROL_MISSING = "control_missing"
    CONTROL_UNREADABLE = "control_unreadable"
    CONTROL_MISMATCHED = "control_mismatched"
    CONTROL_NOT_MADE = "control_not_made"
    TOO_MANY_REFERENCES = "too_many_references"
    WORKER_CRASHED = "worker_crashed"
    WORKER_TIMED_OUT = "worker_timed_out"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """One input that did not become a sample."""

    source: str
    path: str
    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmatchedCaption:
    """A text file of a source that is the caption of no image; `likely_image` is empty where no image has a name like it."""

    source: str
    path: str
    likely_image: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionFinding:
    """Captions of so many samples that are probably not meant as they are; `examples` are the first of them."""

    kind: str
    detail: str
    num_samples: int
    examples: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One prepared sample; sizes in pixels, `width` and `height` those of the original after its EXIF orientation.

    `content_sha256` is of the file's bytes; `image_id` names the pixels that the sample holds (content and geometry), and so
    do `mask_id` (empty when there is no mask), `control_ids`, and `reference_ids` of an edit model's input images. `seen_ids`
    are of these at the size at which the text encoder sees them, where that is another size.
    `perceptual_hash` is 64 bits as 16 hex digits, of the whole image: images that look alike differ in few bits. `flipped`:
    mirrored after the crop. `copied`: the source's own bytes.
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
    copied: bool
    perceptual_hash: str
    captions: list[str]
    repeats: int | float
    role: Role
    num_controls: int
    control_ids: list[str]
    has_mask: bool
    mask_id: str
    shard: str
    reference_ids: list[str] = field(default_factory=list)
    reference_widths: list[int] = field(default_factory=list)
    reference_heights: list[int] = field(default_factory=list)
    seen_ids: list[str] = field(default_factory=list)
    seen_widths: list[int] = field(default_factory=list)
    seen_heights: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A committed shard of a prepared dataset, and what it was made from.

    A unit of work gives one shard, or several when its partition holds more records than a shard takes: `is_last` says
    which one ends it. `recipe_fingerprint` stands for every setting that shaped it, `contents_fingerprint` for every input
    byte that went into it. `buckets` maps WIDTHxHEIGHT to samples. `empty_masks` has the image's path for each sample whose
    mask is black all over. `fallback_captions` are the paths of the first images that have no caption of their own and took
    their source's. `num_cut_wildcards` counts images with a caption of more variants than were taken.
    """

    name: str
    is_last: bool
    recipe_fingerprint: str
    contents_fingerprint: str
    num_inputs: int
    num_samples: int
    num_upscaled: int
    num_copied: int
    num_long_captions: int
    buckets: dict[str, int]
    bytes: int
    sha256: str
    table_sha256: str
    rejects: list[Reject] = field(default_factory=list)
    empty_masks: list[str] = field(default_factory=list)
    num_fallback_captions: int = 0
    fallback_captions: list[str] = field(default_factory=list)
    num_cut_wildcards: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedManifest:
    """`dataset.json`: committed last, names only committed shards.

    Of the images that took their source's `caption:` and of the text files that belong to no image it has the number, and
    the first by name. `hints` are sentences about the sources.
    """

    schema_version: int
    fingerprint: str
    recipe: dict[str, Any]
    num_inputs: int
    num_samples: int
    num_rejects: int
    num_upscaled: int
    num_copied: int
    num_long_captions: int
    num_duplicates: int
    num_near_duplicates: int
    rejects_by_reason: dict[str, int]
    buckets: dict[str, int]
    shards: list[ShardRecord]
    num_empty_masks: int = 0
    num_fallback_captions: int = 0
    fallback_captions: list[str] = field(default_factory=list)
    num_cut_wildcards: int = 0
    num_unmatched_captions: int = 0
    unmatched_captions: list[UnmatchedCaption] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    caption_findings: list[CaptionFinding] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheManifest:
    """`cache.json`: what encoded the items, from which prepared dataset, and the tables that list them. No absolute path.

    `encoders` maps `latents` and `texts` to the parts of their fingerprint, so that a mismatch can be shown part by part.
    `prompts` maps prompts to items of `texts`; `prompt_images` maps those that have images to `references` and `controls`,
    items of `latents`, and `shared_texts` maps those whose text begins with states of its references to these, an item of
    `texts`; `preservation` are the settings that `preserved_texts` come from. All three are left out of the file where they are
    empty. `tables` maps `samples`, `latents`, `texts` and `shards` to the BLAKE3 of the Parquet file; `digest` is the BLAKE3 of
    this file with an empty `digest`.
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
    empty_text: str
    prompts: dict[str, str]
    tables: dict[str, str]
    digest: str = ""
    prompt_images: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    shared_texts: dict[str, str] = field(default_factory=dict)
    preservation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSample:
    """One row of the samples' table: which cached items a training sample consists of, and its geometry in pixels.

    `latents`, `controls` and `mask` (empty when there is none) are items of `latents`; `texts` has an item of `texts` for
    each caption and `text_lengths` their tokens. Sizes, crop and flip are those of the prepared sample. The five about
    references are columns of caches with references alone: items of `latents`, their sides in pixels, the empty caption beside
    them, which is "" where texts do not depend on references, and the item of `texts` that all texts of these references begin
    with, which is "" where they have nothing in common. `preserved_texts` is there alone where `train.loss.preservation` asks
    for them: an item of `texts` for each caption, or "".
    """

    key: str
    latents: str
    controls: list[str]
    mask: str
    texts: list[str]
    text_lengths: list[int]
    width: int
    height: int
    bucket_width: int
    bucket_height: int
    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int
    flipped: bool
    repeats: int | float
    role: Role
    references: list[str] = field(default_factory=list)
    reference_widths: list[int] = field(default_factory=list)
    reference_heights: list[int] = field(default_factory=list)
    empty_text: str = ""
    shared_text: str = ""
    preserved_texts: list[str] = field(default_factory=list)
