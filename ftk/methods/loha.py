"""LoHa: W + (alpha / rank) (B1 A1) * (B2 A2), an elementwise product of two low-rank ones, of rank up to rank squared.

Source: FedPara (Hyeon-Woo et al. 2021, arXiv 2108.06098); LyCORIS (Yeh et al. 2023, arXiv 2309.14859); trained by PEFT.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from ftk.methods.adapters import lycoris, peft_method


class LohaConfig(peft_method.PeftMethodConfig):
    """Settings under `method:`."""

    rank: int = Field(default=8, ge=1, description="of each of the two products")
    alpha: float | None = Field(default=None, gt=0, description="strength is alpha / rank; alpha = rank by default")
    rank_pattern: dict[str, int] = Field(default={}, description="other ranks, by the end of a module's name (an expression)")
    alpha_pattern: dict[str, float] = Field(default={}, description="other alphas")
    rank_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of a layer's rows that a step leaves unchanged")
    module_dropout: float = Field(default=0.0, ge=0, lt=1, description="chance that a step leaves out a layer's adapter")
    effective_convolution: bool = Field(default=False, description="factor larger kernels as FedPara's proposition 3 does")

    @property
    def own(self) -> dict[str, Any]:
        """What only PEFT's LoHa takes."""
        return {}


class Loha(lycoris.LycorisMethod):
    """The Hadamard product adapter of linear layers and convolutions; one factor is zero at first.

    Its state is `MODULE.hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, and `hada_t1`, `hada_t2` of factored kernels.
    """

    name = "loha"
    Config: ClassVar[type[BaseModel]] = LohaConfig
    FORMATS = ("peft", "comfyui", "kohya", "lycoris")
    REASONS: ClassVar[Mapping[str, str]] = {
        "diffusers": "diffusers' load_lora_adapter knows LoRA and LoKr alone. Write peft, which PEFT loads into the denoiser."
    }
    peft_class = "LoHaConfig"


METHOD = Loha()
