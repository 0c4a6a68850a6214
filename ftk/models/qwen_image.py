"""Qwen-Image: a 60-layer, 20-billion-parameter MMDiT with a Qwen2.5-VL text encoder and a 16-channel causal VAE.

Source: diffusers, `pipelines/qwenimage/pipeline_qwenimage.py` and `examples/dreambooth/train_dreambooth_lora_qwen_image.py`;
Qwen-Image technical report (arXiv 2508.02324).

Shape legend: B batch, C latent channels (16), H W latent cells, N = H W / 4 image tokens, L text tokens, D text width.
"""

import copy
import functools
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from ftk.errors import ModelError
from ftk.models.base import (
    Activations,
    AdapterNames,
    Conditions,
    ControlForm,
    FamilyConfig,
    Model,
    PutOnDevice,
    TargetGroup,
    Texts,
    encoded,
    move,
)
from ftk.models.components import configuration, control_networks, flow_matching, kl_vae, placeholders
from ftk.models.components.geometry import LatentGeometry, ReferenceRule
from ftk.models.components.loading import (
    check_pipeline,
    check_vocabulary,
    checked,
    hide_progress_bars,
    load_component,
    load_pipeline,
    outline,
    reading,
)
from ftk.models.components.placeholders import Placeholder, Placeholders
from ftk.models.components.schedule import NoiseSchedule
from ftk.models.components.single_file import Layout
from ftk.models.components.weights import Tensor

if TYPE_CHECKING:
    import torch

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34
"""Tokens of the template before the caption: the pipeline drops them from the embeddings."""
NATIVE_SIZES = ((1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472), (1584, 1056), (1056, 1584))
"""(width, height) in px, from the model card. Its first version had 1472 x 1140 for 4:3, which is not a multiple of 16: the
pipeline rounds it down to 1472 x 1136."""
_BLOCK = "QwenImageTransformerBlock"
_IMAGE_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_IMAGE_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2")
_TEXT_MLP = ("txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImageConfig(FamilyConfig):
    """Settings under `model:`."""

    max_text_tokens: int = Field(default=1024, ge=1, le=1024, description="tokens of a caption that are kept; the rest is cut")


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenTextEncoder:
    """What `encode_texts` needs in memory.

    `prefix` holds the keys and values of the template's first tokens, `prefix_ids`, a batch of one: they come before the
    caption, and in a causal model nothing after them changes them. `words` are new ones that were added.
    """

    tokenizer: Any
    model: Any
    prefix_ids: list[int]
    prefix: Any
    words: dict[str, Placeholder] = field(default_factory=dict)


class QwenImage:
    """The text-to-image model. Text item: `embeds` [L,D], the normed last hidden state after the template's prefix.

    With new words also `input_ids` [L], the tokens that they are the states of.
    """

    name = "qwen-image"
    Config: ClassVar[type[BaseModel]] = QwenImageConfig
    geometry = LatentGeometry(channels=16, factor=8, patch=2)
    encoder_version = 2
    pads_texts = False
    text_token_bytes = 7168
    latent_components = ("vae",)
    text_components: tuple[str, ...] = ("text_encoder", "tokenizer")
    denoiser_components = ("transformer", "scheduler")
    denoiser_attribute = "transformer"
    token_encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    embedding_keys: Mapping[str, str] = {}
    sigma_defaults: Mapping[str, Any] = {}
    native_sizes = NATIVE_SIZES
    references: ReferenceRule | None = None
    control_form: ControlForm = "latents"
    block_classes = (_BLOCK,)
    target_groups: Mapping[str, TargetGroup] = {
        "attention": TargetGroup(in_blocks={_BLOCK: _IMAGE_ATTENTION}),
        "attention+text": TargetGroup(in_blocks={_BLOCK: (*_IMAGE_ATTENTION, *_TEXT_ATTENTION)}),
        "attention+mlp": TargetGroup(in_blocks={_BLOCK: (*_IMAGE_ATTENTION, *_IMAGE_MLP)}),
        "text-kv": TargetGroup(in_blocks={_BLOCK: ("add_k_proj", "add_v_proj")}),
        "all-linear": TargetGroup(
            in_blocks={_BLOCK: (*_IMAGE_ATTENTION, *_TEXT_ATTENTION, *_IMAGE_MLP, *_TEXT_MLP, "img_mod.1", "txt_mod.1")},
            outside=("img_in", "txt_in", "linear_1", "linear_2", "norm_out.linear", "proj_out"),
        ),
    }

    single_file: Mapping[str, Sequence[Layout]] = {
        "transformer": (
            Layout(
                model_class="QwenImageTransformer2DModel",
                anchor="transformer_blocks.0.attn.add_q_proj.weight",
                prefixes=("", "model.diffusion_model.", "diffusion_model."),
            ),
        )
    }

    def __init__(self, config: QwenImageConfig | None = None) -> None:
        self.config = config or QwenImageConfig()

    @property
    def max_text_tokens(self) -> int:
        """The pipeline's own limit, unless the run file has a lower one."""
        return self.config.max_text_tokens

    def check(self, directory: Path) -> None:
        """A Diffusers folder whose `model_index.json` names QwenImagePipeline."""
        check_pipeline(directory, self.name, "QwenImagePipeline")

    def single_file_config(self, tensors: Mapping[str, Tensor]) -> str:
        """The one model; a file of it holds the transformer alone."""
        return "Qwen/Qwen-Image"

    def unconditional(self, directory: Path) -> str:
        """A space: what the model's own examples give as the negative prompt. Without one its pipeline has no guidance."""
        return " "

    def text_options(self) -> dict[str, Any]:
        """The prompt template and the cut."""
        return {"template": TEMPLATE, "prefix_tokens": PREFIX_TOKENS, "max_text_tokens": self.max_text_tokens}

    def load_vae(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """AutoencoderKLQwenImage, frozen, its encoder folded for single frames: `vae.encode` is gone, `vae.decode` is not."""
        from diffusers import AutoencoderKLQwenImage

        _check_statistics(directory)
        vae = load_component(AutoencoderKLQwenImage, directory, "vae", dtype).requires_grad_(False).eval()
        fold_single_frame(vae)
        return vae.to(device)

    def normalisation(self, directory: Path) -> dict[str, Any]:
        """Per-channel mean and std: latents are (z - mean) / std."""
        config = _vae_config(directory)
        return {"latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std)}

    def image_flops(self, directory: Path, height: int, width: int) -> float:
        """Of the folded encoder: 2.85e12 at 1024 px with 96 base channels, and as the square of these."""
        base_dim: int = _vae_config(directory).base_dim
        return 2.85e12 * (base_dim / 96) ** 2 * height * width / 1024**2

    def text_flops(self, directory: Path, tokens: int) -> float:
        """Two for each weight and token; the weights are two bytes each on disk."""
        num_bytes = sum(path.stat().st_size for path in (directory / "text_encoder").glob("*.safetensors"))
        return 2.0 * num_bytes / 2 * tokens

    def encode_images(self, vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Through the folded encoder; the Gaussian stays Gaussian under the affine normalisation."""
        import torch
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        with torch.inference_mode():
            # Convolutions take the layout of their input if it has one; here it is that of their weights.
            pixels_BCHW = pixels_BCHW.to(vae.device, vae.dtype).contiguous()
            if isinstance(vae.quant_conv, torch.nn.Conv3d):  # a pipeline's own
                posterior = vae.encode(pixels_BCHW.unsqueeze(2)).latent_dist
                posterior = DiagonalGaussianDistribution(posterior.parameters.squeeze(2))
            else:
                posterior = DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(pixels_BCHW)))
            shift, scale = self._affine(vae)
            mean: torch.Tensor = (posterior.mean.float() - shift) * scale
            std: torch.Tensor = posterior.std.float() * scale
        return mean, std

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """The RMS norms of the widest stage hold most: five tensors of its size at once, see `QwenImageRMS_norm`.

        Those are the residual, the input, the input normalised and two products. In half precision the input is normalised in
        fp32: 2 + 2 + 4 + 4 bytes. Attention is at an eighth of the sides, and its kernels keep no matrix of scores.
        """
        bytes_per_value = 20 if vae.dtype.itemsize == 4 else 12
        widths = [vae.config.base_dim * factor / 4**stage for stage, factor in enumerate(vae.config.dim_mult)]
        return int(height * width * (max(widths) * bytes_per_value + vae.config.input_channels * vae.dtype.itemsize))

    def decode(self, vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Inverse of the normalisation, then the decoder."""
        import torch

        with torch.inference_mode():
            shift, scale = self._affine(vae)
            latents = (latents_BCHW.to(vae.device).float() / scale + shift).unsqueeze(2)
            pixels: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0][:, :, 0]
        return pixels

    @staticmethod
    def _affine(vae: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
        import torch

        shape = (1, vae.config.z_dim, 1, 1)
        shift = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
        return shift, (1.0 / torch.tensor(vae.config.latents_std, device=vae.device)).view(shape)

    def load_text_encoder(
        self, directory: Path, dtype: "torch.dtype", device: "torch.device", place: PutOnDevice = move
    ) -> Any:
        """Qwen2.5-VL. Its RoPE frequencies stay in fp32: a second `.to(dtype)` would round them to bf16."""
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        tokenizer = self._tokenizer(directory)
        prefix_ids = tokenizer(TEMPLATE.split("{}")[0])["input_ids"]
        if len(prefix_ids) != PREFIX_TOKENS:
            raise ModelError(
                f"{directory / 'tokenizer'}: the prompt template starts with {len(prefix_ids)} tokens instead of "
                f"{PREFIX_TOKENS}, so captions would be cut in the wrong place. This is not Qwen-Image's tokenizer."
            )
        model = load_component(Qwen2_5_VLForConditionalGeneration, directory, "text_encoder", dtype)
        check_vocabulary(tokenizer, model, directory / "tokenizer")
        model = place(model.requires_grad_(False).eval(), device)
        with torch.inference_mode():
            ids_BL = torch.tensor([prefix_ids], device=device)
            prefix = model.model.language_model(input_ids=ids_BL, use_cache=True).past_key_values
        return QwenTextEncoder(tokenizer=tokenizer, model=model, prefix_ids=prefix_ids, prefix=prefix)

    def encode_texts(
        self, encoder: QwenTextEncoder, captions: Sequence[str], references: "Sequence[Sequence[torch.Tensor]]" = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As `QwenImagePipeline._get_qwen_prompt_embeds`, without what it computes for nothing.

        That is the language model's head, whose logits are unused, and the template's prefix, the same for each caption.
        Texts are padded on the right, where no token before the padding sees it: the model needs no mask of it.

        Raises:
            ModelError: a caption starts with a line break.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(row) for row in self._caption_ids(encoder, captions)]
        with torch.inference_mode():
            prefix = copy.deepcopy(encoder.prefix)  # the model appends to what it is given
            prefix.batch_repeat_interleave(len(ids))
            # The language model itself counts positions on from the prefix; text has the same in all of M-RoPE's three axes.
            hidden_BLD = encoder.model.model.language_model(
                input_ids=pad_sequence(ids, batch_first=True).to(encoder.model.device), past_key_values=prefix
            ).last_hidden_state
        items = [{"embeds": row[: len(kept)].clone()} for row, kept in zip(hidden_BLD, ids, strict=True)]
        if encoder.words:
            return [
                {**item, "input_ids": kept.to(hidden_BLD.device, torch.int32)} for item, kept in zip(items, ids, strict=True)
            ]
        return items

    def text_lengths(self, encoder: Any, captions: Sequence[str]) -> list[int]:
        """Caption and the template's end, 5 tokens, after the cut."""
        return [len(row) for row in self._caption_ids(encoder, captions)]

    def tokens_cut(self, directory: Path, captions: Sequence[str], tokens: Placeholders | None = None) -> list[int]:
        """The template's end is cut first."""
        tokenizer = self.tokenizer_with(directory, "text_encoder", tokens or {})
        rows = tokenizer(_prompts(captions, tokens or {}), verbose=False)["input_ids"]
        return [max(0, len(row) - PREFIX_TOKENS - self.max_text_tokens) for row in rows]

    def tokenizer_with(self, directory: Path, encoder: str, tokens: Placeholders) -> Any:
        """Qwen2Tokenizer."""
        tokenizer = self._tokenizer(directory)
        placeholders.add(tokenizer, tokens)
        return tokenizer

    def add_tokens(self, encoder: QwenTextEncoder, tokens: Placeholders) -> None:
        """To the tokenizer and the embedding table, which has spare rows in the real model."""
        placeholders.add_to_encoder(encoder.tokenizer, encoder.model, tokens)
        encoder.words.update(tokens)

    def load_encoder(self, directory: Path, name: str, dtype: "torch.dtype", device: "torch.device") -> Any:
        """The language model of Qwen2.5-VL, frozen, in training mode, with the template's beginning as a buffer [34]."""
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        tokenizer = self._tokenizer(directory)
        if device.type == "meta":
            model = outline(Qwen2_5_VLForConditionalGeneration, directory / name, dtype)
        else:
            model = load_component(Qwen2_5_VLForConditionalGeneration, directory, name, dtype)
        language_model = model.model.language_model.requires_grad_(False).train().to(device)
        prefix_ids = torch.tensor(tokenizer(TEMPLATE.split("{}")[0])["input_ids"], device=device)
        language_model.register_buffer("prefix_ids", prefix_ids, persistent=False)
        return language_model

    def encode_tokens(self, encoders: Mapping[str, Any], texts: Texts) -> dict[str, "torch.Tensor | None"]:
        """`embeds` from `input_ids`, zeros where they are padded, as `encode_texts`; gradients pass through."""
        import torch

        model, ids_BL, mask_BL = encoders["text_encoder"], texts["input_ids"], texts["mask"]
        assert ids_BL is not None
        whole_BL = torch.cat([model.prefix_ids.expand(len(ids_BL), -1), ids_BL.long()], dim=1)
        embeds_BLD = model(input_ids=whole_BL, use_cache=False).last_hidden_state[:, PREFIX_TOKENS:]
        return {**texts, "embeds": embeds_BLD if mask_BL is None else embeds_BLD.where(mask_BL[..., None], 0.0)}

    def state_width(self, denoiser: Any) -> int:
        """3584 in the real model."""
        return int(denoiser.config.joint_attention_dim)

    def teach(
        self, pipeline: Any, tokens: Placeholders, inputs_ND: "torch.Tensor | None", outputs_ND: "torch.Tensor | None"
    ) -> None:
        """Its `encode_prompt` writes further tokens into prompts, and the last hidden states have the new rows."""
        tokenizer, model = pipeline.tokenizer, pipeline.text_encoder
        placeholders.add_to_encoder(tokenizer, model, tokens)
        first = placeholders.first_id(tokenizer, tokens)
        if inputs_ND is not None:
            placeholders.grow(model, first, inputs_ND)
        plain = pipeline.encode_prompt

        def encode_prompt(prompt: Any = None, *positional: Any, **named: Any) -> Any:
            texts = [prompt] if isinstance(prompt, str) else prompt
            return plain(None if texts is None else placeholders.joined(texts, tokens), *positional, **named)

        pipeline.encode_prompt = functools.wraps(plain)(encode_prompt)
        if outputs_ND is None:
            return

        def overwrite(_module: Any, _positional: Any, named: dict[str, Any], outputs: Any) -> None:
            *others, last_BLD = outputs.hidden_states
            outputs.hidden_states = (*others, placeholders.overwritten(last_BLD, named["input_ids"], first, outputs_ND))

        model.register_forward_hook(overwrite, with_kwargs=True)

    @staticmethod
    def _tokenizer(directory: Path) -> Any:
        from transformers import Qwen2Tokenizer

        with reading(directory / "tokenizer", "a tokenizer"):
            tokenizer = Qwen2Tokenizer.from_pretrained(directory / "tokenizer")
            tokenizer("a")
        return tokenizer

    def text_memory(self, encoder: QwenTextEncoder, tokens: int) -> int:
        """Keys and values of all layers, the widest part of one layer, and the mask, which is causal.

        The widest part is the MLP (gate, value and their product) beside residual, norm and output, or attention's own.
        """
        config, itemsize = encoder.model.config.text_config, encoder.model.dtype.itemsize
        key_value = 2 * config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        layer = max(3 * config.intermediate_size + 4 * config.hidden_size, 8 * config.hidden_size)
        seen = tokens + PREFIX_TOKENS
        return int(itemsize * (seen * key_value * config.num_hidden_layers + tokens * layer) + tokens * seen * (1 + itemsize))

    def _caption_ids(self, encoder: QwenTextEncoder, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption and of what the template has after it, cut to `max_text_tokens`."""
        rows = encoder.tokenizer(
            _prompts(captions, encoder.words),
            max_length=self.max_text_tokens + PREFIX_TOKENS,
            truncation=True,
        )["input_ids"]
        for caption, row in zip(captions, rows, strict=True):
            if row[:PREFIX_TOKENS] != encoder.prefix_ids:
                raise ModelError(
                    f"caption {caption[:60]!r}: it starts with a line break, which becomes one token with the line break "
                    f"that the prompt template ends in. Remove the white space at its start."
                )
        return [row[PREFIX_TOKENS:] for row in rows]

    def load_denoiser(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """QwenImageTransformer2DModel, frozen."""
        from diffusers import QwenImageTransformer2DModel

        if device.type == "meta":
            return outline(QwenImageTransformer2DModel, directory / "transformer", dtype)
        denoiser = load_component(QwenImageTransformer2DModel, directory, "transformer", dtype)
        return denoiser.requires_grad_(False).train().to(device)

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Flow matching on the scheduler's own training table."""
        return flow_matching.load_schedule(directory)

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: "torch.dtype") -> Activations:
        """Counted from `QwenImageTransformerBlock`, in units of one token's hidden state of width D.

        Each stream keeps, for its backward pass: the inputs of both LayerNorms (2), query and key before their RMSNorms (2),
        query, key, value and output of the joint attention (4), and the input of GELU (4). Below fp32 the RMSNorms keep query
        and key in fp32 too. What an adapter multiplies is kept once more, see `_adapter_inputs`. A frozen linear layer keeps
        its weights alone, and modulation, which hangs on the timestep alone, its factors.
        """
        block, width = denoiser.transformer_blocks[0], denoiser.inner_dim * dtype.itemsize
        fp32_norms = 2 * denoiser.inner_dim * 4 if dtype.itemsize < 4 else 0
        kept = image_tokens * _adapter_inputs(block, "img", dtype) + text_tokens * _adapter_inputs(block, "txt", dtype)
        hidden = (image_tokens + text_tokens) * width
        text_width = denoiser.txt_norm.dim[0]
        return Activations(
            block_saved=int(12 * hidden + (image_tokens + text_tokens) * fp32_norms + kept * width),
            block_input=hidden,
            # Backward through the MLP: gradients at both sides of GELU, of its input, of two residual streams, and a copy.
            block_working=12 * hidden,
            # Both embeddings, norm and output of the last layer; texts are normed in fp32.
            outside=2 * hidden + 2 * image_tokens * width + text_tokens * text_width * (8 + 2 * dtype.itemsize),
        )

    def collate_texts(self, texts: Sequence[Mapping[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor | None"]:
        """`embeds` [B,L,D] zero-padded to the longest, `mask` [B,L] bool or None; `input_ids` [B,L] of texts that have them."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        lengths = torch.tensor([len(text["embeds"]) for text in texts])
        padded: dict[str, torch.Tensor | None] = {
            name: pad_sequence([text[name] for text in texts], batch_first=True) for name in texts[0]
        }
        is_full = len(set(lengths.tolist())) == 1
        return {**padded, "mask": None if is_full else torch.arange(int(lengths.max()))[None, :] < lengths[:, None]}

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """Velocity n - x: 2x2 patches in, 2x2 patches out, all images of the batch of one size.

        Behind the image's tokens stand those of its references, of an edit model.
        """
        height, width = noisy_BCHW.shape[-2:]
        output_BND = model.denoiser(**_inputs(model, noisy_BCHW, sigma_B, conditions))[0].float()
        return flow_matching.unpack(output_BND[:, : (height // 2) * (width // 2)], height, width)

    def control_classes(self) -> tuple[Any, Any]:
        """QwenImageControlNetModel and QwenImageControlNetPipeline."""
        from diffusers import QwenImageControlNetModel, QwenImageControlNetPipeline

        return QwenImageControlNetModel, QwenImageControlNetPipeline

    def make_control_network(self, denoiser: Any, num_blocks: int | None) -> Any:
        """QwenImageControlNetModel of the first blocks, with all that comes before them."""
        network_class, _ = self.control_classes()
        count = control_networks.num_blocks(num_blocks, len(denoiser.transformer_blocks))
        return control_networks.copy_of(network_class, denoiser, num_layers=count)

    def control_residuals(
        self, model: Model, network: Any, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> Mapping[str, Any]:
        """The network reads the control image's latents, packed as the image's are."""
        inputs = _inputs(model, noisy_BCHW, sigma_B, conditions)
        outputs = [network(controlnet_cond=flow_matching.pack(control), **inputs) for control in conditions.controls]
        return {"controlnet_block_samples": control_networks.summed(outputs)}

    def draw_controlled(
        self, pipeline: Any, network: Any, controls: "Sequence[torch.Tensor]", strength: float, options: Mapping[str, Any]
    ) -> Any:
        """With diffusers' QwenImageControlNetPipeline, which takes the given latents for those that it would draw.

        It computes the network with the prompt alone, and uses what that adds for the negative prompt too.
        """
        from diffusers import QwenImageMultiControlNetModel

        is_one = len(controls) == 1
        _, pipeline_class = self.control_classes()
        controlled = control_networks.official(
            pipeline_class, pipeline, network if is_one else QwenImageMultiControlNetModel([network])
        )
        shift, scale = self._affine(pipeline.vae)
        latents = [(each.to(shift.device).float() / scale + shift).unsqueeze(2) for each in controls]
        images = control_networks.blank_images(controls, self.geometry.factor)
        with control_networks.encoding(pipeline.vae, latents):
            return controlled(
                control_image=images[0] if is_one else images,
                controlnet_conditioning_scale=strength if is_one else [strength] * len(images),
                **options,
            )

    def adapter_names(self, form: str, component: str, module: Any) -> AdapterNames:
        """diffusers' names: ComfyUI knows them after `diffusion_model.`, musubi-tuner after `lora_unet_` with `_` for `.`."""
        if form == "kohya":
            return AdapterNames(
                module=lambda name: "lora_unet_" + name.replace(".", "_"),
                factors=("lora_down", "lora_up"),
                is_read=lambda name: name.startswith("transformer_blocks."),
            )
        if form == "lycoris":
            return AdapterNames(module=lambda name: "lycoris_" + name.replace(".", "_"))
        return AdapterNames(module=lambda name: f"diffusion_model.{name}")

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' QwenImagePipeline."""
        from diffusers import QwenImagePipeline

        return load_pipeline(QwenImagePipeline, directory, device, dtype=dtype, **components)

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """Unpadded embeddings of one prompt, all of them valid."""
        import torch

        embeds = texts["embeds"][None]
        return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """True classifier-free guidance; at 1 or less the pipeline leaves the negative prompt out.

        The pipeline cuts prompts at 512 tokens unless it is told how many to keep.
        """
        is_cut = self.config.max_text_tokens < type(self.config)().max_text_tokens
        return {"true_cfg_scale": guidance_scale, **({"max_sequence_length": self.max_text_tokens} if is_cut else {})}

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As musubi-tuner and ai-toolkit write them."""
        return {"modelspec.architecture": "Qwen-Image", "ss_base_model_version": "qwen_image"}

    def tiny(self, directory: Path) -> None:
        """About 92k denoiser parameters and 3 MB on disk; real latent statistics, the real template of 34 tokens."""
        from diffusers import QwenImagePipeline

        tokenizer = tiny_tokenizer(TEMPLATE, PREFIX_TOKENS)
        write_tiny(directory, QwenImagePipeline, tokenizer, tiny_text_config(len(tokenizer)))


def write_tiny(
    directory: Path, pipeline_class: Any, tokenizer: Any, text_config: Mapping[str, Any], **transformer_settings: Any
) -> None:
    """A complete small random model of a pipeline in the Diffusers layout; what reads images is left to the caller."""
    import torch
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hide_progress_bars()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
            **transformer_settings,
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**text_config))
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, max_image_seq_len=8192, base_shift=0.5, max_shift=0.9, shift=1.0,
        shift_terminal=0.02, time_shift_type="exponential", use_dynamic_shifting=True,
    )  # fmt: skip
    parts = {"processor": None} if "processor" in inspect.signature(pipeline_class.__init__).parameters else {}
    pipeline = pipeline_class(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, **parts
    )
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL if parts else level)  # it would complain of a processor that is None
    pipeline.save_pretrained(directory)
    logger.setLevel(level)


def _prompts(captions: Sequence[str], words: Placeholders) -> list[str]:
    """Captions in the template."""
    return [TEMPLATE.format(caption) for caption in placeholders.joined(captions, words)]


def _adapter_inputs(block: Any, stream: str, dtype: "torch.dtype") -> float:
    """What the trained parts of a block keep of one token's inputs in one stream, in hidden states of the working precision.

    Layers that read the same tensor share one copy, unless their adapters are in another precision: then each makes its own.
    """
    image = ("to_q", "to_k", "to_v", "to_out.0")
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    *projections, output = (f"attn.{name}" for name in (image if stream == "img" else text))
    readers = ((1, projections), (1, [output]), (1, [f"{stream}_mlp.net.0.proj"]), (4, [f"{stream}_mlp.net.2"]))
    total = 0.0
    for width, layers in readers:
        found = [one for layer in layers if (one := _trained(block, layer)) is not None]
        # PEFT gives adapters the precision of their layer, but not on the meta device.
        sizes = [dtype.itemsize if one.is_meta else one.dtype.itemsize for one in found]
        total += width * (min(len(sizes), 1) if set(sizes) <= {dtype.itemsize} else sum(sizes) / dtype.itemsize)
    # With a gradient of its own, modulation keeps what it multiplies: both normed inputs, and both outputs that it gates.
    return total + (4 if _trained(block, f"{stream}_mod.1") is not None else 0)


def _trained(block: Any, layer: str) -> Any:
    """A trained parameter of this layer, or of an adapter on it."""
    named = ((name, one) for name, one in block.named_parameters() if one.requires_grad)
    return next((one for name, one in named if name.startswith(f"{layer}.")), None)


def fold_single_frame(vae: Any) -> None:
    """Turn the encoder of a Qwen-Image VAE, in place, into one of images: `quant_conv(encoder(pixels_BCHW))`.

    Exact for one frame. Its causal convolutions put zeros in front of it, so that it meets the last temporal slice of their
    kernels alone: that slice is kept, as a 2-D convolution. Temporal downsampling leaves a first frame as it is. The video
    encoder is gone with its weights; `vae.encode` fails.

    Source: diffusers, `QwenImageCausalConv3d` and `QwenImageResample` in `autoencoder_kl_qwenimage.py`.
    """
    import torch
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage as video

    for parent in list(vae.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, video.QwenImageCausalConv3d):
                setattr(parent, name, _last_slice(child))
            elif isinstance(child, video.QwenImageResample):
                setattr(parent, name, child.resample)
    vae.quant_conv = _last_slice(vae.quant_conv)
    for module in vae.encoder.modules():
        if isinstance(module, video.QwenImageRMS_norm):
            module.gamma.data = module.gamma.data.view(-1, 1, 1)
        elif isinstance(module, video.QwenImageAttentionBlock):
            module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].unsqueeze(2),))
            module.register_forward_hook(lambda _module, _inputs, output: output.squeeze(2))
    if vae.dtype != torch.float32:
        # A third faster. In fp32 it is a sixth, at three times the rounding error (2.7e-6 of the largest value): not worth it.
        vae.encoder.to(memory_format=torch.channels_last)


def _last_slice(convolution: Any) -> "torch.nn.Conv2d":
    from torch import nn

    left, _, top, _, _, _ = convolution._padding  # diffusers keeps the padding there, in the order of F.pad
    flat = nn.Conv2d(
        convolution.in_channels, convolution.out_channels, convolution.kernel_size[1:],
        stride=convolution.stride[1:], padding=(top, left), device="meta",
    )  # fmt: skip
    # a view would keep the whole kernel in memory
    flat.weight = nn.Parameter(convolution.weight[:, :, -1].clone(), requires_grad=False)
    flat.bias = nn.Parameter(convolution.bias.clone(), requires_grad=False)
    return flat.train(convolution.training)


def _vae_config(directory: Path) -> Any:
    """The VAE's configuration with the defaults of its class."""
    from diffusers import AutoencoderKLQwenImage

    _check_statistics(directory)
    return checked(AutoencoderKLQwenImage, directory / "vae")


def _check_statistics(directory: Path) -> None:
    path = directory / "vae" / "config.json"
    tree = configuration.read(path)
    kl_vae.check_statistics(path, tree, tree.get("z_dim", 16))


def tiny_tokenizer(template: str, prefix_tokens: int) -> Any:
    """A BPE trained on the template alone, so that each of its words is one token, as in Qwen's own vocabulary."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
               "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
    words = template
    for token in special:
        words = words.replace(token, "")
    bpe.train_from_iterator([words], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        additional_special_tokens=special,
    )
    ids = tokenizer(template.split("{}")[0])["input_ids"]
    assert len(ids) == prefix_tokens, f"the tiny tokenizer's prefix has {len(ids)} tokens"
    return tokenizer


def tiny_text_config(vocabulary: int) -> dict[str, Any]:
    return {
        "text_config": {
            "bos_token_id": None, "eos_token_id": None,
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": True,
    }  # fmt: skip


def _inputs(model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions) -> dict[str, Any]:
    """What the transformer is given, and a network that is a copy of it."""
    import torch

    texts, images = encoded(model, conditions.texts), (noisy_BCHW, *conditions.references)
    return {
        "hidden_states": torch.cat([flow_matching.pack(image) for image in images], dim=1),
        # The pipeline hands over (1000 sigma) / 1000, in fp32: the same roundings, so the same bits.
        "timestep": (sigma_B.float() * 1000) / 1000,
        "encoder_hidden_states": texts["embeds"],
        "encoder_hidden_states_mask": texts["mask"],
        "img_shapes": [[(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in images]] * len(noisy_BCHW),
        "return_dict": False,
    }


FAMILY = QwenImage()
