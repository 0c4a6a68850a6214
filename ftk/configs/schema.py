"""What a user may write in a run file. Unknown keys are refused; every bound is checked here.

Which methods and families exist is not known here: `method` and `model` keep their keys until `ftk.run.resolve` validates them
with the method's and the family's own models.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
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
from ftk.contracts import Role
from ftk.errors import did_you_mean

Device = Literal["auto", "cpu", "cuda", "mps"]
Crop = Literal["center", "random", "focus"]
HUB_ID = r"^[A-Za-z0-9][\w.-]*/[\w.-]+$"
_FILE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".tgz", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"})

Merged = TypeVar("Merged", "CaptionsConfig", "DataConfig")


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


RegularExpression = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]


class Section(BaseModel):
    """A part of the run file: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _require_default(section: Section, name: str, needed: str) -> None:
    """Refuse a setting that does nothing; its default does no harm, and a resolved file writes it out."""
    if getattr(section, name) != type(section).model_fields[name].default:
        raise ValueError(f"`{name}` has no effect without `{needed}`")


def _refuse_idle(section: "CaptionsConfig | DataConfig") -> None:
    for name, reason in section.idle().items():
        if getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(reason)


def _require_text(prompt: str) -> None:
    if not prompt.isascii() and prompt.encode("utf-8", "ignore").decode() != prompt:
        raise ValueError("half of a surrogate pair is no text: write the character itself")


def _refuse_misspelt(tree: Any, required: tuple[str, ...]) -> Any:
    """Refuse a key that is near to a required one which is missing."""
    missing = [name for name in required if name not in tree] if isinstance(tree, dict) else []
    for key in tree if missing else ():
        if meant := did_you_mean(str(key), missing):
            raise ValueError(f"`{key}` is not a setting.{meant}")
    return tree


class ModelConfig(BaseModel):
    """The base model: a folder in the Diffusers layout, a checkpoint or a Hub id; and settings of its family."""

    model_config = ConfigDict(extra="allow", frozen=True)

    family: str = Field(description="the architecture: `qwen-image`, `sdxl`, ...")
    path: str = Field(
        min_length=1, description="a folder in the Diffusers layout, a checkpoint in one .safetensors file, or a Hub id"
    )
    revision: str | None = Field(default=None, description="of a Hub id: a branch, a tag or a commit")
    variant: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_]+$", description="of weights that have several, such as `fp16`"
    )
    config: str | None = Field(
        default=None,
        min_length=1,
        description="of a checkpoint in one file: a folder in the Diffusers layout, or a Hub id, with the rest of the model",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_are_spelt_right(cls, tree: Any) -> Any:
        # Any key may be a setting of the family, so a misspelt one would only be missed.
        return _refuse_misspelt(tree, ("family", "path"))

    @property
    def settings(self) -> dict[str, Any]:
        """What only this family knows."""
        return dict(self.model_extra or {})


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
        _require_text(value)
        return value

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.guidance_scale <= 1:
            _require_default(self, "negative_prompt", "guidance_scale above 1")
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
        return _refuse_misspelt(tree, ("path",))

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
        """What only this kind of source knows."""
        return dict(self.model_extra or {})

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
            _require_default(self, "upscale_limit", "upscale: limit")
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
        own = [source.overrides for source in self.sources]
        for each in merged:
            _refuse_long_aspects(each)
        for name in (*OF_SOURCES, "max_aspect", "bucket_step"):
            _refuse_unused(name, self, merged, own)
        for name in CaptionsConfig.model_fields:
            _refuse_unused(name, self.captions, [each.captions for each in merged], [each["captions"] for each in own])
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
        own = source.overrides
        try:
            return _merged(self, {**own, "captions": _merged(self.captions, own["captions"])})
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


class CacheConfig(Section):
    """How images and captions are encoded, and where what was encoded lies."""

    path: str | None = Field(
        default=None, min_length=1, description="folder of the cache, WORKSPACE/cache by default; training reads URLs too"
    )
    device: Device = "auto"
    vae_dtype: Literal["float32", "tfloat32", "bfloat16"] = Field(
        default="float32", description="precision the VAE computes in; tfloat32: float32 with the fast convolutions of a GPU"
    )
    text_dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="precision the text encoder computes in")
    latents_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="stored precision of normalised latents"
    )
    text_stored: Literal["computed", "float16", "bfloat16", "float32"] = Field(
        default="computed", description="stored precision of texts; as they were computed by default"
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="working memory of one batch, which sets its size; 8 on a GPU, 1 on a CPU by default"
    )
    offload: Literal["auto", "none", "layers"] = Field(
        default="auto",
        description="layers: text encoder weights wait in host memory and visit the GPU one by one; auto: if they do not fit",
    )
    image_batch: int | None = Field(default=None, ge=1, description="images a VAE call, instead of by memory")
    text_batch: int | None = Field(default=None, ge=1, description="captions a text encoder call, instead of by memory")
    shard_bytes: int = Field(default=256 << 20, ge=1 << 10, description="bytes a cache shard")
    engine: Literal["local", "ray"] = Field(default="local", description="where shards are made: processes here, or Ray")
    processes: int = Field(default=0, ge=0, le=512, description="encoding processes here; 0 means one a GPU")
    full_hash: bool = Field(
        default=False, description="know the encoders by all bytes of their weights, not by samples of each tensor"
    )
    download_dir: str = Field(default="~/.cache/ftk", min_length=1, description="where shards of a URL are kept")
    download_gib: float = Field(default=64.0, gt=0, description="how much of them")

    @property
    def loaded_vae_dtype(self) -> str:
        """The precision of the VAE's weights."""
        return "float32" if self.vae_dtype == "tfloat32" else self.vae_dtype

    @property
    def stored_text_dtype(self) -> str:
        """The precision that texts are stored in."""
        return self.text_dtype if self.text_stored == "computed" else self.text_stored


class MethodConfig(BaseModel):
    """The way of training: its name, and settings that the method itself validates."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "lora"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class SigmaConfig(Section):
    """How noise levels are drawn; 1 is pure noise."""

    sampling: Literal["uniform", "logit_normal", "sigmoid", "mode", "beta"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    sigmoid_scale: float = Field(default=1.0, gt=0, description="sigma = sigmoid(scale n), n standard normal: kohya's name")
    mode_scale: float = Field(default=1.29, ge=-1.0, le=1.75)
    beta_alpha: float = Field(default=1.0, gt=0, description="of sigma's beta distribution; above 1 thins out clean images")
    beta_beta: float = Field(default=1.0, gt=0, description="above 1 thins out noise")
    shift: float | Literal["resolution"] | None = Field(
        default=None,
        description="s maps sigma to s sigma / (1 + (s - 1) sigma); resolution: it grows with an image's tokens",
    )
    minimum: float = Field(default=0.0, ge=0, lt=1, description="sigmas are squeezed into [minimum, maximum]")
    maximum: float = Field(default=1.0, gt=0, le=1)
    stratified: bool = Field(default=False, description="one draw from each of as many equal shares as a step has samples")
    continuous: bool = Field(default=False, description="any sigma, not those of the family's training table alone")
    weighting: Literal["none", "sigma_sqrt", "cosmap", "min_snr", "soft_min_snr", "debiased", "like_epsilon"] = "none"
    min_snr_gamma: float = Field(
        default=5.0, gt=0, description="signal-to-noise ratio above which min_snr and soft_min_snr weigh less"
    )

    @field_validator("shift")
    @classmethod
    def _shift_is_positive(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and value <= 0:
            raise ValueError("a shift is a number above 0, or `resolution`")
        return value

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        owners = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "sigmoid_scale": "sigmoid",
                  "mode_scale": "mode", "beta_alpha": "beta", "beta_beta": "beta"}  # fmt: skip
        for name, owner in owners.items():
            if self.sampling != owner:
                _require_default(self, name, f"sampling: {owner}")
        if self.weighting not in ("min_snr", "soft_min_snr"):
            _require_default(self, "min_snr_gamma", "weighting: min_snr")
        if self.minimum >= self.maximum:
            raise ValueError(f"`minimum` {self.minimum} is not below `maximum` {self.maximum}")
        return self


class LossConfig(Section):
    """How a prediction is compared with its target."""

    kind: Literal["mse", "l1", "huber", "smooth_l1"] = Field(
        default="mse",
        description="squared or absolute errors; huber: squared up to huber_delta; smooth_l1: huber / huber_delta",
    )
    huber_delta: float = Field(default=0.1, gt=0, description="errors above it count linearly; a latent's deviation is about 1")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        default="constant", description="huber_delta over the noise levels: it is that of pure noise, and 1 without noise"
    )
    prior_weight: float = Field(default=1.0, ge=0, description="weight of samples with `role: class` (prior preservation)")
    unmasked_weight: float = Field(
        default=0.0, ge=0, le=1, description="weight of what a sample's mask leaves out; 1 ignores masks"
    )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.kind not in ("huber", "smooth_l1"):
            _require_default(self, "huber_delta", "kind: huber")
            _require_default(self, "huber_schedule", "kind: huber")
        return self


class NoiseConfig(Section):
    """What noise is added to images, beside plain Gaussian noise."""

    offset: float = Field(default=0.0, ge=0, le=1, description="deviation of a random constant added to each channel")
    pyramid_levels: int = Field(default=0, ge=0, le=16, description="coarser layers of noise that are added; 0 adds none")
    pyramid_discount: float = Field(default=0.4, gt=0, le=1, description="weight of each layer over that of the finer one")
    perturbation: float = Field(
        default=0.0, ge=0, le=1, description="deviation of noise that the model sees and is not told to predict"
    )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.pyramid_levels:
            _require_default(self, "pyramid_discount", "pyramid_levels")
        elif self.offset:
            raise ValueError("`offset` and `pyramid_levels` both add coarse noise: leave one of them out")
        return self


class ParameterGroupConfig(Section):
    """Trained parameters that are treated otherwise than the rest."""

    match: RegularExpression = Field(description="a regular expression, searched in parameter names; the first match counts")
    learning_rate: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimizerConfig(BaseModel):
    """The optimizer: its name, and arguments of its own, which `ftk.train.optim` checks against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(default="adamw", min_length=1, description="a name that ftk knows, or a dotted class")
    groups: tuple[ParameterGroupConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _a_name_will_do(cls, tree: Any) -> Any:
        return {"name": tree} if isinstance(tree, str) else tree

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's own arguments."""
        return dict(self.model_extra or {})


_HAS_NO_END = ("constant", "piecewise_constant")


class ScheduleConfig(Section):
    """The learning rate over the steps; the curves of diffusers' `get_scheduler`."""

    name: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"] = "constant"
    steps: int | None = Field(default=None, ge=1, description="length of the curve; that of the run by default")
    warmup: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0, description="steps in which the rate rises from 0, or a share of the curve's length: 0.05"
    )
    minimum: float = Field(
        default=0.0, ge=0, lt=1, description="where the curve ends, as a share of the learning rate: 0.1 is a tenth of it"
    )
    cycles: int = Field(default=1, ge=1, description="of cosine_with_restarts")
    power: float = Field(default=1.0, gt=0, description="of polynomial")
    rules: str = Field(default="", description="of piecewise_constant: `1:100,0.1:200,0.01` is factor 1 up to step 100, ...")

    @model_validator(mode="before")
    @classmethod
    def _a_name_will_do(cls, tree: Any) -> Any:
        if isinstance(tree, str):
            return {"name": tree}
        if not isinstance(tree, dict) or "warmup_steps" not in tree:
            return tree
        # The name that `warmup` had when it was a number of steps alone.
        if "warmup" in tree:
            raise ValueError("`warmup_steps` is another name of `warmup`: leave it out")
        return {"warmup" if key == "warmup_steps" else key: value for key, value in tree.items()}

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        for name, owner in (("cycles", "cosine_with_restarts"), ("power", "polynomial"), ("rules", "piecewise_constant")):
            if self.name != owner:
                _require_default(self, name, f"name: {owner}")
        if self.name == "piecewise_constant":
            self._check_rules()
        if self.name in _HAS_NO_END:
            _require_default(self, "minimum", f"a schedule that falls; {self.name} does not")
            if not self._warms_up_by_share:
                _require_default(self, "steps", f"a schedule that has an end; {self.name} has none")
        if self.steps is not None and self.num_warmup(self.steps) >= self.steps:
            raise ValueError(f"`warmup` {self.warmup} takes all of the schedule's `steps`, {self.steps}")
        return self

    def _check_rules(self) -> None:
        if not re.fullmatch(r"(\d+(\.\d+)?:\d+,)*\d+(\.\d+)?", self.rules):
            raise ValueError("`rules` is FACTOR:STEP,FACTOR:STEP,...,FACTOR, for example 1:100,0.1")
        ends = [int(rule.split(":")[1]) for rule in self.rules.split(",")[:-1]]
        if ends != sorted(set(ends)):
            raise ValueError(f"the steps in `rules` must grow; they are {', '.join(map(str, ends))}")
        _require_default(self, "warmup", "a schedule other than piecewise_constant, which says its own")

    @property
    def _warms_up_by_share(self) -> bool:
        return isinstance(self.warmup, float) and self.warmup > 0

    @property
    def depends_on_run(self) -> bool:
        """Whether another number of steps of the run makes another curve of it."""
        return self.steps is None and (self.name not in _HAS_NO_END or self._warms_up_by_share)

    def num_warmup(self, run_steps: int) -> int:
        """Steps of the warm-up."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * (self.steps or run_steps))


class ValidationConfig(Section):
    """Samples that are not trained on and measured instead, with noise that never changes."""

    share: float = Field(default=0.0, ge=0, le=0.5, description="of the samples that are held out; 0 turns validation off")
    every: int = Field(default=100, ge=1, description="steps between two measurements; the last step is always measured")
    samples: int = Field(default=64, ge=1, description="held-out samples that are measured at most")
    sigmas: int = Field(default=4, ge=1, le=64, description="noise levels of each, spread evenly over the drawn distribution")
    patience: int | None = Field(default=None, ge=1, description="measurements without a better one after which training ends")

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.share:
            for name in ("every", "samples", "sigmas", "patience"):
                _require_default(self, name, "share")
        return self


class MemoryConfig(Section):
    """What is done so that training fits the device. `auto` is decided by the plan that `--dry-run` and `ftk doctor` print."""

    device_gib: float | None = Field(default=None, gt=0, description="memory to plan for; what the device has free by default")
    checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="blocks whose activations are computed again in the backward pass"
    )
    offload: Literal["auto", "none"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="blocks whose frozen weights wait in host memory until they are needed"
    )
    base: Literal["auto", "full", "int8"] = Field(
        default="auto", description="frozen weights: as train.precision says, or 8-bit integers (needs torchao)"
    )
    attention: Literal["auto", "native", "flash", "cudnn", "efficient", "math"] = "auto"
    compile: bool = Field(default=False, description="compile the repeated block; buckets are warmed up before the first step")


class TrainConfig(Section):
    """The training loop."""

    start_from: str | None = Field(
        default=None, min_length=1, description="an adapter to go on from: a .safetensors file or a folder, of ftk or others"
    )
    steps: int = Field(default=1000, ge=1, description="updates in all")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="length of the run in place of `steps`, which are computed from it when training begins",
    )
    global_batch_size: int = Field(default=1, ge=1, description="samples per optimizer step, over all processes")
    micro_batch_size: int = Field(
        default=1, ge=1, description="samples per forward pass, of one bucket; a step is cut into such parts"
    )
    remainder: Literal["smaller", "drop", "fill"] = Field(
        default="smaller", description="what becomes of the incomplete step at the end of an epoch"
    )
    group_by: Literal["bucket", "text_length"] = Field(
        default="bucket", description="text_length: a micro-batch's captions have equal lengths too, so attention needs no mask"
    )
    class_ratio: float | None = Field(
        default=None, gt=0, description="uses of class images for each use of an instance image; by their repeats by default"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="of a moving average of the weights, which is then delivered, drawn and validated",
    )
    sigma: SigmaConfig = SigmaConfig()
    loss: LossConfig = LossConfig()
    noise: NoiseConfig = NoiseConfig()
    posterior: Literal["sample", "mean", "frozen"] = Field(
        default="sample", description="draw latents afresh each epoch, use the mean, or one draw for good"
    )
    caption_dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples that train without their caption")
    caption_dropout_text: str | None = Field(
        default=None, description="what these train on; the family's own text for no prompt by default"
    )
    validation: ValidationConfig = ValidationConfig()
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="bf16", description="of the frozen weights and the computation; auto: bf16 where the device computes in it"
    )
    memory: MemoryConfig = MemoryConfig()
    device: Device = "auto"
    sharding: Literal["auto", "none", "fsdp"] = Field(
        default="auto",
        description="fsdp: frozen weights, and what `full` trains, split over processes (FSDP2); auto: where they do not fit",
    )
    timeout_seconds: float = Field(default=600.0, gt=0, description="after which a process that waits for another gives up")
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=250, ge=1)
    keep_last: int = Field(default=3, ge=1, description="checkpoints kept")
    keep_every: int | None = Field(default=None, ge=1, description="checkpoints at multiples of it are kept for good")
    max_bad_steps: int = Field(
        default=5, ge=1, description="steps in a row without a finite loss and gradient, after which training stops"
    )
    log_every: int = Field(default=10, ge=1, description="steps between log lines; the only times the device is waited for")
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), description="services that show the run, by the names that accelerate gives them"
    )
    project: str = Field(default="ftk", min_length=1, description="under which trackers list the run")

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_length(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("steps", 0) is not None:
            return tree
        return {name: value for name, value in tree.items() if name != "steps"}

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError(
                "`steps` and `epochs` are two ways to give the length of a run: leave one of them out (on the command line "
                "`--set train.steps=null` takes out what the run file has)"
            )
        return self

    @model_serializer(mode="wrap")
    def _with_one_length(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Steps that are still to be computed are not written out: what is written can be read again."""
        tree: dict[str, Any] = handler(self)
        return tree if self.epochs is None else {name: value for name, value in tree.items() if name != "steps"}

    @field_validator("caption_dropout_text")
    @classmethod
    def _dropped_text_is_text(cls, value: str | None) -> str | None:
        _require_text(value or "")
        return value

    @model_validator(mode="after")
    def _dropped_text_takes_effect(self) -> Self:
        if not self.caption_dropout:
            _require_default(self, "caption_dropout_text", "caption_dropout")
        return self

    @model_validator(mode="after")
    def _micro_batch_is_part_of_a_step(self) -> Self:
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than global_batch_size {self.global_batch_size}: a step "
                f"is cut into micro-batches. Raise global_batch_size, or lower micro_batch_size."
            )
        return self


class AddedAdapterConfig(Section):
    """What another run delivered, drawn together with this one by `ftk sample`."""

    path: str = Field(min_length=1, description="a folder with a LoRA, LoHa or LoKr, in diffusers' or PEFT's format")
    strength: float = Field(default=1.0, ge=-10, le=10)


def negative_key(negative: str | None) -> str:
    """What a cache lists a negative prompt under; no text has a key that no prompt has."""
    return "\0" if negative is None else negative


class PromptConfig(Section):
    """A prompt, with the images that are drawn from."""

    prompt: str
    references: tuple[str, ...] = Field(default=(), description="files of input images, for an edit model")
    controls: tuple[str, ...] = Field(default=(), description="files of control images, for a method that reads them")

    def key(self, negative: str | Literal[False] | None = False) -> str:
        """What a cache lists this prompt under, or the negative one that goes with the same images; no path is in it."""
        text = self.prompt if negative is False else negative_key(negative)
        files = [list(self.references), list(self.controls)]
        return f"{text} #{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}" if any(files) else text


def _prompt(value: Any) -> Any:
    """A prompt alone will do; a union would complain of both forms."""
    if isinstance(value, (str, PromptConfig)):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("a prompt, or {prompt: ..., references: [...], controls: [...]}")
    return PromptConfig.model_validate(value)


Prompt = Annotated[str | PromptConfig, BeforeValidator(_prompt)]


class SampleConfig(Section):
    """Images drawn to look at. `strength` and `adapters` are for `ftk sample`: training draws the weights as they are."""

    prompts: tuple[Prompt, ...] = Field(default=(), description="prompts; with images: {prompt: ..., references: [FILE]}")
    negative_prompt: str | None = Field(
        default=None, description="what is not to be seen; the family's own text for no prompt by default"
    )
    every: int | None = Field(default=None, ge=1, description="steps between sample images while training; none by default")
    at_start: bool = Field(default=False, description="sample images before the first step, too: of what training begins with")
    num_inference_steps: int = Field(default=30, ge=1)
    guidance_scale: float = Field(default=4.0, ge=0, description="true classifier-free guidance; 1 or less turns it off")
    width: int | None = Field(default=None, ge=16, description="px; the first resolution by default")
    height: int | None = Field(default=None, ge=16)
    seed: int = Field(default=0, ge=0)
    device: Device = "auto"
    strength: float = Field(
        default=1.0, ge=-10, le=10, description="of the run's own LoRA, LoHa or LoKr; others load at 1 alone"
    )
    adapters: tuple[AddedAdapterConfig, ...] = Field(
        default=(), description="drawn on top of the run's own, in one more column"
    )

    @field_validator("prompts", "negative_prompt")
    @classmethod
    def _prompts_are_text(cls, value: tuple[Prompt, ...] | str | None) -> tuple[Prompt, ...] | str | None:
        for prompt in (value,) if isinstance(value, str) else value or ():
            _require_text(prompt if isinstance(prompt, str) else prompt.prompt)
        return value

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.prompts:
            _require_default(self, "at_start", "prompts")
        return self

    @property
    def draws_in_training(self) -> bool:
        """Whether `ftk train` draws images."""
        return bool(self.prompts) and (self.at_start or self.every is not None)

    @property
    def entries(self) -> tuple[PromptConfig, ...]:
        """The prompts with their images, of which most have none."""
        return tuple(PromptConfig(prompt=each) if isinstance(each, str) else each for each in self.prompts)


class CardConfig(Section):
    """What the model card and the metadata of delivered files say beside what ftk knows of the run."""

    title: str | None = Field(default=None, min_length=1, max_length=200, description="the run's name by default")
    description: str | None = Field(default=None, min_length=1)
    author: str | None = Field(default=None, min_length=1)
    license: str | None = Field(
        default=None, pattern=r"^[a-z0-9][a-z0-9.+-]*$", description="the Hub's name of it: apache-2.0, openrail++, other"
    )
    license_name: str | None = Field(default=None, min_length=1, description="of a licence that the Hub has no name for")
    license_link: str | None = Field(default=None, min_length=1, description="where its text is")
    base_model: str | None = Field(
        default=None, pattern=HUB_ID, description="the base's Hub id, where model.path is a folder of this machine"
    )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.license == "other" and self.license_name is None:
            raise ValueError("`license: other` needs a `license_name` beside it")
        if self.license != "other":
            _require_default(self, "license_name", "license: other")
            _require_default(self, "license_link", "license: other")
        return self


class RunConfig(Section):
    """One run file: it drives every stage."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="names the folder under runs/")
    workspace: str = Field(default="work", min_length=1)
    model: ModelConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    card: CardConfig = CardConfig()
