"""A family that only the tests hold: FLUX.1 Kontext, on the official pipeline, with tiny random weights.

It has what no family of ftk has yet: two block classes, a VAE with a shift, embedded guidance, pooled text, one trainable
encoder of two, and references. The protocol must carry it without a change anywhere else.

Shape legend: B batch, C latent channels (16), H W latent cells, N image tokens, L text tokens, D text width, P pooled width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

from ftk.errors import ConfigError
from ftk.models.base import (
    Activations,
    AdapterNames,
    Conditions,
    FamilyConfig,
    Model,
    PutOnDevice,
    TargetGroup,
    Texts,
    encoded,
    move,
)
from ftk.models.components import clip, flow_matching, kl_vae
from ftk.models.components.geometry import LatentGeometry, ReferenceRule
from ftk.models.components.loading import check_pipeline, hide_progress_bars, load_component, load_pipeline, outline
from ftk.models.components.schedule import NoiseSchedule

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
_DOUBLE, _SINGLE = "FluxTransformerBlock", "FluxSingleTransformerBlock"
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


class ForeignEditConfig(FamilyConfig):
    """Settings under `model:`."""

    guidance: float = Field(default=3.5, gt=0, description="that the model is told, in training and in sampling")
    max_text_tokens: int = Field(default=24, ge=1, le=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """CLIP, whose pooled text is used, and T5."""

    tokenizers: tuple[Any, Any]
    models: tuple[Any, Any]


class ForeignEdit:
    """Text item: `embeds` [L,D] of T5, padded and not masked, `pooled` [P] of CLIP, and CLIP's `input_ids` [77]."""

    name = "foreign-edit"
    Config: ClassVar[type[BaseModel]] = ForeignEditConfig
    geometry = LatentGeometry(channels=16, factor=8, patch=2)
    encoder_version = 1
    pads_texts = True
    text_token_bytes = 64
    latent_components = ("vae",)
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    denoiser_components = ("transformer", "scheduler")
    denoiser_attribute = "transformer"
    block_classes = (_DOUBLE, _SINGLE)
    sigma_defaults: Mapping[str, Any] = {"sampling": "logit_normal", "logit_mean": 0.5, "shift": 3.0}
    native_sizes = ()
    references = ReferenceRule(multiple=16)
    trainable_encoders = ("text_encoder",)
    encoder_targets = clip.TARGETS
    target_groups: Mapping[str, TargetGroup] = {
        "attention": TargetGroup(in_blocks={_DOUBLE: (*_ATTENTION, "attn.to_out.0"), _SINGLE: _ATTENTION}),
        "text-kv": TargetGroup(in_blocks={_DOUBLE: ("attn.add_k_proj", "attn.add_v_proj")}),
        "all-linear": TargetGroup(
            in_blocks={
                _DOUBLE: (
                    *_ATTENTION, "attn.to_out.0", *_TEXT_ATTENTION, "norm1.linear", "norm1_context.linear",
                    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
                ),
                _SINGLE: (*_ATTENTION, "norm.linear", "proj_mlp", "proj_out"),
            },
            outside=("x_embedder", "context_embedder", "linear_1", "linear_2", "norm_out.linear", "proj_out"),
        ),
    }  # fmt: skip

    def __init__(self, config: ForeignEditConfig | None = None) -> None:
        self.config = config or ForeignEditConfig()

    @property
    def max_text_tokens(self) -> int:
        """Of T5."""
        return self.config.max_text_tokens

    def check(self, directory: Path) -> None:
        """A Diffusers folder of the Kontext pipeline."""
        check_pipeline(directory, self.name, "FluxKontextPipeline")

    def unconditional(self, directory: Path) -> str:
        """The empty text."""
        return ""

    def text_options(self) -> dict[str, Any]:
        """Where T5 cuts."""
        return {"max_text_tokens": self.max_text_tokens}

    def load_vae(self, directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
        """AutoencoderKL with a shift."""
        return kl_vae.load(directory, dtype).to(device)

    def normalisation(self, directory: Path) -> dict[str, Any]:
        """Mean and std of each channel."""
        return kl_vae.normalisation(directory)

    def image_flops(self, directory: Path, height: int, width: int) -> float:
        """Of the VAE."""
        return kl_vae.flops(directory, height, width)

    def text_flops(self, directory: Path, tokens: int) -> float:
        """Next to nothing."""
        return 1e6 * tokens

    def encode_images(self, vae: Any, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior, normalised."""
        return kl_vae.encode(vae, pixels_BCHW)

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """Of the VAE."""
        return kl_vae.memory(vae, height, width)

    def decode(self, vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels."""
        return kl_vae.decode(vae, latents_BCHW)

    def load_text_encoder(
        self, directory: Path, dtype: torch.dtype, device: torch.device, place: PutOnDevice = move
    ) -> Encoders:
        """CLIP and T5."""
        from transformers import T5EncoderModel, T5Tokenizer

        tokenizers = clip.load_tokenizer(directory, "tokenizer"), T5Tokenizer.from_pretrained(directory / "tokenizer_2")
        second = load_component(T5EncoderModel, directory, "text_encoder_2", dtype).requires_grad_(False).eval()
        first = clip.load_text_model(directory, "text_encoder", dtype)
        return Encoders(tokenizers=tokenizers, models=(place(first, device), place(second, device)))

    def encode_texts(
        self, encoder: Encoders, captions: Sequence[str], references: Sequence[Sequence[torch.Tensor]] = ()
    ) -> list[dict[str, torch.Tensor]]:
        """As `FluxKontextPipeline.encode_prompt`."""
        first, second = encoder.models
        with torch.inference_mode():
            ids = clip.tokenised(encoder.tokenizers[0], captions, first.device)["input_ids"].to(torch.int32)
            pooled_BP = first(ids).pooler_output
            long_ids = encoder.tokenizers[1](
                list(captions), padding="max_length", max_length=self.max_text_tokens, truncation=True, return_tensors="pt"
            ).input_ids
            embeds_BLD = second(long_ids.to(second.device))[0]
        items = zip(embeds_BLD, pooled_BP, ids, strict=True)
        return [{"embeds": embeds.clone(), "pooled": pooled.clone(), "input_ids": row.clone()} for embeds, pooled, row in items]

    def text_lengths(self, encoder: Encoders, captions: Sequence[str]) -> list[int]:
        """Always all of T5's."""
        return [self.max_text_tokens] * len(captions)

    def tokens_cut(self, directory: Path, captions: Sequence[str]) -> list[int]:
        """By T5."""
        from transformers import T5Tokenizer

        rows = T5Tokenizer.from_pretrained(directory / "tokenizer_2")(list(captions))["input_ids"]
        return [max(0, len(row) - self.max_text_tokens) for row in rows]

    def text_memory(self, encoder: Encoders, tokens: int) -> int:
        """Of CLIP."""
        return clip.memory(encoder.models[0], clip.TOKENS)

    def load_denoiser(self, directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
        """FluxTransformer2DModel."""
        from diffusers import FluxTransformer2DModel

        if device.type == "meta":
            return outline(FluxTransformer2DModel, directory / "transformer", dtype)
        denoiser = load_component(FluxTransformer2DModel, directory, "transformer", dtype)
        return denoiser.requires_grad_(False).train().to(device)

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Flow matching."""
        return flow_matching.load_schedule(directory)

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: torch.dtype) -> Activations:
        """In hidden states."""
        hidden = (image_tokens + text_tokens) * denoiser.inner_dim * dtype.itemsize
        return Activations(block_saved=14 * hidden, block_input=hidden, block_working=12 * hidden, outside=4 * hidden)

    def collate_texts(self, texts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor | None]:
        """All of one length."""
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def predict(self, model: Model, noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Velocity. References come behind the image's tokens, told apart by the first of their position ids."""
        texts = encoded(model, conditions.texts)
        height, width = noisy_BCHW.shape[-2:]
        images = [noisy_BCHW, *conditions.references]
        ids_N3 = torch.cat([self._positions(image, number) for number, image in enumerate(images)])
        tokens_BND = torch.cat([flow_matching.pack(image) for image in images], dim=1)
        embeds_BLD = texts["embeds"]
        assert embeds_BLD is not None
        output_BND = model.denoiser(
            hidden_states=tokens_BND,
            timestep=(sigma_B.float() * 1000) / 1000,
            guidance=torch.full([len(noisy_BCHW)], self.config.guidance, dtype=torch.float32, device=noisy_BCHW.device),
            pooled_projections=texts["pooled"],
            encoder_hidden_states=embeds_BLD,
            txt_ids=torch.zeros(embeds_BLD.shape[1], 3, dtype=noisy_BCHW.dtype, device=noisy_BCHW.device),
            img_ids=ids_N3,
            return_dict=False,
        )[0]
        return flow_matching.unpack(output_BND[:, : (height // 2) * (width // 2)].float(), height, width)

    @staticmethod
    def _positions(image_BCHW: torch.Tensor, number: int) -> torch.Tensor:
        """[N,3]: 0 for the image and 1 for a reference, then row and column."""
        rows, columns = (side // 2 for side in image_BCHW.shape[-2:])
        ids = torch.zeros(rows, columns, 3, dtype=image_BCHW.dtype, device=image_BCHW.device)
        ids[..., 0] = min(number, 1)
        ids[..., 1] = torch.arange(rows, device=image_BCHW.device)[:, None]
        ids[..., 2] = torch.arange(columns, device=image_BCHW.device)[None, :]
        return ids.reshape(rows * columns, 3)

    def load_encoder(self, directory: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
        """CLIP alone."""
        return clip.load_trainable(directory, name, dtype, device)

    def encode_tokens(self, encoders: Mapping[str, Any], texts: Texts) -> dict[str, torch.Tensor | None]:
        """`pooled` from CLIP's token ids; T5's states stay as they are cached."""
        return {**texts, "pooled": encoders["text_encoder"](texts["input_ids"]).pooler_output}

    def encoder_key(self, component: str, key: str) -> str:
        """CLIP's."""
        return clip.published_key(key)

    def adapter_names(self, form: str, component: str, module: Any) -> AdapterNames:
        """As ComfyUI's Flux key map has them: diffusers' names after `transformer.`."""
        if form == "comfyui" and component == "denoiser":
            return AdapterNames(module=lambda name: f"transformer.{name}")
        raise ConfigError(f"{self.name} has no {form} format here. Write diffusers.")

    def pipeline(self, directory: Path, dtype: torch.dtype, device: torch.device, **components: Any) -> Any:
        """The official pipeline, which is told to draw at the size that it is asked for and no larger."""
        from diffusers import FluxKontextPipeline

        class Pipeline(FluxKontextPipeline):
            def __call__(self, *args: Any, **options: Any) -> Any:
                area = {"max_area": options["height"] * options["width"], "_auto_resize": False}
                return super().__call__(*args, **{**area, **options})

        return load_pipeline(Pipeline, directory, device, dtype=dtype, **components)

    def pipeline_texts(self, texts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Embeddings of one prompt."""
        return {"prompt_embeds": texts["embeds"][None], "pooled_prompt_embeds": texts["pooled"][None]}

    def pipeline_references(self, references: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The pipeline takes one image, also as normalised latents."""
        (reference,) = references
        return {"image": reference}

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """Embedded guidance as in training, and true classifier-free guidance on request."""
        return {
            "guidance_scale": self.config.guidance,
            "true_cfg_scale": guidance_scale,
            "max_sequence_length": self.max_text_tokens,
        }

    def tiny(self, directory: Path) -> None:
        """One double and two single blocks."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
        from transformers import CLIPTextModel, T5Config, T5EncoderModel

        hide_progress_bars()
        tokenizer, tokenizer_2 = clip.tiny_tokenizer("<|endoftext|>"), _tiny_t5_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformer = FluxTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
                guidance_embeds=True,
            )  # fmt: skip
            vae = AutoencoderKL(
                in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
                latent_channels=16, norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False,
                shift_factor=0.1159, scaling_factor=0.3611,
            )  # fmt: skip
            text_encoder = CLIPTextModel(clip.tiny_text_config(tokenizer))
            text_encoder_2 = T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer_2), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                    feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
                )
            )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, shift=3.0
        )
        FluxKontextPipeline(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2, transformer=transformer,
        ).save_pretrained(directory)  # fmt: skip


def _tiny_t5_tokenizer() -> Any:
    """Every printable ASCII character, and the space that T5 writes as an underline."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((chr(code), -4.0) for code in range(33, 127))], extra_ids=0)


FAMILY = ForeignEdit()
