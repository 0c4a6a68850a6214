"""Stable Diffusion XL: a U-Net of 2.6 billion parameters, told of sizes and crops, two CLIP text encoders and an fp32 VAE.

Sources: diffusers, `pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py` and
`examples/text_to_image/train_text_to_image_lora_sdxl.py`; Podell et al. 2023 (arXiv 2307.01952).

Shape legend: B batch, C latent channels (4), H W latent cells, L text tokens (77), D text width (2048), P pooled width (1280).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError
from ftk.models.base import (
    Activations,
    SampleGeometry,
    check_pipeline,
    hide_progress_bars,
    load_pipeline,
    refuse_references,
)
from ftk.models.components import clip, kl_vae, latent_diffusion, unet

if TYPE_CHECKING:
    import torch

NUM_TIME_IDS = 6
_TEXT_ITEM = ("embeds", "pooled", "input_ids", "input_ids_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """What `encode_texts` needs in memory: CLIP ViT-L, then OpenCLIP ViT-bigG, which gives the pooled text too."""

    tokenizers: tuple[Any, Any]
    models: tuple[Any, Any]


class StableDiffusionXL(latent_diffusion.LatentDiffusion):
    """Text to image with two CLIP encoders. Text item: `embeds` [77,D], both side by side, and `pooled` [P].

    And `input_ids`, `input_ids_2` [77], of either tokenizer.
    """

    name = "sdxl"
    encoder_version = 2
    text_token_bytes = 8192
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    target_groups: Mapping[str, Sequence[str]] = {
        "attention": unet.ATTENTION,
        "attention+mlp": (*unet.ATTENTION, *unet.MLP),
        "text-kv": unet.TEXT_KV,
        "all-linear": (*unet.ATTENTION, *unet.MLP, *unet.TIME, "proj_in", "proj_out"),
    }
    trainable_encoders = ("text_encoder", "text_encoder_2")

    def check(self, directory: Path) -> None:
        """A Diffusers folder whose `model_index.json` names StableDiffusionXLPipeline."""
        check_pipeline(directory, self.name, "StableDiffusionXLPipeline")

    def text_options(self) -> dict[str, Any]:
        """Which layers are read, and how texts are padded."""
        return {
            "layer": "second to last of both, pooled of the second",
            "padding": "max_length",
            "max_text_tokens": self.max_text_tokens,
        }

    def load_vae(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """AutoencoderKL, frozen, in fp32: its activations overflow fp16, and bf16 blurs what it makes of an image.

        Raises:
            ConfigError: another precision is asked for.
        """
        if dtype.itemsize != 4:
            raise ConfigError(
                f"cache.vae_dtype: {str(dtype).removeprefix('torch.')}: the VAE of sdxl computes in float32 alone, its "
                f"activations are too large for less. Set cache.vae_dtype to float32, or to tfloat32 for speed."
            )
        return super().load_vae(directory, dtype, device)

    def text_flops(self, directory: Path, tokens: int) -> float:
        """Of 77 tokens in both encoders, whatever the text's own number."""
        return clip.flops(directory / "text_encoder") + clip.flops(directory / "text_encoder_2")

    def load_text_encoder(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> TextEncoders:
        """CLIPTextModel and CLIPTextModelWithProjection."""
        tokenizers = (clip.load_tokenizer(directory, "tokenizer"), clip.load_tokenizer(directory, "tokenizer_2"))
        first = clip.load_text_model(directory, "text_encoder", dtype).to(device)
        second = clip.load_text_model(directory, "text_encoder_2", dtype, has_projection=True).to(device)
        return TextEncoders(tokenizers=tokenizers, models=(first, second))

    def encode_texts(
        self, encoder: TextEncoders, captions: Sequence[str], references: Sequence["torch.Tensor"] = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As `StableDiffusionXLPipeline.encode_prompt`: the layer before the last of both, not normed, side by side."""
        import torch

        refuse_references(self.name, references)
        with torch.inference_mode():
            ids = [
                clip.tokenised(tokenizer, captions, model.device)["input_ids"].to(torch.int32)
                for tokenizer, model in zip(encoder.tokenizers, encoder.models, strict=True)
            ]
            embeds_BLD, pooled_BP = _encoded(encoder.models, ids)
        items = zip(embeds_BLD, pooled_BP, *ids, strict=True)
        return [{name: row.clone() for name, row in zip(_TEXT_ITEM, item, strict=True)} for item in items]

    def load_encoder(self, directory: Path, name: str, dtype: "torch.dtype", device: "torch.device") -> Any:
        """CLIPTextModel, or CLIPTextModelWithProjection for the second."""
        return clip.load_trainable(directory, name, dtype, device, has_projection=name == "text_encoder_2")

    def encode_tokens(
        self, encoders: Mapping[str, Any], texts: Mapping[str, "torch.Tensor | None"]
    ) -> dict[str, "torch.Tensor | None"]:
        """`embeds` and `pooled` from the token ids of both."""
        models = (encoders["text_encoder"], encoders["text_encoder_2"])
        embeds_BLD, pooled_BP = _encoded(models, (texts["input_ids"], texts["input_ids_2"]))
        return {**texts, "embeds": embeds_BLD, "pooled": pooled_BP}

    def text_memory(self, encoder: TextEncoders, tokens: int) -> int:
        """Of the second encoder, beside what the first has left: all hidden states of both."""
        return sum(clip.memory(model, tokens) for model in encoder.models)

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: "torch.dtype") -> Activations:
        """Counted in a forward pass without values."""
        import torch

        width = denoiser.config.projection_class_embeddings_input_dim
        pooled_width = width - NUM_TIME_IDS * denoiser.config.addition_time_embed_dim
        added = {
            "text_embeds": torch.empty(1, pooled_width, dtype=dtype, device="meta"),
            "time_ids": torch.empty(1, NUM_TIME_IDS, device="meta"),
        }
        return unet.activations(denoiser, image_tokens * self.geometry.patch**2, text_tokens, dtype, added)

    def collate_texts(
        self, texts: Sequence[Mapping[str, "torch.Tensor"]], geometries: Sequence[SampleGeometry] = ()
    ) -> dict[str, "torch.Tensor | None"]:
        """`embeds` [B,77,D], `pooled` [B,P], token ids, and of the geometries `time_ids` [B,6] fp32, else None."""
        import torch

        time_ids = torch.tensor([size_and_crop(one) for one in geometries], dtype=torch.float32) if geometries else None
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]} | {"time_ids": time_ids}

    def predict(
        self,
        denoiser: Any,
        noisy_BCHW: "torch.Tensor",
        time_B: "torch.Tensor",
        texts: Mapping[str, "torch.Tensor | None"],
        references: Sequence["torch.Tensor"] = (),
        residuals: Sequence["torch.Tensor"] | None = None,
    ) -> "torch.Tensor":
        """Epsilon or v. Without `time_ids` the images are whole ones of their size, which is what the pipeline says too."""
        import torch

        refuse_references(self.name, references)
        time_ids = texts.get("time_ids")
        if time_ids is None:
            height, width = (cells * self.geometry.factor for cells in noisy_BCHW.shape[-2:])
            whole = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noisy_BCHW.device)
            time_ids = whole.expand(len(noisy_BCHW), -1)
        added = {"text_embeds": texts["pooled"], "time_ids": time_ids}
        return unet.predict(denoiser, noisy_BCHW, time_B, texts["embeds"], residuals, added)

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' StableDiffusionXLPipeline without a watermark, its VAE in fp32 whatever the rest computes in."""
        import torch
        from diffusers import StableDiffusionXLPipeline

        if "vae" not in components:
            components["vae"] = self.load_vae(directory, torch.float32, device)
            decoder = components["vae"].post_quant_conv or components["vae"].decoder
            decoder.register_forward_pre_hook(_to_weights)
        return load_pipeline(StableDiffusionXLPipeline, directory, device, dtype=dtype, add_watermarker=False, **components)

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """Embeddings and pooled embeddings of one prompt."""
        return {"prompt_embeds": texts["embeds"][None], "pooled_prompt_embeds": texts["pooled"][None]}

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As sd-scripts write them."""
        return {"modelspec.architecture": "stable-diffusion-xl-v1-base", "ss_base_model_version": "sdxl_base_v1-0"}

    def tiny(self, directory: Path) -> None:
        """About 1.3 MB on disk: two levels, epsilon, the real schedule and 77 tokens."""
        import torch
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        hide_progress_bars()
        # As in the real model: the first encoder pads with the end of a text, the second with its first character.
        tokenizers = clip.tiny_tokenizer("<|endoftext|>"), clip.tiny_tokenizer("!")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            denoiser = UNet2DConditionModel(
                block_out_channels=(8, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
                norm_num_groups=4, cross_attention_dim=64, attention_head_dim=(2, 2), use_linear_projection=True,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1),
                addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16 + NUM_TIME_IDS * 8,
            )  # fmt: skip
            vae = kl_vae.tiny(0.13025)
            first = CLIPTextModel(clip.tiny_text_config(tokenizers[0]))
            second = CLIPTextModelWithProjection(clip.tiny_text_config(tokenizers[1], hidden_act="gelu"))
        StableDiffusionXLPipeline(
            vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
            unet=denoiser, scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **unet.SCHEDULE), add_watermarker=False,
        ).save_pretrained(directory)  # fmt: skip


def size_and_crop(sample: SampleGeometry) -> tuple[int, int, int, int, int, int]:
    """(original height, width, crop top, left, target height, width) in pixels, as SDXL is told of them.

    The original size is that before any resizing, the crop lies in the resized image, and the target is the bucket: Podell et
    al., section 2.2 and algorithm 1, and diffusers' script. As there, a mirrored image is mirrored before it is cropped: of a
    crop that was mirrored afterwards, the left edge is counted from the right.
    """
    left = sample.resize_width - sample.bucket_width - sample.crop_x if sample.flipped else sample.crop_x
    return (sample.height, sample.width, sample.crop_y, left, sample.bucket_height, sample.bucket_width)


def _encoded(models: Sequence[Any], ids: Sequence[Any]) -> "tuple[torch.Tensor, torch.Tensor]":
    """[B,77,D] of the layers before the last, side by side, and [B,P] of the second model's projection."""
    import torch

    outputs = [model(ids_BL, output_hidden_states=True) for model, ids_BL in zip(models, ids, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


def _to_weights(module: Any, inputs: tuple["torch.Tensor"]) -> tuple["torch.Tensor"]:
    """The pipeline hands over latents in the precision of the U-Net."""
    return (inputs[0].to(next(module.parameters()).dtype),)


FAMILY = StableDiffusionXL()
