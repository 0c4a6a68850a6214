"""Stable Diffusion 1.x and 2.x: a U-Net of 0.86 billion parameters, one CLIP text encoder and a 4-channel VAE.

Sources: diffusers, `pipelines/stable_diffusion/pipeline_stable_diffusion.py` and
`examples/text_to_image/train_text_to_image_lora.py`; Rombach et al. 2022 (latent diffusion, arXiv 2112.10752).

Shape legend: B batch, C latent channels (4), H W latent cells, L text tokens (77, or 75 a window and 2), D text width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ModelError
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
from ftk.models.components.loading import check_pipeline, check_vocabulary, hide_progress_bars, load_pipeline
from ftk.models.components.placeholders import Placeholders
from ftk.models.components.single_file import Layout, shaped
from ftk.models.components.weights import Tensor

if TYPE_CHECKING:
    import torch

_WIDTH_OF_2 = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTextEncoder:
    """What `encode_texts` needs in memory."""

    tokenizer: Any
    model: Any


class StableDiffusion(latent_diffusion.LatentDiffusion):
    """Text to image with one CLIP encoder. Text item: `embeds` [L,D], the normed last hidden state, and `input_ids` [77].

    Padding is included. Where the encoder's configuration says so it is masked, and the item holds `attention_mask` [77].
    With `max_text_tokens` above 75 ids and mask are those of all windows, one after another.
    """

    name = "stable-diffusion"
    encoder_version = 2
    text_token_bytes = 3072
    text_components = ("text_encoder", "tokenizer")
    native_sizes = ((512, 512),)
    target_groups = unet.target_groups()
    trainable_encoders = ("text_encoder",)
    embedding_keys: Mapping[str, str] = {"text_encoder": "emb_params"}
    single_file: Mapping[str, Sequence[Layout]] = {
        **latent_diffusion.SINGLE_FILE,
        "text_encoder": (
            Layout(
                model_class="CLIPTextModel",
                anchor="embeddings.position_embedding.weight",
                prefixes=("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
            ),
            Layout(model_class="CLIPTextModel", anchor="token_embedding.weight", prefixes=("cond_stage_model.model.",)),
        ),
    }

    def check(self, directory: Path) -> None:
        """A Diffusers folder whose `model_index.json` names StableDiffusionPipeline."""
        check_pipeline(directory, self.name, "StableDiffusionPipeline")

    def single_file_config(self, tensors: Mapping[str, Tensor]) -> str:
        """That of 1.5 or 2.1, as diffusers tells them apart."""
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        if unet.is_told_sizes(tensors):
            raise ModelError("this is an SDXL checkpoint. Set model.family to sdxl.")
        config_id: str = fetch_diffusers_config(shaped(tensors))["pretrained_model_name_or_path"]
        return config_id

    def unconditional(self, directory: Path) -> str:
        """The empty text."""
        return ""

    def text_options(self) -> dict[str, Any]:
        """Which layer is read, and how texts are padded."""
        shape = {"layer": "last, normed", "padding": "max_length", "max_text_tokens": self.max_text_tokens}
        return {**shape, **self.skip_options()}

    def text_flops(self, directory: Path, tokens: int) -> float:
        """Of 77 tokens a window, whatever the text's own number."""
        return self.text_windows * clip.flops(directory / "text_encoder")

    def load_text_encoder(
        self, directory: Path, dtype: "torch.dtype", device: "torch.device", place: PutOnDevice = move
    ) -> ClipTextEncoder:
        """CLIPTextModel."""
        tokenizer = clip.load_tokenizer(directory, "tokenizer")
        model = clip.load_text_model(directory, "text_encoder", dtype)
        check_vocabulary(tokenizer, model, directory / "tokenizer")
        model = place(model, device)
        return ClipTextEncoder(tokenizer=tokenizer, model=model)

    def encode_texts(
        self, encoder: ClipTextEncoder, captions: Sequence[str], references: "Sequence[Sequence[torch.Tensor]]" = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As `StableDiffusionPipeline.encode_prompt`: padding is text to the model, unless its config says otherwise."""
        import torch

        model = encoder.model
        with torch.inference_mode():
            batch = clip.tokenised(encoder.tokenizer, captions, model.device, self.text_windows)
            read = {"input_ids": batch["input_ids"].to(torch.int32)}
            if getattr(model.config, "use_attention_mask", False):
                read["attention_mask"] = batch["attention_mask"].to(torch.int32)
            read["embeds"] = self._embeds(model, read)
        return [{name: rows[number].clone() for name, rows in read.items()} for number in range(len(captions))]

    def load_encoder(self, directory: Path, name: str, dtype: "torch.dtype", device: "torch.device") -> Any:
        """CLIPTextModel."""
        return clip.load_trainable(directory, name, dtype, device)

    def add_tokens(self, encoder: ClipTextEncoder, tokens: Placeholders) -> None:
        """To the tokenizer and the embedding table."""
        placeholders.add_to_encoder(encoder.tokenizer, encoder.model, tokens)

    def encode_tokens(self, encoders: Mapping[str, Any], texts: Texts) -> dict[str, "torch.Tensor | None"]:
        """`embeds` from `input_ids`."""
        return {**texts, "embeds": self._embeds(encoders["text_encoder"], texts)}

    def _embeds(self, model: Any, texts: Mapping[str, Any]) -> "torch.Tensor":
        """[B,L,D]: the normed last hidden state, or with `clip_skip` an earlier one, normed by the same layer."""
        ids, mask, skip = clip.windows_of(texts["input_ids"]), texts.get("attention_mask"), self.config.clip_skip
        mask = None if mask is None else clip.windows_of(mask)
        if skip is None:
            return clip.joined(model(ids, attention_mask=mask)[0], len(texts["input_ids"]))
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        normed = getattr(model, "text_model", model).final_layer_norm(clip.hidden_state(states, 1, skip))
        return clip.joined(normed, len(texts["input_ids"]))

    def text_memory(self, encoder: ClipTextEncoder, tokens: int) -> int:
        """Of the widest part of a layer."""
        return clip.memory(encoder.model, tokens)

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: "torch.dtype") -> Activations:
        """Counted in a forward pass without values."""
        return unet.activations(denoiser, image_tokens * unet.GEOMETRY.patch**2, text_tokens, dtype)

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """Epsilon or v."""
        return unet.predict(model, noisy_BCHW, sigma_B, conditions)

    def control_classes(self) -> tuple[Any, Any]:
        """ControlNetModel and StableDiffusionControlNetPipeline."""
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

        return ControlNetModel, StableDiffusionControlNetPipeline

    def control_residuals(
        self, model: Model, network: Any, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> Mapping[str, Any]:
        """Of the U-Net's encoder."""
        return unet.control_residuals(model, network, noisy_BCHW, sigma_B, conditions)

    def draw_controlled(
        self, pipeline: Any, network: Any, controls: "Sequence[torch.Tensor]", strength: float, options: Mapping[str, Any]
    ) -> Any:
        """With diffusers' StableDiffusionControlNetPipeline."""

        def controlled(networks: Any) -> Any:
            _, pipeline_class = self.control_classes()
            return control_networks.official(pipeline_class, pipeline, networks, requires_safety_checker=False)

        return unet.draw_controlled(controlled, network, controls, strength, options)

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' StableDiffusionPipeline, without its safety checker, which is no part of what is trained."""
        from diffusers import StableDiffusionPipeline

        left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = load_pipeline(StableDiffusionPipeline, directory, device, dtype=dtype, **left_out, **components)
        if self.config.clip_skip is not None:
            pipeline.encode_prompt = _with_text_model(pipeline.text_encoder)(pipeline.encode_prompt)
        if self.text_windows > 1:
            self.encode_own_texts(
                pipeline,
                lambda: ClipTextEncoder(tokenizer=pipeline.tokenizer, model=pipeline.text_encoder),
                lambda _text: True,
            )
        return pipeline

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """Embeddings of one prompt."""
        return {"prompt_embeds": texts["embeds"][None]}

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As sd-scripts write them; `ss_v2` is how A1111 knows 2.x, whose texts are 1,024 wide."""
        if configuration.read(directory / "unet" / "config.json").get("cross_attention_dim") != _WIDTH_OF_2:
            return {"modelspec.architecture": "stable-diffusion-v1", "ss_base_model_version": "sd_v1"}
        variant = "768-v" if self.load_schedule(directory).objective == "v" else "512"
        return {"modelspec.architecture": f"stable-diffusion-v2-{variant}", "ss_base_model_version": "sd_v2", "ss_v2": "True"}

    def tiny(self, directory: Path) -> None:
        """About 1.1 MB on disk: two levels, epsilon, the real schedule and 77 tokens."""
        import torch
        from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel

        hide_progress_bars()
        tokenizer = clip.tiny_tokenizer("<|endoftext|>")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            denoiser = UNet2DConditionModel(
                block_out_channels=(8, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
                norm_num_groups=4, cross_attention_dim=32, attention_head_dim=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            vae = kl_vae.tiny(0.18215)
            text_encoder = CLIPTextModel(clip.tiny_text_config(tokenizer))
        StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=denoiser,
            scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **unet.SCHEDULE),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(directory)  # fmt: skip


@contextmanager
def _with_text_model(text_encoder: Any) -> Iterator[None]:
    """diffusers 0.42 looks for CLIP's norm under `text_model` when layers are skipped; transformers 5 has flattened it.

    Not as a submodule, which would give every parameter a second name.
    """
    is_flat = text_encoder is not None and not hasattr(text_encoder, "text_model")
    if is_flat:
        text_encoder.__dict__["text_model"] = text_encoder
    try:
        yield
    finally:
        if is_flat:
            del text_encoder.__dict__["text_model"]


FAMILY = StableDiffusion()
