"""LoKr: W + (alpha / rank) C (x) (B A), a Kronecker product of a small matrix with a larger one, whole or of low rank.

Source: KronA (Edalati et al. 2022, arXiv 2212.10650); LyCORIS (Yeh et al. 2023, arXiv 2309.14859); trained by PEFT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ftk.methods import _formats, _lycoris, _peft
from ftk.methods.base import Components, Targets, check_format
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch


class LokrConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1, description="a factor is whole where the rank is half of its longer side or more")
    alpha: float | None = Field(default=None, gt=0, description="strength is alpha / rank; alpha = rank by default")
    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
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


class Lokr:
    """The Kronecker product adapter of linear layers and convolutions."""

    name = "lokr"
    Config: ClassVar[type[BaseModel]] = LokrConfig
    NEEDS = ("denoiser",)
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("diffusers", "peft", "comfyui", "kohya", "lycoris")

    def attach(self, components: Components, family: Family, config: LokrConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter; one factor is zero, so training starts at the base."""
        import peft

        return _lycoris.attach(components, family, config, seed, peft.LoKrConfig)

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """`MODULE.lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; the same of `w2`; `lokr_t2` of factored kernels."""
        return _peft.state(components["denoiser"])

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        _peft.load_state(components["denoiser"], state)

    def export(
        self,
        components: Components,
        family: Family,
        config: LokrConfig,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """Every format holds the scale in the first factor, with alpha = rank."""
        check_format(self.name, self.FORMATS, form, {})
        denoiser: Any = components["denoiser"]
        if form == "diffusers":
            return _lycoris.export_diffusers(denoiser, config, directory, metadata)
        if form == "peft":
            return _lycoris.export_peft(denoiser, config, directory, metadata)
        return _lycoris.export_named(denoiser, family, directory, form, metadata)

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """diffusers' own loader of the denoiser; `load_lora_weights` takes only names that contain `lora`."""
        path, denoiser = directory / _formats.SINGLE_FILE, _peft.denoiser_of(pipeline)
        _peft.check_fits(denoiser, _peft.read_tensors(path), path)
        with _peft.explaining(path):
            denoiser.load_lora_adapter(directory, prefix=None, use_safetensors=True, adapter_name=_peft.ADAPTER)

    def merge(self, components: Components) -> None:
        """Add the product to each adapted weight and remove the adapter."""
        _peft.merge(components["denoiser"])

    def usage(self, family: Family) -> str:
        """diffusers' loader."""
        arguments = '"path/to/this/folder", prefix=None, use_safetensors=True'
        return f"pipeline.{_formats.component(family)}.load_lora_adapter({arguments})"


METHOD = Lokr()
