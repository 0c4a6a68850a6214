"""LoKr: W + (alpha / rank) C (x) (B A), a Kronecker product of a small matrix with a larger one, whole or of low rank.

Source: KronA (Edalati et al. 2022, arXiv 2212.10650); LyCORIS (Yeh et al. 2023, arXiv 2309.14859); trained by PEFT.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from ftk.methods.adapters import formats, injection, lycoris, peft_directory, peft_method
from ftk.models.base import Family


class LokrConfig(peft_method.PeftMethodConfig):
    """Settings under `method:`."""

    rank: int = Field(default=16, ge=1, description="a factor is whole where the rank is half of its longer side or more")
    alpha: float | None = Field(default=None, gt=0, description="strength is alpha / rank; alpha = rank by default")
    rank_pattern: dict[str, int] = Field(default={}, description="other ranks, by the end of a module's name (an expression)")
    alpha_pattern: dict[str, float] = Field(default={}, description="other alphas")
    decompose_factor: int = Field(default=-1, description="a side of the small matrix, where it divides; -1: near the root")
    decompose_both: bool = Field(default=False, description="make the small matrix of low rank too")
    initialisation: Literal["default", "lycoris"] = Field(
        default="default", description="which factor is zero: the first, or as in LyCORIS the second"
    )
    rank_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of a layer's rows that a step leaves unchanged")
    rank_dropout_scale: bool = Field(default=False, description="scale up the rows that rank_dropout leaves")
    module_dropout: float = Field(default=0.0, ge=0, lt=1, description="chance that a step leaves out a layer's adapter")
    effective_convolution: bool = Field(default=False, description="factor larger kernels as FedPara's proposition 3 does")

    @field_validator("decompose_factor")
    @classmethod
    def _is_a_factor(cls, value: int) -> int:
        if value != -1 and value < 2:
            raise ValueError("-1, or a side of 2 or more")
        return value

    @property
    def own(self) -> dict[str, Any]:
        """What only PEFT's LoKr takes."""
        return {
            "decompose_factor": self.decompose_factor,
            "decompose_both": self.decompose_both,
            "init_weights": "lycoris" if self.initialisation == "lycoris" else True,
            "rank_dropout_scale": self.rank_dropout_scale,
        }


class Lokr(lycoris.LycorisMethod):
    """The Kronecker product adapter of linear layers and convolutions; one factor is zero at first.

    Its state is `MODULE.lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; the same of `w2`; `lokr_t2` of factored kernels.
    """

    name = "lokr"
    Config: ClassVar[type[BaseModel]] = LokrConfig
    FORMATS = ("diffusers", "peft", "comfyui", "kohya", "lycoris")
    peft_class = "LoKrConfig"

    def load_into(self, family: Family, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> Any:
        """diffusers' loader of one model: that of pipelines takes only names that contain `lora`. PEFT's of all else."""
        if (directory / peft_directory.CONFIG_FILE).exists():
            return super().load_into(family, pipeline, directory, adapter)
        path, denoiser = directory / formats.SINGLE_FILE, getattr(pipeline, family.denoiser_attribute)
        peft_directory.check_fits(denoiser, peft_directory.read_tensors(path), path)
        with peft_directory.explaining(path):
            denoiser.load_lora_adapter(directory, prefix=None, use_safetensors=True, adapter_name=adapter)
        peft_directory.load_encoders(pipeline, directory, adapter)
        return pipeline

    def usage(self, family: Family, settings: LokrConfig) -> str:
        """diffusers' loader of the denoiser, PEFT's of text encoders and of `modules_to_save`."""
        if settings.modules_to_save is not None:
            return super().usage(family, settings)
        arguments = '"path/to/this/folder", prefix=None, use_safetensors=True'
        line = f"pipeline.{family.denoiser_attribute}.load_lora_adapter({arguments})"
        return "\n".join([line, *peft_directory.usage_of_encoders(self.encoders(family, settings))])


METHOD = Lokr()
