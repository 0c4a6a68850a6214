"""BOFT: OFT whose rotation is a product of block-diagonal ones with permutations between them, and a scale for each output.

With one butterfly factor it is OFT by the exact Cayley transform. More need PEFT's CUDA extension, compiled on first use.

Source: Liu et al. 2023 (arXiv 2311.06243); trained by PEFT.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ftk.errors import ConfigError
from ftk.methods.adapters import injection, peft_method, targets
from ftk.methods.adapters.targets import TrainedComponent
from ftk.methods.oft import REASONS
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

_DEFAULT_BLOCK = 4


class BoftConfig(peft_method.PeftMethodConfig):
    """Settings under `method:`."""

    block_size: int | None = Field(default=None, ge=2, description="inputs that a block rotates; 4 if neither is given")
    block_num: int | None = Field(default=None, ge=1, description="blocks a layer")
    butterfly_factors: int = Field(default=1, ge=1, description="block-diagonal factors; above 1 only with a CUDA compiler")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the blocks that a step leaves unrotated")
    bias: Literal["none", "all", "boft_only"] = Field(default="none", description="biases that are trained too")

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.block_num is not None and self.block_size is not None:
            raise ValueError("`block_num` and `block_size` exclude each other: their product is the number of a layer's inputs")
        return self


class Boft(peft_method.PeftMethod):
    """The butterfly orthogonal adapter of linear layers and 1x1 convolutions.

    Its state is `MODULE.boft_R` [factors, blocks, size, size], `MODULE.boft_s` [out, 1], and trained biases. Rotations are none
    and scales one at first, so training starts at the base.
    """

    name = "boft"
    Config: ClassVar[type[BaseModel]] = BoftConfig
    REASONS = REASONS

    def refusal(self, layer: "torch.nn.Module") -> str | None:
        """Larger kernels do not see channels one by one."""
        return targets.linear_or_pointwise(layer)

    def peft_config(self, component: TrainedComponent, names: Sequence[str], settings: BoftConfig) -> Any:
        """PEFT's settings; numbers of blocks are the denoiser's."""
        import peft

        return peft.BOFTConfig(
            boft_block_num=settings.block_num or 0,
            boft_block_size=settings.block_size or (0 if settings.block_num else _DEFAULT_BLOCK),
            boft_n_butterfly_factor=settings.butterfly_factors,
            boft_dropout=settings.dropout,
            bias=settings.bias,
            target_modules=targets.as_peft_targets(component, names),
        )

    def inject(
        self, component: TrainedComponent, peft_config: Any, settings: BoftConfig, seed: int
    ) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter.

        Raises:
            ConfigError: blocks do not divide a layer's inputs, or more factors than PEFT can compute here.
        """
        with _without_warnings():
            parameters = injection.inject(component.module, peft_config, seed)
        made = next(layer.boft_R[injection.ADAPTER].shape[0] for layer in injection.adapted(component.module).values())
        if made != settings.butterfly_factors:
            raise ConfigError(
                f"method.butterfly_factors: {settings.butterfly_factors} need PEFT's CUDA extension, which could not be "
                f"compiled here (it takes CUDA, nvcc and ninja). Leave it at 1."
            )
        return parameters

    def load_into(self, family: Family, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> Any:
        """PEFT's settings and tensors, injected."""
        with _without_warnings():
            return super().load_into(family, pipeline, directory, adapter)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PEFT says for each layer that the extension is missing, which matters to more than one factor alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft.tuners.boft")
        yield


METHOD = Boft()
