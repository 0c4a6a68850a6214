"""FLUX.1: a transformer of 12 billion parameters with T5 and a pooled CLIP text. dev has embedded guidance, schnell has none.

Sources: diffusers, `pipelines/flux/pipeline_flux.py` and `examples/dreambooth/train_dreambooth_lora_flux.py`.

Shape legend: B batch, C latent channels (16), H W latent cells, N = H W / 4 image tokens, L text tokens, D text width,
P pooled width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from ftk.errors import ConfigError
from ftk.models.base import (
    Activations,
    AdapterNames,
    Conditions,
    ControlForm,
    FamilyConfig,
    Model,
    PutOnDevice,
    TargetGroup,
    move,
)
from ftk.models.components import clip, control_networks, flow_matching, kl_vae, saved_tensors
from ftk.models.components.geometry import LatentGeometry, ReferenceRule
from ftk.models.components.loading import (
    check_pipeline,
    check_vocabulary,
    hide_progress_bars,
    load_component,
    load_pipeline,
    outline,
    reading,
)
from ftk.models.components.schedule import NoiseSchedule
from ftk.models.components.single_file import Layout
from ftk.models.components.weights import Tensor

if TYPE_CHECKING:
    import torch

_DOUBLE, _SINGLE = "FluxTransformerBlock", "FluxSingleTransformerBlock"
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_MLP, _TEXT_MLP = ("ff.net.0.proj", "ff.net.2"), ("ff_context.net.0.proj", "ff_context.net.2")


class FluxConfig(FamilyConfig):
    """Settings under `model:`."""

    guidance: float = Field(
        default=3.5, gt=0, description="that the model is told, in training and in sample images, where it has an input for it"
    )
    max_text_tokens: int = Field(
        default=512, ge=1, le=512, description="tokens of T5, padding included; schnell was trained with 256"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxTextEncoders:
    """What `encode_texts` needs in memory: CLIP, whose pooled text is used, and T5."""

    tokenizers: tuple[Any, Any]
    models: tuple[Any, Any]


class Flux(kl_vae.KLImages):
    """Text to image. Text item: `embeds` [L,D] of T5, padded, and `pooled` [P] of CLIP.

    The model attends to T5's padding, whose states depend on the caption: all of it is stored.
    """

    name = "flux"
    Config: ClassVar[type[BaseModel]] = FluxConfig
    geometry = LatentGeometry(channels=16, factor=8, patch=2)
    encoder_version = 1
    pads_texts = True
    text_token_bytes = 8192
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    denoiser_components = ("transformer", "scheduler")
    denoiser_attribute = "transformer"
    pipeline_name = "FluxPipeline"
    block_classes = (_DOUBLE, _SINGLE)
    sigma_defaults: Mapping[str, Any] = {}
    sample_defaults: Mapping[str, Any] = {"guidance_scale": 1.0}
    native_sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    references: ReferenceRule | None = None
    control_form: ControlForm = "latents"
    target_groups: Mapping[str, TargetGroup] = {
        "attention": TargetGroup(in_blocks={_DOUBLE: (*_ATTENTION, "attn.to_out.0"), _SINGLE: _ATTENTION}),
        "attention+text": TargetGroup(
            in_blocks={_DOUBLE: (*_ATTENTION, "attn.to_out.0", *_TEXT_ATTENTION), _SINGLE: _ATTENTION}
        ),
        "attention+mlp": TargetGroup(
            in_blocks={
                _DOUBLE: (*_ATTENTION, "attn.to_out.0", *_TEXT_ATTENTION, *_MLP, *_TEXT_MLP),
                _SINGLE: (*_ATTENTION, "proj_mlp", "proj_out"),
            }
        ),
        "text-kv": TargetGroup(in_blocks={_DOUBLE: ("attn.add_k_proj", "attn.add_v_proj")}),
        "all-linear": TargetGroup(
            in_blocks={
                _DOUBLE: (
                    *_ATTENTION, "attn.to_out.0", *_TEXT_ATTENTION, *_MLP, *_TEXT_MLP, "norm1.linear", "norm1_context.linear",
                ),
                _SINGLE: (*_ATTENTION, "norm.linear", "proj_mlp", "proj_out"),
            },
            outside=("x_embedder", "context_embedder", "linear_1", "linear_2", "norm_out.linear", "proj_out"),
        ),
    }  # fmt: skip
    single_file: Mapping[str, Sequence[Layout]] = {
        "transformer": (
            Layout(
                model_class="FluxTransformer2DModel",
                anchor="double_blocks.0.img_attn.proj.weight",
                prefixes=("", "model.diffusion_model.", "diffusion_model."),
            ),
        )
    }

    def __init__(self, config: FluxConfig | None = None) -> None:
        self.config = config or FluxConfig()

    @property
    def max_text_tokens(self) -> int:
        """Of T5."""
        return self.config.max_text_tokens

    def check(self, directory: Path) -> None:
        """A Diffusers folder of the family's pipeline."""
        check_pipeline(directory, self.name, self.pipeline_name)

    def single_file_config(self, tensors: Mapping[str, Tensor]) -> str:
        """dev has an embedding of guidance, schnell has none; a file holds the transformer alone."""
        has_guidance = any("guidance_in" in name for name in tensors)
        return "black-forest-labs/FLUX.1-dev" if has_guidance else "black-forest-labs/FLUX.1-schnell"

    def unconditional(self, directory: Path) -> str:
        """The empty text."""
        return ""

    def text_options(self) -> dict[str, Any]:
        """Where T5 cuts."""
        return {"max_text_tokens": self.max_text_tokens}

    def text_flops(self, directory: Path, tokens: int) -> float:
        """Two for each weight and token of T5; the weights are two bytes each on disk."""
        num_bytes = sum(path.stat().st_size for path in (directory / "text_encoder_2").glob("*.safetensors"))
        return 2.0 * num_bytes / 2 * tokens

    def load_text_encoder(
        self, directory: Path, dtype: "torch.dtype", device: "torch.device", place: PutOnDevice = move
    ) -> FluxTextEncoders:
        """CLIP and T5."""
        from transformers import T5EncoderModel

        tokenizers = clip.load_tokenizer(directory, "tokenizer"), _t5_tokenizer(directory)
        first = clip.load_text_model(directory, "text_encoder", dtype)
        second = load_component(T5EncoderModel, directory, "text_encoder_2", dtype).requires_grad_(False).eval()
        check_vocabulary(tokenizers[0], first, directory / "tokenizer")
        check_vocabulary(tokenizers[1], second, directory / "tokenizer_2")
        return FluxTextEncoders(tokenizers=tokenizers, models=(place(first, device), place(second, device)))

    def encode_texts(
        self, encoder: FluxTextEncoders, captions: Sequence[str], references: "Sequence[Sequence[torch.Tensor]]" = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As the pipeline's `encode_prompt`: T5 without a mask, and what CLIP pools."""
        import torch

        first, second = encoder.models
        with torch.inference_mode():
            ids_BL = clip.tokenised(encoder.tokenizers[0], captions, first.device)["input_ids"].to(torch.int32)
            pooled_BP = first(ids_BL).pooler_output
            long_ids_BL = encoder.tokenizers[1](
                list(captions), padding="max_length", max_length=self.max_text_tokens, truncation=True, return_tensors="pt"
            ).input_ids
            embeds_BLD = second(long_ids_BL.to(second.device))[0]
        return [{"embeds": row.clone(), "pooled": pooled.clone()} for row, pooled in zip(embeds_BLD, pooled_BP, strict=True)]

    def text_lengths(self, encoder: FluxTextEncoders, captions: Sequence[str]) -> list[int]:
        """Always all of T5's: texts are padded."""
        return [self.max_text_tokens] * len(captions)

    def tokens_cut(self, directory: Path, captions: Sequence[str]) -> list[int]:
        """By T5; CLIP reads 77 tokens, for the pooled text alone."""
        rows = _t5_tokenizer(directory)(list(captions), verbose=False)["input_ids"]
        return [max(0, len(row) - self.max_text_tokens) for row in rows]

    def text_memory(self, encoder: FluxTextEncoders, tokens: int) -> int:
        """Of T5: scores of attention, with their bias, and the widest part of a layer."""
        config, itemsize = encoder.models[1].config, encoder.models[1].dtype.itemsize
        layer = 4 * config.d_model + 3 * config.d_ff + 4 * config.num_heads * config.d_kv
        return int(itemsize * tokens * layer + 3 * config.num_heads * tokens**2 * max(itemsize, 4))

    def load_denoiser(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """FluxTransformer2DModel, frozen."""
        from diffusers import FluxTransformer2DModel

        if device.type == "meta":
            return outline(FluxTransformer2DModel, directory / "transformer", dtype)
        denoiser = load_component(FluxTransformer2DModel, directory, "transformer", dtype)
        return denoiser.requires_grad_(False).train().to(device)

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Flow matching on the scheduler's own training table."""
        return flow_matching.load_schedule(directory)

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: "torch.dtype") -> Activations:
        """Counted where nothing has values; double and single blocks differ."""
        import torch

        config = denoiser.config

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        inputs = {
            "hidden_states": empty(1, image_tokens, config.in_channels),
            "encoder_hidden_states": empty(1, text_tokens, config.joint_attention_dim),
            "pooled_projections": empty(1, config.pooled_projection_dim),
            "timestep": empty(1, dtype=torch.float32),
            "guidance": empty(1, dtype=torch.float32) if config.guidance_embeds else None,
            "img_ids": empty(image_tokens, 3),
            "txt_ids": empty(text_tokens, 3),
            "return_dict": False,
        }
        return saved_tensors.activations(denoiser, self.block_classes, inputs, dtype, states=saved_tensors.BOTH_STREAMS)

    def collate_texts(self, texts: Sequence[Mapping[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor | None"]:
        """Each tensor [B,...]: all texts have one length."""
        import torch

        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """Velocity n - x. References come behind the image's tokens, told apart by the first of their position ids."""
        height, width = noisy_BCHW.shape[-2:]
        output_BND = model.denoiser(**self._inputs(model, noisy_BCHW, sigma_B, conditions))[0].float()
        return flow_matching.unpack(output_BND[:, : (height // 2) * (width // 2)], height, width)

    def _inputs(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> dict[str, Any]:
        """What the transformer is given, and a network that is a copy of it."""
        import torch

        texts = conditions.texts
        images = (noisy_BCHW, *conditions.references)
        embeds_BLD, device = texts["embeds"], noisy_BCHW.device
        assert embeds_BLD is not None
        guidance_B = None
        if model.denoiser.config.guidance_embeds:
            guidance_B = torch.full([len(noisy_BCHW)], self.config.guidance, dtype=torch.float32, device=device)
        return {
            "hidden_states": torch.cat([flow_matching.pack(image) for image in images], dim=1),
            # The pipeline hands over (1000 sigma) / 1000, in fp32: the same roundings, so the same bits.
            "timestep": (sigma_B.float() * 1000) / 1000,
            "guidance": guidance_B,
            "pooled_projections": texts["pooled"],
            "encoder_hidden_states": embeds_BLD,
            "txt_ids": torch.zeros(embeds_BLD.shape[1], 3, dtype=noisy_BCHW.dtype, device=device),
            "img_ids": torch.cat([positions(image, number) for number, image in enumerate(images)]),
            "return_dict": False,
        }

    def control_classes(self) -> tuple[Any, Any]:
        """FluxControlNetModel and FluxControlNetPipeline."""
        from diffusers import FluxControlNetModel, FluxControlNetPipeline

        return FluxControlNetModel, FluxControlNetPipeline

    def make_control_network(self, denoiser: Any, num_blocks: int | None) -> Any:
        """FluxControlNetModel of the first double blocks, with all that comes before them, and no single block."""
        network_class, _ = self.control_classes()
        count = control_networks.num_blocks(num_blocks, len(denoiser.transformer_blocks))
        return control_networks.copy_of(network_class, denoiser, num_layers=count, num_single_layers=0)

    def control_residuals(
        self, model: Model, network: Any, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> Mapping[str, Any]:
        """The network reads the control image's latents, packed as the image's are."""
        inputs = self._inputs(model, noisy_BCHW, sigma_B, conditions)
        outputs = [network(controlnet_cond=flow_matching.pack(control), **inputs)[0] for control in conditions.controls]
        return {"controlnet_block_samples": control_networks.summed(outputs)}

    def draw_controlled(
        self, pipeline: Any, network: Any, controls: "Sequence[torch.Tensor]", strength: float, options: Mapping[str, Any]
    ) -> Any:
        """With diffusers' FluxControlNetPipeline, which takes the given latents for those that it would draw.

        It computes the network with the prompt alone, and uses what that adds for the negative prompt too.
        """
        vae, is_one = pipeline.vae, len(controls) == 1
        _, pipeline_class = self.control_classes()
        controlled = control_networks.official(pipeline_class, pipeline, network if is_one else [network] * len(controls))
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        latents = [(each.to(vae.device).float() / scale + shift).to(vae.dtype) for each in controls]
        images = control_networks.blank_images(controls, self.geometry.factor)
        with control_networks.encoding(vae, latents):
            return controlled(
                control_image=images[0] if is_one else images,
                controlnet_conditioning_scale=strength if is_one else [strength] * len(images),
                **options,
            )

    def adapter_names(self, form: str, component: str, module: Any) -> AdapterNames:
        """ComfyUI knows diffusers' names of the transformer after `transformer.`, and after `lycoris_` with `_` for `.`."""
        if form == "kohya":
            raise ConfigError(
                f"sd-scripts join queries, keys and values of {self.name} in one layer, so that an adapter of each cannot be "
                f"written. Write comfyui or diffusers."
            )
        if form == "lycoris":
            return AdapterNames(module=lambda name: "lycoris_" + name.replace(".", "_"))
        return AdapterNames(module=lambda name: f"transformer.{name}")

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' own."""
        import diffusers

        return load_pipeline(getattr(diffusers, self.pipeline_name), directory, device, dtype=dtype, **components)

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """Embeddings of one prompt."""
        return {"prompt_embeds": texts["embeds"][None], "pooled_prompt_embeds": texts["pooled"][None]}

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """Embedded guidance as in training; above 1, true classifier-free guidance beside it, which takes twice as long."""
        return {
            "guidance_scale": self.config.guidance,
            "true_cfg_scale": guidance_scale,
            "max_sequence_length": self.max_text_tokens,
        }

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As sd-scripts and ai-toolkit write them."""
        return {"modelspec.architecture": "flux-1-dev", "ss_base_model_version": "flux1"}

    def tiny(self, directory: Path) -> None:
        """Two double and two single blocks, with an input for guidance."""
        import diffusers

        write_tiny(directory, getattr(diffusers, self.pipeline_name))


def positions(image_BCHW: "torch.Tensor", number: int) -> "torch.Tensor":
    """[N,3]: 0 for the image and 1 for a reference, then row and column of a token."""
    import torch

    rows, columns = (side // 2 for side in image_BCHW.shape[-2:])
    ids = torch.zeros(rows, columns, 3, dtype=image_BCHW.dtype, device=image_BCHW.device)
    ids[..., 0] = min(number, 1)
    ids[..., 1] = torch.arange(rows, device=image_BCHW.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=image_BCHW.device)[None, :]
    return ids.reshape(rows * columns, 3)


def _t5_tokenizer(directory: Path) -> Any:
    from transformers import T5Tokenizer

    with reading(directory / "tokenizer_2", "a tokenizer"):
        tokenizer = T5Tokenizer.from_pretrained(directory / "tokenizer_2")
        tokenizer("a", padding="max_length", max_length=2, truncation=True)
    return tokenizer


def write_tiny(directory: Path, pipeline_class: Any) -> None:
    """A complete small random model of a pipeline in the Diffusers layout."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    hide_progress_bars()
    tokenizer, tokenizer_2 = clip.tiny_tokenizer("<|endoftext|>"), tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
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
    pipeline_class(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2, transformer=transformer,
    ).save_pretrained(directory)  # fmt: skip


def tiny_t5_tokenizer() -> Any:
    """Every printable ASCII character, and the mark that T5 writes for a space."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((chr(code), -4.0) for code in range(33, 127))], extra_ids=0)


FAMILY = Flux()
