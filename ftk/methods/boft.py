"""BOFT: OFT whose rotation is a product of block-diagonal ones with permutations between them, and a scale for each output.

With one butterfly factor it is OFT by the exact Cayley transform. More need PEFT's CUDA extension, compiled on first use.

Source: Liu et al. 2023 (arXiv 2311.06243); trained by PEFT.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftk.errors import ConfigError
from ftk.methods import _peft
from ftk.methods.base import EVERYTHING, Components, TargetPattern, Targets, check_format
from ftk.methods.oft import REASONS
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

_DEFAULT_BLOCK = 4


class BoftConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block_size: int | None = Field(default=None, ge=2, description="inputs that a block rotates; 4 if neither is given")
    block_num: int | None = Field(default=None, ge=1, description="blocks a layer")
    butterfly_factors: int = Field(default=1, ge=1, description="block-diagonal factors; above 1 only with a CUDA compiler")
    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the blocks that a step leaves unrotated")
    bias: Literal["none", "all", "boft_only"] = Field(default="none", description="biases that are trained too")
    layers: tuple[int, ...] | None = Field(default=None, description="numbers of the blocks to train; all by default")
    layers_pattern: str | None = Field(default=None, description="the list that holds them, such as transformer_blocks")

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.block_num is not None and self.block_size is not None:
            raise ValueError("`block_num` and `block_size` exclude each other: their product is the number of a layer's inputs")
        if self.layers_pattern is not None and self.layers is None:
            raise ValueError("`layers_pattern` has no effect without `layers`")
        if self.layers is not None and (isinstance(self.targets, TargetPattern) or self.targets == EVERYTHING):
            raise ValueError("`layers` goes with a group or a list of targets; an expression names its layers itself")
        return self


class Boft:
    """The butterfly orthogonal adapter of linear layers and 1x1 convolutions."""

    name = "boft"
    Config: ClassVar[type[BaseModel]] = BoftConfig
    NEEDS = ("denoiser",)
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("peft",)

    def attach(self, components: Components, family: Family, config: BoftConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter; rotations are none and scales one, so training starts at the base.

        Raises:
            ConfigError: blocks do not divide a layer's inputs, or more factors than PEFT can compute here.
        """
        import peft

        denoiser: Any = components["denoiser"]
        names = _peft.select(denoiser, family, config.targets, _peft.linear_or_pointwise)
        settings = peft.BOFTConfig(
            boft_block_num=config.block_num or 0,
            boft_block_size=config.block_size or (0 if config.block_num else _DEFAULT_BLOCK),
            boft_n_butterfly_factor=config.butterfly_factors,
            boft_dropout=config.dropout,
            bias=config.bias,
            layers_to_transform=None if config.layers is None else list(config.layers),
            layers_pattern=config.layers_pattern,
            target_modules=_peft.as_peft_targets(denoiser, family, config.targets, names),
        )
        with warnings.catch_warnings():
            # It says for each layer that the extension is missing, which matters to more than one factor alone.
            warnings.filterwarnings("ignore", module="peft.tuners.boft")
            parameters = _peft.attach(denoiser, settings, seed)
        made = next(layer.boft_R[_peft.ADAPTER].shape[0] for layer in _peft.adapted(denoiser).values())
        if made != config.butterfly_factors:
            raise ConfigError(
                f"method.butterfly_factors: {config.butterfly_factors} need PEFT's CUDA extension, which could not be compiled "
                f"here (it takes CUDA, nvcc and ninja). Leave it at 1."
            )
        return parameters

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """`MODULE.boft_R` [factors, blocks, size, size] and `MODULE.boft_s` [out, 1]. Trained biases."""
        return _peft.state(components["denoiser"])

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        _peft.load_state(components["denoiser"], state)

    def export(
        self,
        components: Components,
        family: Family,
        config: BoftConfig,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """A PEFT directory."""
        check_format(self.name, self.FORMATS, form, REASONS)
        denoiser: Any = components["denoiser"]
        settings = _peft.for_delivery(denoiser.peft_config[_peft.ADAPTER])
        return _peft.export_directory(directory, settings, self.state(components), metadata)

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """PEFT's settings and tensors, injected."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft.tuners.boft")
            _peft.load_directory(pipeline, directory)

    def merge(self, components: Components) -> None:
        """Rotate and scale each adapted weight and remove the adapter."""
        _peft.merge(components["denoiser"])

    def usage(self, family: Family) -> str:
        """PEFT's loader."""
        return _peft.usage(family)


METHOD = Boft()
