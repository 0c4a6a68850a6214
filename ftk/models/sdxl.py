"""Stable Diffusion XL: a U-Net of 2.6 billion parameters, told of sizes and crops, two CLIP text encoders and an fp32 VAE.

Sources: diffusers, `pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py` and
`examples/text_to_image/train_text_to_image_lora_sdxl.py`; Podell et al. 2023 (arXiv 2307.01952).

Shape legend: B batch, C latent channels (4), H W latent cells, L text tokens (77, or 75 a window and 2), D text width (2048),
P pooled width (1280).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError, ModelError
from ftk.models.base import Activations, Conditions, Model, PutOnDevice, Texts, move
from ftk.models.components import (
    clip,
    configuration,
    control_networks,
    kl_vae,
    latent_diffusion,
    placeholders,
    unet,
)
from ftk.models.components.geometry import SampleGeometry
from ftk.models.components.loading import check_pipeline, check_vocabulary, hide_progress_bars, load_pipeline
from ftk.models.components.placeholders import Placeholders
from ftk.models.components.single_file import Layout
from ftk.models.components.weights import Tensor

if TYPE_CHECKING:
    import torch

NUM_TIME_IDS = 6
NATIVE_SIZES = (
    *((1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768)),
    *((1344, 704), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512)),
    *((1920, 512), (1984, 512), (2048, 512)),
    *((960, 1024), (960, 1088), (896, 1088), (896, 1152), (832, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408)),
    *((704, 1472), (640, 1536), (640, 1600), (576, 1664), (576, 1728), (576, 1792), (512, 1856), (512, 1920), (512, 1984)),
    (512, 2048),
)
"""(width, height) in px that the model was trained at: Podell et al., appendix I. 704 x 1344 is not among them."""
_NO_TOKEN = -1
_TEXT_ITEM = ("embeds", "pooled", "input_ids", "input_ids_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """What `encode_texts` needs in memory: CLIP ViT-L, then OpenCLIP ViT-bigG, which gives the pooled text too."""

    tokenizers: tuple[Any, Any]
    models: tuple[Any, Any]


class StableDiffusionXL(latent_diffusion.LatentDiffusion):
    """Text to image with two CLIP encoders. Text item: `embeds` [L,D], both side by side, and `pooled` [P].

    And `input_ids`, `input_ids_2` [77], of either tokenizer; with `max_text_tokens` above 75 those of all windows.
    """

    name = "sdxl"
    encoder_version = 2
    text_token_bytes = 8192
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    native_sizes = NATIVE_SIZES
    target_groups = unet.target_groups("proj_in", "proj_out")
    trainable_encoders = ("text_encoder", "text_encoder_2")
    embedding_keys: Mapping[str, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    single_file: Mapping[str, Sequence[Layout]] = {
        **latent_diffusion.SINGLE_FILE,
        "text_encoder": (
            Layout(
                model_class="CLIPTextModel",
                anchor="embeddings.position_embedding.weight",
                prefixes=("conditioner.embedders.0.transformer.text_model.",),
            ),
        ),
        "text_encoder_2": (
            Layout(
                model_class="CLIPTextModelWithProjection",
                anchor="positional_embedding",
                prefixes=("conditioner.embedders.1.model.",),
            ),
        ),
    }
    kohya_names_are_original = True

    def check(self, directory: Path) -> None:
        """A Diffusers folder whose `model_index.json` names StableDiffusionXLPipeline."""
        check_pipeline(directory, self.name, "StableDiffusionXLPipeline")

    def single_file_config(self, tensors: Mapping[str, Tensor]) -> str:
        """That of the base model 1.0."""
        if not unet.is_told_sizes(tensors):
            raise ModelError("this is not an SDXL checkpoint: its U-Net is not told of sizes. Is it of stable-diffusion?")
        return "stabilityai/stable-diffusion-xl-base-1.0"

    def unconditional(self, directory: Path) -> str | None:
        """No text, where the pipeline's configuration says `force_zeros_for_empty_prompt`, as that of the base model does."""
        path = directory / "model_index.json"
        is_zero = configuration.read(path).get("force_zeros_for_empty_prompt", True)
        if not isinstance(is_zero, bool):
            raise ModelError(f"{path}: `force_zeros_for_empty_prompt` is {is_zero!r:.80}. It must be true or false.")
        return None if is_zero else ""

    def text_options(self) -> dict[str, Any]:
        """Which layers are read, and how texts are padded."""
        return {
            "layer": "second to last of both, pooled of the second",
            "padding": "max_length",
            "max_text_tokens": self.max_text_tokens,
            **self.skip_options(),
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
        """Of 77 tokens a window in both encoders, whatever the text's own number."""
        return self.text_windows * (clip.flops(directory / "text_encoder") + clip.flops(directory / "text_encoder_2"))

    def load_text_encoder(
        self, directory: Path, dtype: "torch.dtype", device: "torch.device", place: PutOnDevice = move
    ) -> TextEncoders:
        """CLIPTextModel and CLIPTextModelWithProjection."""
        tokenizers = (clip.load_tokenizer(directory, "tokenizer"), clip.load_tokenizer(directory, "tokenizer_2"))
        first = clip.load_text_model(directory, "text_encoder", dtype)
        check_vocabulary(tokenizers[0], first, directory / "tokenizer")
        first = place(first, device)
        second = clip.load_text_model(directory, "text_encoder_2", dtype, has_projection=True)
        check_vocabulary(tokenizers[1], second, directory / "tokenizer_2")
        return TextEncoders(tokenizers=tokenizers, models=(first, place(second, device)))

    def encode_texts(
        self, encoder: TextEncoders, captions: Sequence[str | None], references: "Sequence[Sequence[torch.Tensor]]" = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As `StableDiffusionXLPipeline.encode_prompt`: the layer before the last of both, not normed, side by side.

        No text is zeros, with token ids of -1.
        """
        import torch

        written = [caption or "" for caption in captions]
        with torch.inference_mode():
            ids = [
                clip.tokenised(tokenizer, written, model.device, self.text_windows)["input_ids"].to(torch.int32)
                for tokenizer, model in zip(encoder.tokenizers, encoder.models, strict=True)
            ]
            embeds_BLD, pooled_BP = self._encoded(encoder.models, ids)
        items = [dict(zip(_TEXT_ITEM, item, strict=True)) for item in zip(embeds_BLD, pooled_BP, *ids, strict=True)]
        return [
            {name: _nothing(name, row) if caption is None else row.clone() for name, row in item.items()}
            for caption, item in zip(captions, items, strict=True)
        ]

    def load_encoder(self, directory: Path, name: str, dtype: "torch.dtype", device: "torch.device") -> Any:
        """CLIPTextModel, or CLIPTextModelWithProjection for the second."""
        return clip.load_trainable(directory, name, dtype, device, has_projection=name == "text_encoder_2")

    def add_tokens(self, encoder: TextEncoders, tokens: Placeholders) -> None:
        """To both tokenizers and both embedding tables."""
        for tokenizer, model in zip(encoder.tokenizers, encoder.models, strict=True):
            placeholders.add_to_encoder(tokenizer, model, tokens)

    def encode_tokens(self, encoders: Mapping[str, Any], texts: Texts) -> dict[str, "torch.Tensor | None"]:
        """`embeds` and `pooled` from the token ids of both; zeros for those that are no text."""
        models = (encoders["text_encoder"], encoders["text_encoder_2"])
        ids: list[Any] = [texts["input_ids"], texts["input_ids_2"]]
        embeds_BLD, pooled_BP = self._encoded(models, [each.clamp(min=0) for each in ids])
        is_text_B1 = ids[0][:, :1] >= 0
        return {
            **texts,
            "embeds": embeds_BLD.where(is_text_B1[..., None], 0.0),
            "pooled": pooled_BP.where(is_text_B1, 0.0),
        }

    def _encoded(self, models: Sequence[Any], ids: Sequence[Any]) -> "tuple[torch.Tensor, torch.Tensor]":
        """[B,L,D] of the layers before the last, side by side, and [B,P] of the second model's projection.

        Of several windows, the pooled text is that of the first, as in sd-scripts.
        """
        import torch

        skip, batch = self.config.clip_skip or 0, len(ids[0])
        outputs = [model(clip.windows_of(ids_BL), output_hidden_states=True) for model, ids_BL in zip(models, ids, strict=True)]
        embeds = [clip.joined(clip.hidden_state(output.hidden_states, 2, skip), batch) for output in outputs]
        return torch.cat(embeds, dim=-1), outputs[-1].text_embeds.unflatten(0, (batch, -1))[:, 0]

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

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """Epsilon or v."""
        return unet.predict(model, noisy_BCHW, sigma_B, conditions, _told(noisy_BCHW, conditions))

    def control_classes(self) -> tuple[Any, Any]:
        """ControlNetModel and StableDiffusionXLControlNetPipeline."""
        from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

        return ControlNetModel, StableDiffusionXLControlNetPipeline

    def control_residuals(
        self, model: Model, network: Any, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> Mapping[str, Any]:
        """Of the U-Net's encoder, which is told of sizes as the U-Net is."""
        return unet.control_residuals(model, network, noisy_BCHW, sigma_B, conditions, _told(noisy_BCHW, conditions))

    def draw_controlled(
        self, pipeline: Any, network: Any, controls: "Sequence[torch.Tensor]", strength: float, options: Mapping[str, Any]
    ) -> Any:
        """With diffusers' StableDiffusionXLControlNetPipeline, without a watermark."""
        settings = {
            "add_watermarker": False,
            "force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt,
        }

        def controlled(networks: Any) -> Any:
            _, pipeline_class = self.control_classes()
            return control_networks.official(pipeline_class, pipeline, networks, **settings)

        return unet.draw_controlled(controlled, network, controls, strength, options)

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' StableDiffusionXLPipeline without a watermark, its VAE in fp32 whatever the rest computes in."""
        import torch
        from diffusers import StableDiffusionXLPipeline

        if "vae" not in components:
            components["vae"] = self.load_vae(directory, torch.float32, device)
            decoder = components["vae"].post_quant_conv or components["vae"].decoder
            decoder.register_forward_pre_hook(_to_weights)
        pipeline = load_pipeline(StableDiffusionXLPipeline, directory, device, dtype=dtype, add_watermarker=False, **components)
        if self.text_windows > 1:
            self.encode_own_texts(pipeline, lambda: _encoders(pipeline), lambda _text: True)
        return pipeline

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


def _nothing(name: str, row: "torch.Tensor") -> "torch.Tensor":
    """What stands in the item of no text for a tensor of this name."""
    import torch

    return torch.full_like(row, _NO_TOKEN if name.startswith("input_ids") else 0)


def _encoders(pipeline: Any) -> TextEncoders:
    return TextEncoders(
        tokenizers=(pipeline.tokenizer, pipeline.tokenizer_2), models=(pipeline.text_encoder, pipeline.text_encoder_2)
    )


def _told(noisy_BCHW: "torch.Tensor", conditions: Conditions) -> Callable[[Texts], Mapping[str, Any]]:
    """What the U-Net takes beside the text, from the texts as they are encoded now.

    Without a geometry the images are whole ones of their size, which is what the pipeline says too.
    """
    import torch

    if conditions.geometry_BG is None:
        height, width = (cells * unet.GEOMETRY.factor for cells in noisy_BCHW.shape[-2:])
        whole = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noisy_BCHW.device)
        time_ids_B6 = whole.expand(len(noisy_BCHW), -1)
    else:
        time_ids_B6 = time_ids(conditions.geometry_BG)
    return lambda texts: {"text_embeds": texts["pooled"], "time_ids": time_ids_B6}


def time_ids(geometry_BG: "torch.Tensor") -> "torch.Tensor":
    """[B,6] fp32: original height, width, crop top, left, target height, width in pixels, as SDXL is told of them.

    The original size is that before any resizing, the crop lies in the resized image, and the target is the bucket: Podell et
    al., section 2.2 and algorithm 1, and diffusers' script. As there, a mirrored image is mirrored before it is cropped: of a
    crop that was mirrored afterwards, the left edge is counted from the right.
    """
    import torch

    names = [each.name for each in fields(SampleGeometry)]
    column = dict(zip(names, geometry_BG.unbind(1), strict=True))
    from_right_B = column["resize_width"] - column["bucket_width"] - column["crop_x"]
    left_B = torch.where(column["flipped"].bool(), from_right_B, column["crop_x"])
    told = (column["height"], column["width"], column["crop_y"], left_B, column["bucket_height"], column["bucket_width"])
    return torch.stack(told, dim=1).float()


def _to_weights(module: Any, inputs: tuple["torch.Tensor"]) -> tuple["torch.Tensor"]:
    """The pipeline hands over latents in the precision of the U-Net."""
    return (inputs[0].to(next(module.parameters()).dtype),)


FAMILY = StableDiffusionXL()
