"""OFT: W R, where R is block-diagonal and orthogonal: it rotates a layer's inputs, and keeps the angles between neurons.

R is the Cayley transform (I + Q)(I - Q)^-1 of a skew-symmetric Q, zero at the start; by default its Neumann series, cut off,
which is cheaper and orthogonal to a few digits while Q is small (OFTv2). COFT keeps Q within a radius.

Source: Qiu et al. 2023 (arXiv 2306.07280); OFTv2, Qiu et al. 2025 (arXiv 2506.19847); trained by PEFT.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ftk.errors import ConfigError
from ftk.methods.adapters import injection, peft_method, targets
from ftk.methods.adapters.targets import TrainedComponent

if TYPE_CHECKING:
    import torch

_DEFAULT_BLOCK = 32
_MERGE = "Merge it into the weights, and use those."
REASONS = {
    "diffusers": "diffusers' loaders know LoRA and LoKr alone. Write peft, which PEFT loads into the denoiser.",
    "comfyui": f"ComfyUI's OFT rotates a layer's outputs, this one its inputs: no names make one of the other. {_MERGE}",
    "kohya": f"sd-scripts' OFT rotates a layer's outputs, this one its inputs: no names make one of the other. {_MERGE}",
    "lycoris": f"LyCORIS' OFT rotates a layer's outputs, this one its inputs: no names make one of the other. {_MERGE}",
}


class OftConfig(peft_method.PeftMethodConfig):
    """Settings under `method:`."""

    r: int | None = Field(default=None, ge=1, description="blocks a layer; more of them are smaller, with fewer parameters")
    block_size: int | None = Field(default=None, ge=2, description="inputs that a block rotates; 32 if neither is given")
    module_dropout: float = Field(default=0.0, ge=0, lt=1, description="chance that a step leaves a block unrotated")
    coft: bool = Field(default=False, description="keep the rotation within a radius of the identity")
    eps: float = Field(default=6e-5, gt=0, description="COFT's radius of a layer; a block's is eps / sqrt(blocks)")
    block_share: bool = Field(default=False, description="one block for all of a layer")
    use_cayley_neumann: bool = Field(default=True, description="the cut-off series; else the exact transform, slower")
    num_cayley_neumann_terms: int = Field(default=5, ge=2)
    init_weights: bool = Field(default=True, description="start at the base; false: from random rotations")
    bias: Literal["none", "all", "oft_only"] = Field(default="none", description="biases that are trained too")

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.r is not None and self.block_size is not None:
            raise ValueError("`r` and `block_size` exclude each other: r x block_size is the number of a layer's inputs")
        fields = type(self).model_fields
        if not self.coft and self.eps != fields["eps"].default:
            raise ValueError("`eps` has no effect without `coft: true`")
        if not self.use_cayley_neumann and self.num_cayley_neumann_terms != fields["num_cayley_neumann_terms"].default:
            raise ValueError("`num_cayley_neumann_terms` has no effect without `use_cayley_neumann: true`")
        if self.block_share and self.module_dropout:
            raise ValueError("`module_dropout` has no effect with `block_share`, which has one block alone")
        return self


class Oft(peft_method.PeftMethod):
    """The orthogonal adapter of linear layers and 1x1 convolutions.

    Its state is `MODULE.oft_R.weight` [blocks, block (block - 1) / 2], the upper triangle of each Q, and trained biases. Q is
    zero at first, so training starts at the base.
    """

    name = "oft"
    Config: ClassVar[type[BaseModel]] = OftConfig
    REASONS = REASONS

    def refusal(self, layer: "torch.nn.Module") -> str | None:
        """Larger kernels do not see channels one by one."""
        return targets.linear_or_pointwise(layer)

    def peft_config(self, component: TrainedComponent, names: Sequence[str], settings: OftConfig) -> Any:
        """PEFT's settings; numbers of blocks are the denoiser's."""
        import peft

        block_size = settings.block_size or (_DEFAULT_BLOCK if settings.r is None else None)
        _check_blocks(component, names, settings.r, block_size)
        return peft.OFTConfig(
            r=settings.r or 0,
            oft_block_size=block_size or 0,
            module_dropout=settings.module_dropout,
            coft=settings.coft,
            eps=settings.eps,
            block_share=settings.block_share,
            use_cayley_neumann=settings.use_cayley_neumann,
            num_cayley_neumann_terms=settings.num_cayley_neumann_terms,
            init_weights=settings.init_weights,
            bias=settings.bias,
            target_modules=targets.as_peft_targets(component, names),
        )

    def inject(
        self, component: TrainedComponent, peft_config: Any, settings: OftConfig, seed: int
    ) -> "dict[str, torch.nn.Parameter]":
        """With the dropout that PEFT leaves out."""
        parameters = injection.inject(component.module, peft_config, seed)
        if settings.module_dropout:
            for layer in injection.adapted(component.module).values():
                _drop_blocks(layer, settings.module_dropout)
        return parameters


def _check_blocks(component: TrainedComponent, names: Sequence[str], r: int | None, block_size: int | None) -> None:
    """Blocks must divide a layer's inputs: PEFT would take another number and only warn."""
    modules = dict(component.module.named_modules())
    for name in names:
        layer = modules[name]
        inputs = layer.in_features if hasattr(layer, "in_features") else layer.in_channels
        given, setting = (r, "r") if r is not None else (block_size, "block_size")
        assert given is not None
        if inputs % given:
            divisors = [number for number in range(2, inputs + 1) if inputs % number == 0]
            near = sorted(sorted(divisors, key=lambda number: abs(number - given))[:4])
            raise ConfigError(
                f"method.{setting}: {given} does not divide the {inputs} inputs of {name}. Near it, "
                f"{', '.join(map(str, near))} do; or leave the layer out of {component.setting}."
            )


def _drop_blocks(layer: Any, chance: float) -> None:
    """While training, pass on each block's inputs unrotated with this chance: as its R were the identity.

    PEFT (0.21) takes `module_dropout` and never applies it.
    """
    import torch

    rotation, block_size = layer.oft_R[injection.ADAPTER], layer.oft_block_size[injection.ADAPTER]
    axis = 1 if isinstance(layer.get_base_layer(), torch.nn.Conv2d) else -1

    def drop(module: Any, inputs: Any, rotated: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return rotated
        (plain,) = inputs
        is_dropped = torch.rand(rotated.shape[axis] // block_size, device=rotated.device) < chance
        shape = [1] * rotated.ndim
        shape[axis] = rotated.shape[axis]
        return torch.where(is_dropped.repeat_interleave(block_size).reshape(shape), plain, rotated)

    rotation.register_forward_hook(drop)


METHOD = Oft()
