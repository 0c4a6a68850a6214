"""What a user may write in a run file. Unknown keys are refused; every bound is checked here.

Which methods and families exist is not known here: `method` and `model` keep their keys until `ftk.run.resolve` validates them
with the method's and the family's own models.
"""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from ftk.configs.data import (
    OF_SOURCES,
    CaptionsConfig,
    CaptionSettings,
    Crop,
    DataConfig,
    GenerateConfig,
    SourceCaptions,
    SourceConfig,
)
from ftk.configs.sampling import AddedAdapterConfig, Prompt, PromptConfig, SampleConfig, negative_key
from ftk.configs.section import Device, RegularExpression, Section, refuse_misspelt, require_default
from ftk.configs.training import (
    LossConfig,
    MemoryConfig,
    NoiseConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    PreservationConfig,
    ScheduleConfig,
    SigmaConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "HUB_ID",
    "OF_SOURCES",
    "AddedAdapterConfig",
    "CacheConfig",
    "CaptionSettings",
    "CaptionsConfig",
    "CardConfig",
    "Crop",
    "DataConfig",
    "Device",
    "GenerateConfig",
    "LossConfig",
    "MemoryConfig",
    "MethodConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "PreservationConfig",
    "Prompt",
    "PromptConfig",
    "RegularExpression",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "Section",
    "SigmaConfig",
    "SourceCaptions",
    "SourceConfig",
    "TrainConfig",
    "ValidationConfig",
    "negative_key",
]

HUB_ID = r"^[A-Za-z0-9][\w.-]*/[\w.-]+$"


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
        return refuse_misspelt(tree, ("family", "path"))

    @property
    def settings(self) -> dict[str, Any]:
        """What only this family knows."""
        return dict(self.model_extra or {})


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
            require_default(self, "license_name", "license: other")
            require_default(self, "license_link", "license: other")
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
