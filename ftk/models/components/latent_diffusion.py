"""What Stable Diffusion and SDXL share as families: U-Net, VAE, noise, and texts of 77 tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.models.base import NoiseSchedule
from ftk.models.components import clip, kl_vae, unet

if TYPE_CHECKING:
    import torch


class LatentDiffusion:
    """The part of `Family` in which they are alike."""

    geometry = unet.GEOMETRY
    max_text_tokens = clip.TOKENS
    pads_texts = True
    latent_components = ("vae",)
    text_components: tuple[str, ...]
    denoiser_components = ("unet", "scheduler")
    block_class = unet.BLOCK_CLASS
    encoder_targets = clip.TARGETS

    def load_vae(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """AutoencoderKL, frozen."""
        return kl_vae.load(directory, dtype).to(device)

    def normalisation(self, directory: Path) -> dict[str, Any]:
        """Per-channel mean and std: latents are (z - mean) / std, where std is 1 / `scaling_factor`."""
        return kl_vae.normalisation(directory)

    def image_flops(self, directory: Path, height: int, width: int) -> float:
        """Of the VAE's encoder."""
        return kl_vae.flops(directory, height, width)

    def encode_images(self, vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Posterior mean and std, times `scaling_factor`."""
        return kl_vae.encode(vae, pixels_BCHW)

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """Of the encoder's first stage."""
        return kl_vae.memory(vae, height, width)

    def decode(self, vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Inverse of the normalisation, then the decoder."""
        return kl_vae.decode(vae, latents_BCHW)

    def text_lengths(self, encoder: Any, captions: Sequence[str]) -> list[int]:
        """Always 77."""
        return [clip.TOKENS] * len(captions)

    def tokens_cut(self, directory: Path, captions: Sequence[str]) -> list[int]:
        """By the tokenizer that makes most of each."""
        names = [name for name in self.text_components if name.startswith("tokenizer")]
        counts = [clip.tokens_cut(clip.load_tokenizer(directory, name), captions) for name in names]
        return [max(each) for each in zip(*counts, strict=True)]

    def load_denoiser(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """UNet2DConditionModel, frozen."""
        return unet.load(directory, dtype, device)

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Epsilon or v, and the noise levels of training."""
        return unet.load_schedule(directory)

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """Classifier-free guidance; at 1 or less the pipeline leaves the negative prompt out."""
        return {"guidance_scale": guidance_scale}
