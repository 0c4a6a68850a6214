"""diffusers' AutoencoderKL: the VAE of Stable Diffusion and SDXL (4 channels), and with a shift of many later models (16).

Shape legend: B batch, C latent channels, H W latent cells.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ModelError
from ftk.models.components import configuration
from ftk.models.components.loading import checked, load_component

if TYPE_CHECKING:
    import torch


class KLImages:
    """The members of `Family` that concern images, of a family whose VAE is an AutoencoderKL."""

    latent_components = ("vae",)

    def load_vae(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """AutoencoderKL, frozen."""
        return load(directory, dtype).to(device)

    def normalisation(self, directory: Path) -> dict[str, Any]:
        """Per-channel mean and std: latents are (z - mean) / std, where std is 1 / `scaling_factor` and mean `shift_factor`."""
        return normalisation(directory)

    def image_flops(self, directory: Path, height: int, width: int) -> float:
        """Of the VAE's encoder."""
        return flops(directory, height, width)

    def encode_images(self, vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Posterior (mean, std), less `shift_factor` and times `scaling_factor`."""
        return encode(vae, pixels_BCHW)

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """Of the encoder's first stage."""
        return memory(vae, height, width)

    def decode(self, vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Inverse of the normalisation, then the decoder."""
        return decode(vae, latents_BCHW)


def load(directory: Path, dtype: "torch.dtype") -> Any:
    """AutoencoderKL, frozen, on the CPU."""
    from diffusers import AutoencoderKL

    _check_constants(directory)
    return load_component(AutoencoderKL, directory, "vae", dtype).requires_grad_(False).eval()


def encode(vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Normalised posterior (mean, std) in fp32."""
    import torch

    with torch.inference_mode():
        posterior = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
        shift, scale = _affine(vae)
        mean: torch.Tensor = (posterior.mean.float() - shift) * scale
        std: torch.Tensor = posterior.std.float() * scale
    return mean, std


def decode(vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
    """Pixels of normalised latents."""
    import torch

    with torch.inference_mode():
        shift, scale = _affine(vae)
        latents_BCHW = latents_BCHW.to(vae.device).float() / scale + shift
        pixels: torch.Tensor = vae.decode(latents_BCHW.to(vae.dtype), return_dict=False)[0]
    return pixels


def normalisation(directory: Path) -> dict[str, Any]:
    """Mean and std of each channel, from the VAE's configuration."""
    shifts, scales = _constants(_vae_config(directory))
    return {"latents_mean": shifts, "latents_std": [1.0 / scale for scale in scales]}


def flops(directory: Path, height: int, width: int) -> float:
    """4.5e12 at 1024 px with the usual widths, counted by torch's FlopCounterMode; by the square of the first width."""
    first_width: int = _vae_config(directory).block_out_channels[0]
    return 4.5e12 * (first_width / 128) ** 2 * height * width / 1024**2


def memory(vae: Any, height: int, width: int) -> int:
    """A residual block at full size holds most: five tensors of its width at once.

    Those are the residual, what is normalised, the norm's result, its SiLU and a convolution's output. Attention is at an
    eighth of the sides, and its kernels keep no matrix of scores.
    """
    widths = [channels / 4**stage for stage, channels in enumerate(vae.config.block_out_channels)]
    return int(height * width * (5 * max(widths) + vae.config.in_channels) * vae.dtype.itemsize)


def tiny(scaling_factor: float) -> Any:
    """A VAE with the real factor of 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1,
        norm_num_groups=2, sample_size=64, scaling_factor=scaling_factor,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _vae_config(directory: Path) -> Any:
    """The VAE's configuration with the defaults of its class."""
    from diffusers import AutoencoderKL

    _check_constants(directory)
    return checked(AutoencoderKL, directory / "vae")


def _check_constants(directory: Path) -> None:
    """Check what latents are shifted and scaled by, which no weight can be compared with."""
    path = directory / "vae" / "config.json"
    tree = configuration.read(path)
    if "scaling_factor" in tree:
        configuration.number(path, tree, "scaling_factor", _is_positive, "a number above 0")
    check_statistics(path, tree, tree.get("latent_channels", 4))


def check_statistics(path: Path, tree: Mapping[str, Any], channels: Any) -> None:
    """Check the mean and deviation of each latent channel in the settings of a VAE, where there are any.

    Raises:
        ModelError: they are not a number for each channel, or a deviation is not above 0.
    """
    for name in ("latents_mean", "latents_std"):
        values = tree.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != channels:
            raise ModelError(f"{path}: `{name}` is {values!r:.80}. It must be a list of {channels} numbers, one per channel.")
        is_valid, rule = (math.isfinite, "numbers") if name == "latents_mean" else (_is_positive, "numbers above 0")
        for value in values:
            configuration.number(path, {name: value}, name, is_valid, rule)


def _is_positive(value: float) -> bool:
    return value > 0


def _constants(config: Any) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel: latents are (z - shift) scale.

    `shift_factor` is FLUX's and SD3's; a few VAEs have statistics of each channel instead, which SDXL's pipeline reads.
    """
    channels = config.latent_channels
    shifts, stds = config.latents_mean or [config.shift_factor or 0.0] * channels, config.latents_std or [1.0] * channels
    return list(shifts), [config.scaling_factor / std for std in stds]


def _affine(vae: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    shifts, scales = (torch.tensor(values, device=vae.device).view(1, -1, 1, 1) for values in _constants(vae.config))
    return shifts, scales
