"""LoHa: W + (alpha / rank) (B1 A1) * (B2 A2), an elementwise product of two low-rank ones, of rank up to rank squared.

Source: FedPara (Hyeon-Woo et al. 2021, arXiv 2108.06098); LyCORIS (Yeh et al. 2023, arXiv 2309.14859); trained by PEFT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk.methods import _lycoris, _peft
from ftk.methods.base import Components, Targets, check_format
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch


class LohaConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, ge=1, description="of each of the two products")
    alpha: float | None = Field(default=None, gt=0, description="strength is alpha / rank; alpha = rank by default")
    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
    rank_pattern: dict[str, int] = Field(default={}, description="other ranks, by the end of a module's name (an expression)")
    alpha_pattern: dict[str, float] = Field(default={}, description="other alphas")
    rank_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of a layer's rows that a step leaves unchanged")
    module_dropout: float = Field(default=0.0, ge=0, lt=1, description="chance that a step leaves out a layer's adapter")
    effective_convolution: bool = Field(default=False, description="factor larger kernels as FedPara's proposition 3 does")

    @property
    def own(self) -> dict[str, Any]:
        """What only PEFT's LoHa takes."""
        return {}


class Loha:
    """The Hadamard product adapter of linear layers and convolutions."""

    name = "loha"
    Config: ClassVar[type[BaseModel]] = LohaConfig
    NEEDS = ("denoiser",)
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("peft", "comfyui", "kohya", "lycoris")

    def attach(self, components: Components, family: Family, config: LohaConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter; one factor is zero, so training starts at the base."""
        import peft

        return _lycoris.attach(components, family, config, seed, peft.LoHaConfig)

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """`MODULE.hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, and `hada_t1`, `hada_t2` of factored kernels."""
        return _peft.state(components["denoiser"])

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        _peft.load_state(components["denoiser"], state)

    def export(
        self,
        components: Components,
        family: Family,
        config: LohaConfig,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """Every format holds the scale in `hada_w1_a`, with alpha = rank."""
        reason = "diffusers' load_lora_adapter knows LoRA and LoKr alone. Write peft, which PEFT loads into the denoiser."
        check_format(self.name, self.FORMATS, form, {"diffusers": reason})
        if form == "peft":
            return _lycoris.export_peft(components["denoiser"], config, directory, metadata)
        return _lycoris.export_named(components["denoiser"], family, directory, form, metadata)

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """PEFT's settings and tensors, injected."""
        _peft.load_directory(pipeline, directory)

    def merge(self, components: Components) -> None:
        """Add the product to each adapted weight and remove the adapter."""
        _peft.merge(components["denoiser"])

    def usage(self, family: Family) -> str:
        """PEFT's loader."""
        return _peft.usage(family)


METHOD = Loha()
