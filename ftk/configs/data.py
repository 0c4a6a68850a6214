"""The section `data` of a run file: sources, sizes, captions."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ftk import locations
from ftk.configs.aspects import Aspect, ratio
from ftk.configs.resolutions import Resolution
from ftk.configs.section import Device, Section, refuse_misspelt, require_default, require_text
from ftk.contracts import Role

Crop = Literal["center", "random", "focus"]
_FILE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".tgz", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"})
Merged = TypeVar("Merged", "CaptionsConfig", "DataConfig")


def _refuse_idle(section: "CaptionsConfig | DataConfig") -> None:
    for name, reason in section.idle().items():
        if getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(reason)


class GenerateConfig(Section):
    """Class images that the base model draws where a folder has too few of them: `ftk prepare --make-class-images`."""

    prompt: str = Field(min_length=1, description="what is drawn, and the caption of each drawn image: the class's name")
    count: int = Field(default=100, ge=1, description="class images that the folder must hold, your own among them")
    negative_prompt: str = " "
    guidance_scale: float = Field(default=4.0, ge=0, description="classifier-free guidance; 1 or less turns it off")
    num_inference_steps: int = Field(default=30, ge=1)
    width: int | None = Field(default=None, ge=16, description="px; the first resolution by default")
    height: int | None = Field(default=None, ge=16)
    seed: int = Field(default=0, ge=0, description="each image has a seed of its own, from this one and its index")
    batch_size: int = Field(default=1, ge=1, description="images drawn at once")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="precision of the weights that draw")
    device: Device = "auto"

    @field_validator("negative_prompt")
    @classmethod
    def _negative_prompt_is_text(cls, value: str) -> str:
        require_text(value)
        return value

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.guidance_scale <= 1:
            require_default(self, "negative_prompt", "guidance_scale above 1")
        return self


class CaptionSettings(Section):
    """The settings of captions, each taken by itself."""

    wildcards: int = Field(
        default=32, ge=0, le=1024, description="variants of a caption with {a|b} at most; 0: braces are left as they are"
    )
    tag_shuffles: int = Field(default=0, ge=0, le=64, description="shuffled variants of each caption's tags, beside itself")
    tag_separator: str = Field(default=",", min_length=1)
    keep_tags: int = Field(default=1, ge=0, description="leading tags that a shuffle leaves in place")
    long_chars: int = Field(default=2000, ge=1, description="longer captions are kept, and counted in the report")


class CaptionsConfig(CaptionSettings):
    """What is done to captions, whatever source they come from."""

    def idle(self) -> dict[str, str]:
        """By name, why a setting does nothing beside the others."""
        names = () if self.tag_shuffles else ("tag_separator", "keep_tags")
        return {name: f"`{name}` has no effect without `tag_shuffles`" for name in names}

    @model_serializer(mode="wrap")
    def _without_the_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes that were stored before there were wildcards stay equal to those of today."""
        plain: dict[str, Any] = handler(self)
        if self.wildcards == type(self).model_fields["wildcards"].default:
            plain.pop("wildcards", None)
        return plain


class SourceCaptions(CaptionSettings):
    """What one source says itself of its captions; the rest is as `data.captions` says."""

    @model_serializer(mode="wrap")
    def _only_what_was_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class SourceConfig(BaseModel):
    """Where images come from. Settings of one kind of source (`format`) are kept, and validated by that kind itself."""

    model_config = ConfigDict(extra="allow", frozen=True)

    path: str = Field(min_length=1, description="a folder, a table, tars, or a Hub dataset; a local path or an fsspec URL")
    format: str = Field(default="auto", description="kind of source; by the path's suffix when auto")
    name: str | None = Field(default=None, description="part of each sample's key; the folder's name by default")
    repeats: int | float = Field(
        default=1,
        ge=0.001,
        le=1_000_000,
        allow_inf_nan=False,
        description="times per epoch that each image is seen; 0.5: half of the images in each epoch, taking turns",
    )
    role: Role = "instance"
    caption: str | None = Field(default=None, description="used for images that have no caption of their own")
    trigger: str | None = Field(default=None, description="put before each caption that does not contain it")
    prefix: str | None = Field(default=None, description="put before each caption")
    suffix: str | None = Field(default=None, description="put after each caption")
    references: tuple[str, ...] = Field(
        default=(), description="input images of an edit model, named as `controls` are; they keep a size of their own"
    )
    generate: GenerateConfig | None = Field(default=None, description="class images to draw where the folder has too few")
    resolutions: tuple[Resolution, ...] | None = Field(
        default=None, min_length=1, description="of this source, in place of data.resolutions"
    )
    crop: Crop | None = Field(default=None, description="of this source, in place of data.crop")
    crops: int | None = Field(default=None, ge=1, le=64, description="of this source, in place of data.crops")
    aspects: tuple[Aspect, ...] | None = Field(
        default=None, min_length=1, description="of this source, in place of data.aspects"
    )
    flip: bool | None = Field(default=None, description="of this source, in place of data.flip")
    caption_settings: SourceCaptions | None = Field(
        default=None, description="of this source, in place of those in data.captions; `captions` where that names no columns"
    )

    @model_validator(mode="before")
    @classmethod
    def _captions_may_be_settings(cls, tree: Any) -> Any:
        # Tables, tars and Hub datasets list their columns of captions under this name.
        if not isinstance(tree, dict) or not isinstance(tree.get("captions"), Mapping):
            return tree
        if tree.get("caption_settings") is not None:
            raise ValueError("`captions` and `caption_settings` both hold settings: write them once")
        return {
            **{name: value for name, value in tree.items() if name != "captions"},
            "caption_settings": tree["captions"] or None,
        }

    @model_validator(mode="before")
    @classmethod
    def _path_is_spelt_right(cls, tree: Any) -> Any:
        # Any key may be a setting of the kind of source, so a misspelt one would only be missed.
        return refuse_misspelt(tree, ("path",))

    @model_validator(mode="before")
    @classmethod
    def _made_controls_stand_in_a_list(cls, tree: Any) -> Any:
        given = tree if isinstance(tree, Mapping) else {}
        if isinstance(given.get("controls"), Mapping):
            raise ValueError("`controls` is a list: write [{make: canny}]")
        references = given.get("references")
        if any(isinstance(entry, Mapping) for entry in (references if isinstance(references, (list, tuple)) else [references])):
            raise ValueError("`references` are given: an entry that says what to `make` stands under `controls`")
        return tree

    @field_validator("repeats")
    @classmethod
    def _whole_repeats_are_integers(cls, value: int | float) -> int | float:
        return int(value) if value == int(value) else value

    @model_validator(mode="after")
    def _images_can_be_generated(self) -> Self:
        if self.generate is None:
            return self
        if self.role != "class":
            raise ValueError("`generate` draws class images: it needs `role: class` beside it")
        is_file = self.format == "auto" and PurePath(self.path).suffix.lower() in _FILE_SUFFIXES
        if locations.is_url(self.path) or is_file or self.format not in ("auto", "folder"):
            raise ValueError("`generate` puts images into a folder of this machine: `path` must name one")
        if self.settings.get("captions_from", "sidecar") != "sidecar":
            raise ValueError("`generate` writes a caption beside each image: leave `captions_from` out")
        if self.settings.get("masks") or self.settings.get("controls") or self.references:
            raise ValueError("`generate` draws no masks and no other images: leave `masks`, `controls` and `references` out")
        return self

    @field_validator("resolutions")
    @classmethod
    def _resolutions_differ(cls, value: tuple[Resolution, ...] | None) -> tuple[Resolution, ...] | None:
        return value if value is None else _each_once(value)

    @property
    def settings(self) -> dict[str, Any]:
        """What only this kind of source knows; of `controls`, those that it finds."""
        settings = dict(self.model_extra or {})
        if self.made_controls:
            settings["controls"] = [control for control in settings["controls"] if not isinstance(control, Mapping)]
            if not settings["controls"]:
                del settings["controls"]
        return settings

    @property
    def made_controls(self) -> tuple[tuple[int, Mapping[str, Any]], ...]:
        """Entries of `controls` that are made from the images, `{make: canny}`: each with its position in the list."""
        controls = (self.model_extra or {}).get("controls")
        entries = enumerate(controls if isinstance(controls, (list, tuple)) else ())
        return tuple((position, control) for position, control in entries if isinstance(control, Mapping))

    def place_of_control(self, number: int) -> str:
        """What messages call the number-th of the control images and references that the source finds: `controls.0`."""
        made = {position for position, _ in self.made_controls}
        controls = (self.model_extra or {}).get("controls") or ()
        places = [f"controls.{position}" for position in range(len(controls)) if position not in made]
        places += [f"references.{position}" for position in range(len(self.references))]
        return places[number]

    @property
    def overrides(self) -> dict[str, Any]:
        """What it says itself in place of the settings of `data`; of captions a mapping, which may be empty."""
        captions = self.caption_settings.model_dump() if self.caption_settings else {}
        settings = {name: getattr(self, name) for name in OF_SOURCES if getattr(self, name) is not None}
        return {**settings, "captions": captions}

    @property
    def source_name(self) -> str:
        """The name under which this source's samples and rejects are listed."""
        path = PurePath(locations.without_secrets(self.path))
        # A file is called after the folder that it lies in: all tables are called metadata.
        names = [path.parent.name, path.stem] if path.suffix.lower() in _FILE_SUFFIXES else [path.name]
        return self.name or next((name for name in names if name and not set("*?[{") & set(name)), "images")


class DataConfig(Section):
    """How images become samples."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    resolutions: tuple[Resolution, ...] = Field(
        default=(1024,),
        min_length=1,
        description="edges (px) of squares whose area a bucket keeps; WIDTHxHEIGHT: that very size; native: the family's own",
    )
    max_aspect: float = Field(default=2.0, ge=1.0, le=16.0, description="longest side over shortest of the widest bucket")
    bucket_step: int | None = Field(
        default=None, ge=8, description="bucket sides are multiples of this; the family's pixel multiple by default"
    )
    upscale: Literal["always", "limit", "never"] = Field(
        default="always", description="whether an image may be enlarged to reach its bucket; else it gets no sample there"
    )
    upscale_limit: float = Field(default=1.5, gt=1.0, description="largest enlargement of a side under `upscale: limit`")
    min_size: int = Field(default=1, ge=1, description="px; an image with a shorter side is rejected")
    crop: Crop = Field(
        default="center", description="random: anywhere, fixed by the image's content; focus: libvips' attention crop"
    )
    crops: int = Field(
        default=1, ge=1, le=64, description="crops of each image under `crop: random` or with `aspects`, each a sample"
    )
    aspects: tuple[Aspect, ...] = Field(
        default=(),
        description="aspect ratios that crops are cut to (`original`, 4:3), taken in turn; by default the image's own",
    )
    flip: bool = Field(default=False, description="a mirrored sample beside each")
    resize: Literal["gamma", "linear"] = Field(
        default="gamma", description="whether pixels are averaged as stored, as viewers and trainers do, or as light"
    )
    captions: CaptionsConfig = CaptionsConfig()
    duplicates: Literal["keep", "first", "error"] = Field(
        default="keep", description="what becomes of images whose files are equal, byte for byte"
    )
    near_duplicate_bits: int = Field(
        default=4, ge=0, le=16, description="images whose perceptual hashes differ in at most so many bits of 64 are reported"
    )
    image_format: Literal["auto", "png", "jpeg", "webp"] = Field(
        default="auto", description="auto: JPEG for images that were lossy, PNG for the rest"
    )
    quality: int | None = Field(
        default=None, ge=1, le=100, description="of JPEG (95 by default, 4:4:4) and WebP (lossless by default)"
    )
    background: tuple[int, int, int] = Field(default=(255, 255, 255), description="RGB under transparent pixels")
    animated: Literal["first", "reject"] = Field(default="first", description="what becomes of images of several frames")
    max_pixels: int = Field(default=200_000_000, ge=1, description="larger images are rejected on their header")
    max_input_aspect: float = Field(
        default=8.0, ge=1.0, description="longer images are rejected rather than cropped to a sliver"
    )
    max_reject_fraction: float = Field(
        default=0.1, ge=0.0, le=1.0, description="above this share of rejects `prepare` exits with code 3"
    )
    max_unreachable_fraction: float = Field(
        default=0.1, ge=0.0, le=1.0, description="share of inputs whose files may not be reachable over the network"
    )
    shard_samples: int = Field(default=256, ge=1, le=1_000_000, description="images a tar shard")
    engine: Literal["local", "ray"] = Field(default="local", description="where shards are made: processes here, or Ray")
    workers: int = Field(default=0, ge=0, le=512, description="processes (on Ray: of each shard); 0 means one a core")
    worker_seconds: float = Field(default=120.0, gt=0, description="an image that takes longer is rejected")
    worker_memory_gib: float = Field(default=4.0, gt=0, description="an image that makes a worker take more is rejected")

    @field_validator("background")
    @classmethod
    def _background_in_range(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(0 <= channel <= 255 for channel in value):
            raise ValueError("each of red, green and blue lies in 0 to 255")
        return value

    @model_validator(mode="after")
    def _source_names_are_unique(self) -> Self:
        names = [source.source_name for source in self.sources]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two sources are called {', '.join(doubled)}: give each a `name:` of its own")
        return self

    @field_validator("resolutions")
    @classmethod
    def _resolutions_differ(cls, value: tuple[Resolution, ...]) -> tuple[Resolution, ...]:
        return _each_once(value)

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.upscale != "limit":
            require_default(self, "upscale_limit", "upscale: limit")
        if self.quality is not None and self.image_format == "png":
            raise ValueError("`quality` has no effect on PNG: leave it out, or choose `image_format: jpeg`")
        return self

    def idle(self) -> dict[str, str]:
        """By name, why a setting of buckets and crops does nothing beside the others."""
        reasons = {}
        if self.crop != "random" and len(self.aspects) < 2:
            reasons["crops"] = (
                f"`crops: {self.crops}` needs `crop: random`, or several `aspects`: every {self.crop} crop of an image is the "
                "same"
            )
        if not any(isinstance(resolution, int) for resolution in self.resolutions):
            names = ("max_aspect", "bucket_step")
            reasons |= {name: f"`{name}` has no effect without an edge in `resolutions`" for name in names}
        return reasons

    @model_validator(mode="after")
    def _settings_of_sources_go_together(self) -> Self:
        if not self._has_overrides:
            _refuse_idle(self)
            _refuse_idle(self.captions)
        merged = [self.of(source) for source in self.sources]
        overrides = [source.overrides for source in self.sources]
        for each in merged:
            _refuse_long_aspects(each)
        for name in (*OF_SOURCES, "max_aspect", "bucket_step"):
            _refuse_unused(name, self, merged, overrides)
        for name in CaptionsConfig.model_fields:
            _refuse_unused(name, self.captions, [each.captions for each in merged], [each["captions"] for each in overrides])
        return self

    @property
    def _has_overrides(self) -> bool:
        return any(source.overrides != {"captions": {}} for source in self.sources)

    def of(self, source: SourceConfig) -> "DataConfig":
        """The settings as they are for one of the sources: its own come before those of all.

        A common setting that does nothing beside the source's own has its default there.

        Raises:
            ValueError: one of its own does nothing.
        """
        if not self._has_overrides:
            return self
        overrides = source.overrides
        try:
            return _merged(self, {**overrides, "captions": _merged(self.captions, overrides["captions"])})
        except ValueError as error:
            raise ValueError(f"source {source.source_name}: {error}") from None

    @property
    def resolutions_in_use(self) -> tuple[Resolution, ...]:
        """Those of all sources, each once; the common ones come first where any source has them."""
        merged = [self.of(source).resolutions for source in self.sources]
        common = self.resolutions if self.resolutions in merged else ()
        return tuple(dict.fromkeys([*common, *(resolution for each in merged for resolution in each)]))


OF_SOURCES = tuple(name for name in DataConfig.model_fields if name in SourceConfig.model_fields)
"""Settings of `data` that a source may have of its own."""


def _each_once(resolutions: tuple[Resolution, ...]) -> tuple[Resolution, ...]:
    for resolution in resolutions:
        if resolutions.count(resolution) > 1:
            what = "edge" if isinstance(resolution, int) else "size"
            raise ValueError(f"`resolutions` names the same {what} twice: {resolution}")
    return resolutions


def _refuse_long_aspects(data: DataConfig) -> None:
    """Refuse an aspect that no bucket of an edge is near to; of sizes that are listed any may be meant."""
    edges = [resolution for resolution in data.resolutions if isinstance(resolution, int)]
    for aspect in data.aspects if edges else ():
        width_to_height = ratio(aspect)
        if width_to_height is not None and max(width_to_height, 1 / width_to_height) > data.max_aspect:
            raise ValueError(f"`aspects`: {aspect} is longer than any bucket: raise `max_aspect`, which is {data.max_aspect:g}")


def _refuse_unused(name: str, common: Section, merged: Sequence[Section], own: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a common setting that has an effect in no source; one that every source replaces waits for other sources."""
    value = getattr(common, name)
    if value == type(common).model_fields[name].default or all(name in each for each in own):
        return
    if all(getattr(each, name) != value for each in merged):
        raise ValueError(f"`{name}` has no effect in any source: their own settings leave no use for it")


def _merged(common: Merged, own: Mapping[str, Any]) -> Merged:
    """`own` settings over common ones, without those common ones that do nothing beside them.

    Raises:
        ValueError: one of its own does nothing.
    """
    merged = common.model_copy(update=own)
    fields = type(common).model_fields
    inherited = {name: fields[name].default for name in merged.idle() if name not in own}
    merged = merged.model_copy(update=inherited)
    _refuse_idle(merged)
    return merged
