"""Stable Diffusion 1.x and 2.x: a U-Net of 0.86 billion parameters, one CLIP text encoder and a 4-channel VAE.

Sources: diffusers, `pipelines/stable_diffusion/pipeline_stable_diffusion.py` and
`examples/text_to_image/train_text_to_image_lora.py`; Rombach et al. 2022 (latent diffusion, arXiv 2112.10752).

What any U-Net of this line shares is a function here, and `sdxl.py` calls it.

Shape legend: B batch, C latent channels (4), H W latent cells, L text tokens (77), D text width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import ModelError
from ftk.models.base import (
    Activations,
    LatentGeometry,
    NoiseSchedule,
    SampleGeometry,
    check_pipeline,
    first_line,
    hide_progress_bars,
    load_component,
    load_pipeline,
    refuse_references,
)

if TYPE_CHECKING:
    import torch

CLIP_TOKENS = 77
GEOMETRY = LatentGeometry(channels=4, factor=8, patch=8)
"""Sides are multiples of 64 px: the U-Net of 1.x halves latents three times, and SDXL's buckets have such sides too."""
BLOCK_CLASS = "BasicTransformerBlock"
"""Holds all attention and most activations, and in SDXL 85% of the weights; between its copies lie convolutions."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ff.net.0.proj", "ff.net.2")
TEXT_KV = ("attn2.to_k", "attn2.to_v")
TIME = ("linear_1", "linear_2", "time_emb_proj")
SCHEDULE: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""What schedulers of this line are configured with."""
_BACKWARD_WIDTHS = 14
"""Of a block's input: gradients on both sides of the gated MLP (4 and 8 widths), of its input and of the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """What `encode_texts` needs in memory."""

    tokenizer: Any
    model: Any


class StableDiffusion:
    """Text to image with one CLIP encoder. Text item: `embeds` [77,D], the normed last hidden state, padding included."""

    name = "stable-diffusion"
    geometry = GEOMETRY
    encoder_version = 1
    max_text_tokens = CLIP_TOKENS
    pads_texts = True
    text_token_bytes = 3072
    latent_components = ("vae",)
    text_components = ("text_encoder", "tokenizer")
    denoiser_components = ("unet", "scheduler")
    target_groups: Mapping[str, Sequence[str]] = {
        "attention": ATTENTION,
        "attention+mlp": (*ATTENTION, *MLP),
        "text-kv": TEXT_KV,
        "all-linear": (*ATTENTION, *MLP, *TIME),
    }
    block_class = BLOCK_CLASS

    def check(self, directory: Path) -> None:
        """A Diffusers folder whose `model_index.json` names StableDiffusionPipeline."""
        check_pipeline(directory, self.name, "StableDiffusionPipeline")

    def text_options(self) -> dict[str, Any]:
        """Which layer is read, and how texts are padded."""
        return {"layer": "last, normed", "padding": "max_length", "max_text_tokens": self.max_text_tokens}

    def load_vae(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """AutoencoderKL, frozen."""
        return load_vae(directory, dtype).to(device)

    def normalisation(self, directory: Path) -> dict[str, Any]:
        """Per-channel mean and std: latents are (z - mean) / std, where std is 1 / `scaling_factor`."""
        return normalisation(directory)

    def image_flops(self, directory: Path, height: int, width: int) -> float:
        """Of the VAE's encoder."""
        return encoder_flops(directory, height, width)

    def text_flops(self, directory: Path, tokens: int) -> float:
        """Of 77 tokens, whatever the text's own number."""
        return clip_flops(directory / "text_encoder")

    def encode_images(self, vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Posterior mean and std, times `scaling_factor`."""
        return encode_images(vae, pixels_BCHW)

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """Of the encoder's first stage."""
        return encoder_memory(vae, height, width)

    def decode(self, vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Inverse of the normalisation, then the decoder."""
        return decode(vae, latents_BCHW)

    def load_text_encoder(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> TextEncoder:
        """CLIPTextModel."""
        from transformers import CLIPTextModel

        tokenizer = load_tokenizer(directory, "tokenizer")
        model = load_component(CLIPTextModel, directory, "text_encoder", dtype)
        return TextEncoder(tokenizer=tokenizer, model=model.requires_grad_(False).eval().to(device))

    def encode_texts(
        self, encoder: TextEncoder, captions: Sequence[str], references: Sequence["torch.Tensor"] = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As `StableDiffusionPipeline.encode_prompt`: padding is text to the model, unless its config says otherwise."""
        import torch

        refuse_references(self.name, references)
        model = encoder.model
        with torch.inference_mode():
            batch = clip_tokens(encoder.tokenizer, captions, model.device)
            is_masked = getattr(model.config, "use_attention_mask", False)
            mask_BL = batch["attention_mask"] if is_masked else None
            embeds_BLD = model(batch["input_ids"], attention_mask=mask_BL)[0]
        return [{"embeds": row.clone()} for row in embeds_BLD]

    def text_lengths(self, encoder: TextEncoder, captions: Sequence[str]) -> list[int]:
        """Always 77."""
        return [CLIP_TOKENS] * len(captions)

    def text_memory(self, encoder: TextEncoder, tokens: int) -> int:
        """Of the widest part of a layer."""
        return clip_memory(encoder.model, tokens)

    def load_denoiser(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """UNet2DConditionModel, frozen."""
        return load_unet(directory, dtype, device)

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Epsilon or v, and the noise levels of training."""
        return load_schedule(directory)

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: "torch.dtype") -> Activations:
        """Counted in a forward pass without values."""
        return unet_activations(denoiser, image_tokens * GEOMETRY.patch**2, text_tokens, dtype)

    def collate_texts(
        self, texts: Sequence[Mapping[str, "torch.Tensor"]], geometries: Sequence[SampleGeometry] = ()
    ) -> dict[str, "torch.Tensor | None"]:
        """`embeds` [B,77,D]: all texts have one length, and there is no mask."""
        import torch

        return {"embeds": torch.stack([text["embeds"] for text in texts])}

    def predict(
        self,
        denoiser: Any,
        noisy_BCHW: "torch.Tensor",
        time_B: "torch.Tensor",
        texts: Mapping[str, "torch.Tensor | None"],
        references: Sequence["torch.Tensor"] = (),
        residuals: Sequence["torch.Tensor"] | None = None,
    ) -> "torch.Tensor":
        """Epsilon or v. `residuals`: one for each skip connection, from the top, and the middle block's at last."""
        refuse_references(self.name, references)
        return unet_prediction(denoiser, noisy_BCHW, time_B, texts["embeds"], residuals)

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' StableDiffusionPipeline, without its safety checker, which is no part of what is trained."""
        from diffusers import StableDiffusionPipeline

        left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return load_pipeline(StableDiffusionPipeline, directory, device, dtype=dtype, **left_out, **components)

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """Embeddings of one prompt."""
        return {"prompt_embeds": texts["embeds"][None]}

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """Classifier-free guidance; at 1 or less the pipeline leaves the negative prompt out."""
        return {"guidance_scale": guidance_scale}

    def tiny(self, directory: Path) -> None:
        """About 1.1 MB on disk: two levels, epsilon, the real schedule and 77 tokens."""
        import torch
        from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel

        hide_progress_bars()
        tokenizer = tiny_tokenizer("<|endoftext|>")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                block_out_channels=(8, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
                norm_num_groups=4, cross_attention_dim=32, attention_head_dim=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            vae = tiny_vae(0.18215)
            text_encoder = CLIPTextModel(tiny_text_config(tokenizer))
        StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
            scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SCHEDULE),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(directory)  # fmt: skip


# --- the VAE ------------------------------------------------------------------------------------------------------------


def load_vae(directory: Path, dtype: "torch.dtype") -> Any:
    """AutoencoderKL, frozen, on the CPU."""
    from diffusers import AutoencoderKL

    return load_component(AutoencoderKL, directory, "vae", dtype).requires_grad_(False).eval()


def encode_images(vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
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


def encoder_flops(directory: Path, height: int, width: int) -> float:
    """4.5e12 at 1024 px with the usual widths, counted by torch's FlopCounterMode; by the square of the first width."""
    first_width: int = _vae_config(directory).block_out_channels[0]
    return 4.5e12 * (first_width / 128) ** 2 * height * width / 1024**2


def encoder_memory(vae: Any, height: int, width: int) -> int:
    """A residual block at full size holds most: five tensors of its width at once.

    Those are the residual, what is normalised, the norm's result, its SiLU and a convolution's output. Attention is at an
    eighth of the sides, and its kernels keep no matrix of scores.
    """
    widths = [channels / 4**stage for stage, channels in enumerate(vae.config.block_out_channels)]
    return int(height * width * (5 * max(widths) + vae.config.in_channels) * vae.dtype.itemsize)


def tiny_vae(scaling_factor: float) -> Any:
    """A VAE with the real factor of 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1,
        norm_num_groups=2, sample_size=64, scaling_factor=scaling_factor,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _vae_config(directory: Path) -> Any:
    """The VAE's configuration with the defaults of its class."""
    import torch
    from diffusers import AutoencoderKL

    try:
        with torch.device("meta"):
            return AutoencoderKL.from_config(AutoencoderKL.load_config(directory / "vae")).config
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / 'vae'} cannot be read as AutoencoderKL: {first_line(error)}") from error


def _constants(config: Any) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel; a few VAEs of this line have statistics beside the factor, as SDXL's pipeline reads."""
    channels = config.latent_channels
    shifts, stds = config.latents_mean or [0.0] * channels, config.latents_std or [1.0] * channels
    return list(shifts), [config.scaling_factor / std for std in stds]


def _affine(vae: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    shifts, scales = (torch.tensor(values, device=vae.device).view(1, -1, 1, 1) for values in _constants(vae.config))
    return shifts, scales


# --- CLIP ---------------------------------------------------------------------------------------------------------------


def load_tokenizer(directory: Path, name: str) -> Any:
    """CLIPTokenizer; one of another length than 77 would give texts that no model of this line was trained on."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(directory / name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / name} cannot be loaded: {first_line(error)}") from error
    if tokenizer.model_max_length != CLIP_TOKENS:
        raise ModelError(
            f"{directory / name}: its texts have {tokenizer.model_max_length} tokens instead of {CLIP_TOKENS}. "
            f"This is not the CLIP tokenizer of a Stable Diffusion model."
        )
    return tokenizer


def clip_tokens(tokenizer: Any, captions: Sequence[str], device: "torch.device") -> Any:
    """`input_ids` and `attention_mask`, each [B,77], cut and padded by the tokenizer's own rule, as the pipelines do."""
    return tokenizer(
        list(captions), padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
    ).to(device)  # fmt: skip


def clip_flops(directory: Path) -> float:
    """Two for each weight of the layers and token, of 77 tokens."""
    try:
        config = storage.read_json(directory / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / 'config.json'} cannot be read: {first_line(error)}") from error
    width, inner, layers = (int(config[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return 2.0 * CLIP_TOKENS * layers * (4 * width**2 + 2 * width * inner)


def clip_memory(model: Any, tokens: int) -> int:
    """The hidden states of all layers, the MLP or attention of one, and the causal mask."""
    config, itemsize = model.config, model.dtype.itemsize
    layer = max(3 * config.intermediate_size + 3 * config.hidden_size, 8 * config.hidden_size)
    states = (config.num_hidden_layers + 1) * config.hidden_size
    return int(itemsize * tokens * (layer + states) + tokens**2 * (1 + itemsize))


def tiny_tokenizer(pad_token: str) -> Any:
    """Every byte, within a word and at its end, and no merges; the end's id is the largest, as in CLIP."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], pad_token=pad_token, model_max_length=CLIP_TOKENS
    )


def tiny_text_config(tokenizer: Any, **settings: Any) -> Any:
    """A CLIP text encoder of width 32."""
    from transformers import CLIPTextConfig

    plain = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": CLIP_TOKENS, "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return CLIPTextConfig(**{**plain, **settings})


# --- the U-Net and its noise --------------------------------------------------------------------------------------------


def load_unet(directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
    """UNet2DConditionModel, frozen, in training mode; on `meta` its shapes alone."""
    import torch
    from diffusers import UNet2DConditionModel

    if device.type == "meta":
        try:
            config = UNet2DConditionModel.load_config(directory / "unet")
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory / 'unet'} cannot be loaded: {first_line(error)}") from error
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config).to(dtype).requires_grad_(False)
    unet = load_component(UNet2DConditionModel, directory, "unet", dtype)
    return unet.requires_grad_(False).train().to(device)


def load_schedule(directory: Path) -> NoiseSchedule:
    """Of any scheduler of diffusers' that samples such models: with the same betas they have the same noise levels.

    sigma = sqrt(1 - alpha_bar) of each step, signal = sqrt(alpha_bar), both as `DDPMScheduler.add_noise` computes them; from
    the last step, noise, down to step 0.
    """
    import torch
    from diffusers import DDPMScheduler

    path = directory / "scheduler"
    try:
        config = DDPMScheduler.load_config(path)
        if "beta_schedule" not in config and not config.get("trained_betas"):
            raise ModelError(f"{path}: a {config.get('_class_name')} has no betas, which a diffusion model is trained with.")
        scheduler = DDPMScheduler.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded: {first_line(error)}") from error
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(f"{path}: prediction_type is {prediction!r}; epsilon and v_prediction can be trained.")
    signals = scheduler.alphas_cumprod.flip(0)
    return NoiseSchedule(
        objective="v" if prediction == "v_prediction" else "epsilon",
        sigmas=(1 - signals) ** 0.5,
        signals=signals**0.5,
        times=torch.arange(len(signals), dtype=torch.float32).flip(0),
    )


def unet_prediction(
    denoiser: Any,
    noisy_BCHW: "torch.Tensor",
    time_B: "torch.Tensor",
    embeds_BLD: Any,
    residuals: Sequence["torch.Tensor"] | None,
    added: Mapping[str, Any] | None = None,
) -> "torch.Tensor":
    """The U-Net's output in fp32; `added` is what SDXL takes beside the text."""
    control = {}
    if residuals:
        *skips, middle = residuals
        control = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
    output: torch.Tensor = denoiser(
        noisy_BCHW, time_B, encoder_hidden_states=embeds_BLD, added_cond_kwargs=added, return_dict=False, **control
    )[0]
    return output.float()


def unet_activations(
    denoiser: Any, cells: int, text_tokens: int, dtype: "torch.dtype", added: Mapping[str, Any] | None = None
) -> Activations:
    """What autograd keeps of a forward pass on the `meta` device, where nothing has values and nothing is computed.

    Levels differ in size, and between the blocks lie convolutions, so there is no formula that is shorter than the model.
    """
    import torch

    meta, side = torch.device("meta"), GEOMETRY.patch
    kept = _Kept()
    weights = {name: _on_meta(one, dtype) for name, one in (*denoiser.named_parameters(), *denoiser.named_buffers())}
    noisy_BCHW = torch.empty(1, denoiser.config.in_channels, side, cells // side, dtype=dtype, device=meta)
    embeds_BLD = torch.empty(1, text_tokens, denoiser.config.cross_attention_dim, dtype=dtype, device=meta)
    arguments = {"encoder_hidden_states": embeds_BLD, "added_cond_kwargs": added, "return_dict": False}
    with kept.counting(denoiser, weights.values()), _without_scores():
        torch.func.functional_call(denoiser, weights, (noisy_BCHW, torch.empty(1, device=meta)), arguments)
    count = len(kept.by_block)
    mean = sum(kept.by_block) // count
    # While one block is computed again it is the largest that must fit, not the mean.
    highest = max(saved + _BACKWARD_WIDTHS * read for saved, read in zip(kept.by_block, kept.inputs, strict=True))
    return Activations(
        block_saved=mean,
        block_input=sum(kept.inputs) // count,
        block_working=highest - mean,
        # Gradients of the largest tensor, of what it was made from, and their sum where a skip connection ends.
        outside=kept.outside + 3 * kept.largest_outside,
    )


@dataclass(slots=True, kw_only=True)
class _Kept:
    """Bytes that autograd saves, weights left out, each storage once: in each block, where it was not saved before, and not."""

    by_block: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outside: int = 0
    largest_outside: int = 0

    @contextmanager
    def counting(self, denoiser: Any, weights: "Iterable[torch.Tensor]") -> "Iterator[None]":
        """Count what is saved within the context."""
        import torch

        # The tensors are held on to, so that no storage is freed and its number used again.
        seen = {one.untyped_storage()._cdata: one for one in weights}
        is_within = False

        def enter(_block: Any, inputs: tuple["torch.Tensor", ...]) -> None:
            nonlocal is_within
            is_within = True
            self.by_block.append(0)
            self.inputs.append(inputs[0].nbytes)

        def leave(*_: Any) -> None:
            nonlocal is_within
            is_within = False

        def pack(tensor: "torch.Tensor") -> "torch.Tensor":
            whole = tensor.untyped_storage()
            if whole._cdata not in seen:
                seen[whole._cdata] = tensor
                if is_within:
                    self.by_block[-1] += whole.nbytes()
                else:
                    self.outside += whole.nbytes()
                    self.largest_outside = max(self.largest_outside, whole.nbytes())
            return tensor

        blocks = [module for module in denoiser.modules() if type(module).__name__ == BLOCK_CLASS]
        handles = [block.register_forward_pre_hook(enter) for block in blocks]
        handles += [block.register_forward_hook(leave) for block in blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _on_meta(tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Its shape in the working precision. PEFT gives adapters the precision of their layer, but not on the meta device."""
    import torch

    keeps = not tensor.is_floating_point() or (tensor.requires_grad and not tensor.is_meta)
    empty = torch.empty_like(tensor, device="meta", dtype=tensor.dtype if keeps else dtype)
    return empty.requires_grad_(tensor.requires_grad)


def _without_scores() -> AbstractContextManager[Any]:
    """Attention as the kernels of a GPU do it: they keep queries, keys, values, output and one fp32 number a row.

    On the meta device torch would take the one that keeps the matrix of scores.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Attention(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *heads_BHLD: torch.Tensor) -> torch.Tensor:
            output = torch.empty_like(heads_BHLD[0])
            ctx.save_for_backward(*heads_BHLD, output, torch.empty(output.shape[:-1], device=output.device))
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            raise NotImplementedError

    class Mode(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                return Attention.apply(*args[:3])
            return function(*args, **(kwargs or {}))

    return Mode()


FAMILY = StableDiffusion()
