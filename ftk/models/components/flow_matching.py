"""What flow-matching transformers share: their scheduler, and latents as tokens of 2 x 2 cells.

Shape legend: B batch, C latent channels, H W latent cells, N = H W / 4 tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ftk.errors import ModelError
from ftk.models.components import configuration
from ftk.models.components.loading import reading
from ftk.models.components.schedule import NoiseSchedule, TokenShift

if TYPE_CHECKING:
    import torch


def load_schedule(directory: Path) -> NoiseSchedule:
    """The training table of a `FlowMatchEulerDiscreteScheduler`.

    `use_dynamic_shifting` leaves that table plain, sigma_i = (1000 - i) / 1000, and shifts with an image's tokens when it
    samples; a static shift is in the table.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    path = directory / "scheduler"
    config = configuration.scheduler(FlowMatchEulerDiscreteScheduler, path)
    with reading(path, "a scheduler"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    settings = scheduler.config
    sigmas = (scheduler.timesteps / settings.num_train_timesteps).float()
    if not (((sigmas > 0) & (sigmas <= 1)).all() and (sigmas.diff() < 0).all()):
        raise ModelError(f"{path}: its settings give no noise levels that fall from 1 to 0. Download the model again.")
    if settings.base_image_seq_len == settings.max_image_seq_len:
        raise ModelError(f"{path}: `base_image_seq_len` and `max_image_seq_len` are equal. Download the model again.")
    is_by_tokens = settings.use_dynamic_shifting and settings.time_shift_type == "exponential"
    token_shift = TokenShift(
        base_tokens=settings.base_image_seq_len,
        max_tokens=settings.max_image_seq_len,
        base_shift=settings.base_shift,
        max_shift=settings.max_shift,
    )
    return NoiseSchedule(
        objective="flow",
        sigmas=sigmas,
        token_shift=token_shift if is_by_tokens else None,
    )


def pack(latents_BCHW: "torch.Tensor") -> "torch.Tensor":
    """[B,N,4C]: 2 x 2 cells to a token, its channels outermost, as `_pack_latents` of the Qwen-Image and FLUX pipelines."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens_BND: "torch.Tensor", height: int, width: int) -> "torch.Tensor":
    """[B,C,H,W] of tokens that `pack` gives for these sides in latent cells."""
    batch, _, features = tokens_BND.shape
    channels = features // 4
    patches = tokens_BND.view(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
