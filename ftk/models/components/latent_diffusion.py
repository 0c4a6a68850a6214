"""What Stable Diffusion and SDXL share as families: U-Net, VAE, noise, and texts of 77 tokens or a few windows of them."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from ftk.errors import ConfigError
from ftk.models.base import AdapterNames, ControlForm, FamilyConfig
from ftk.models.components import clip, control_networks, kl_vae, placeholders, unet
from ftk.models.components.geometry import ReferenceRule
from ftk.models.components.placeholders import Placeholders
from ftk.models.components.schedule import NoiseSchedule
from ftk.models.components.single_file import Layout

if TYPE_CHECKING:
    import torch

SINGLE_FILE: Mapping[str, Sequence[Layout]] = {
    "unet": (
        Layout(
            model_class="UNet2DConditionModel",
            anchor="input_blocks.0.0.weight",
            prefixes=("model.diffusion_model.", "diffusion_model."),
        ),
        Layout(model_class="UNet2DConditionModel", anchor="down_blocks.0.resnets.0.conv1.weight", prefixes=("", "unet.")),
    ),
    "vae": (Layout(model_class="AutoencoderKL", anchor="encoder.conv_in.weight", prefixes=("first_stage_model.",)),),
}
"""What checkpoints in one file hold beside text encoders."""


class LatentDiffusionConfig(FamilyConfig):
    """Settings under `model:`."""

    max_text_tokens: Literal[75, 150, 225] = Field(
        default=75, description="tokens of a caption that are kept; more than 75 are encoded in windows of 75, as sd-scripts do"
    )
    clip_skip: int | None = Field(
        default=None, ge=1, le=11, description="layers of CLIP that are left out at the end, as diffusers counts them"
    )


class LatentDiffusion(kl_vae.KLImages):
    """The part of `Family` in which they are alike."""

    Config: ClassVar[type[BaseModel]] = LatentDiffusionConfig
    geometry = unet.GEOMETRY
    pads_texts = True
    sigma_defaults: Mapping[str, Any] = {}
    native_sizes: tuple[tuple[int, int], ...]
    references: ReferenceRule | None = None
    text_components: tuple[str, ...]
    denoiser_components = ("unet", "scheduler")
    denoiser_attribute = "unet"
    block_classes = unet.BLOCK_CLASSES
    encoder_targets = clip.TARGETS
    trainable_encoders: tuple[str, ...]
    embedding_keys: Mapping[str, str]
    kohya_names_are_original = False
    """Whether sd-scripts name the U-Net's layers as in the original model, not as diffusers."""
    control_form: ControlForm = "pixels"
    encode_texts: Callable[..., "list[dict[str, torch.Tensor]]"]
    pipeline_texts: Callable[..., dict[str, Any]]

    def __init__(self, config: LatentDiffusionConfig | None = None) -> None:
        self.config = config or LatentDiffusionConfig()

    @property
    def max_text_tokens(self) -> int:
        """With the beginning and the end of a text: 77 by default."""
        return int(self.config.max_text_tokens) + 2

    @property
    def text_windows(self) -> int:
        """How many times a text encoder reads 77 tokens of a text."""
        return int(self.config.max_text_tokens) // 75

    def text_lengths(self, encoder: Any, captions: Sequence[str | None]) -> list[int]:
        """Always the most: texts are padded."""
        return [self.max_text_tokens] * len(captions)

    def tokens_cut(self, directory: Path, captions: Sequence[str], tokens: Placeholders | None = None) -> list[int]:
        """By the tokenizer that makes most of each."""
        tokenizers = [self.tokenizer_with(directory, name, tokens or {}) for name in self.token_encoders]
        counts = [clip.tokens_cut(tokenizer, captions, self.text_windows) for tokenizer in tokenizers]
        return [max(each) for each in zip(*counts, strict=True)]

    @property
    def token_encoders(self) -> Mapping[str, str]:
        """All text encoders."""
        return {name: name.replace("text_encoder", "tokenizer") for name in self.trainable_encoders}

    def tokenizer_with(self, directory: Path, encoder: str, tokens: Placeholders) -> Any:
        """CLIPTokenizer."""
        tokenizer = clip.load_tokenizer(directory, self.token_encoders[encoder])
        placeholders.add(tokenizer, tokens)
        return tokenizer

    def load_denoiser(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """UNet2DConditionModel, frozen."""
        return unet.load(directory, dtype, device)

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Epsilon or v, and the noise levels of training."""
        return unet.load_schedule(directory)

    def collate_texts(self, texts: Sequence[Mapping[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor | None"]:
        """Each tensor [B,L,...]: all texts have one length, and the U-Net takes no mask."""
        import torch

        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def make_control_network(self, denoiser: Any, num_blocks: int | None) -> Any:
        """ControlNetModel: the encoder and the middle of the U-Net.

        Raises:
            ConfigError: a number of blocks is asked for.
        """
        from diffusers import ControlNetModel

        if num_blocks is not None:
            raise ConfigError("method.blocks: the ControlNet of a U-Net copies its whole encoder. Leave it out.")
        return control_networks.copy_of(ControlNetModel, denoiser)

    def adapter_names(self, form: str, component: str, module: Any) -> AdapterNames:
        """As sd-scripts name them."""
        return unet.adapter_names(form, component, self.trainable_encoders, module, is_original=self.kohya_names_are_original)

    def original_names(self, denoiser: Any) -> Mapping[str, str]:
        """Those of CompVis' and Stability's U-Net."""
        return unet.original_names(denoiser)

    def encoder_key(self, component: str, key: str) -> str:
        """CLIP's, with `text_model.`."""
        return clip.published_key(key)

    def encode_own_texts(self, pipeline: Any, encoder: Callable[[], Any], is_own: Callable[[str], bool]) -> None:
        """Have a pipeline take the family's own encoding of texts that diffusers encodes otherwise.

        Args:
            encoder: the pipeline's text encoders, as `encode_texts` takes them.
            is_own: whether a text is encoded by the family. If one of a batch is, all of it are.
        """
        plain = pipeline.encode_prompt
        parameters = inspect.signature(plain)

        @functools.wraps(plain)
        def encode_prompt(*positional: Any, **named: Any) -> Any:
            arguments = parameters.bind(*positional, **named).arguments
            prompts = _as_list(arguments.get("prompt"), 1)
            negative = arguments.get("negative_prompt")
            if negative is None and not getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
                negative = ""
            for prefix, texts in (("", prompts), ("negative_", _as_list(negative, len(prompts)))):
                if prompts and any(map(is_own, texts)) and arguments.get(f"{prefix}prompt_embeds") is None:
                    arguments |= self._pipeline_texts(encoder(), texts, prefix)
            return plain(**arguments)

        pipeline.encode_prompt = encode_prompt

    def _pipeline_texts(self, encoder: Any, texts: Sequence[str], prefix: str) -> "dict[str, torch.Tensor]":
        """The arguments that stand for these texts in a pipeline."""
        import torch

        items = [self.pipeline_texts(item) for item in self.encode_texts(encoder, texts)]
        return {f"{prefix}{name}": torch.cat([item[name] for item in items]) for name in items[0]}

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """Classifier-free guidance; at 1 or less the pipeline leaves the negative prompt out."""
        return {"guidance_scale": guidance_scale, **self.skip_options()}

    def skip_options(self) -> dict[str, Any]:
        """`clip_skip` where it is set: an option of the pipeline, and part of the texts' fingerprint."""
        return {} if self.config.clip_skip is None else {"clip_skip": self.config.clip_skip}


def _as_list(prompt: Any, count: int) -> list[str]:
    """A pipeline takes one prompt or a list of them, and one negative prompt for all."""
    if prompt is None:
        return []
    return [prompt] * count if isinstance(prompt, str) else list(prompt)
