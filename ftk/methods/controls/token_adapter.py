"""A T2I-Adapter of transformers: what it makes of a control image is added to the tokens after each block.

diffusers has such adapters of U-Nets alone. As there, pixels are unshuffled and pass through residual blocks; a transformer
has one resolution, so the stages differ in their blocks, and each ends in a projection of zeros: training starts at the base.

Shape legend: B batch, H W pixels, N image tokens, D hidden width.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.adapter import AdapterResnetBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

MOST_STAGES = 4
"""As many as diffusers' adapters of U-Nets have."""


def num_used(stages: int, blocks: int) -> int:
    """How many of so many stages a denoiser of so many blocks uses: diffusers gives each to as many blocks, rounded up."""
    return math.ceil(blocks / math.ceil(blocks / stages))


class TokenAdapter(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Pixels [B,3,H,W] in [0, 1] to one [B,N,D] for each stage.

    Args:
        width: channels of the residual blocks.
        hidden_width: D, of the denoiser.
        stages: how many features.
        num_res_blocks: residual blocks of a stage.
        pixels: a side of a token; both sides of an image are multiples of it.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int, hidden_width: int, stages: int, num_res_blocks: int, pixels: int) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(pixels)
        self.conv_in = nn.Conv2d(3 * pixels**2, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(*(AdapterResnetBlock(width) for _ in range(num_res_blocks))) for _ in range(stages)
        )
        self.projections = nn.ModuleList(nn.Conv2d(width, hidden_width, 1) for _ in range(stages))
        for parameter in self.projections.parameters():
            nn.init.zeros_(parameter)

    def forward(self, pixels_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """The features, tokens row by row."""
        hidden_BCHW, features = self.conv_in(self.unshuffle(pixels_BCHW)), []
        for stage, projection in zip(self.body, self.projections, strict=True):
            hidden_BCHW = stage(hidden_BCHW)
            features.append(projection(hidden_BCHW).flatten(2).transpose(1, 2))
        return features
