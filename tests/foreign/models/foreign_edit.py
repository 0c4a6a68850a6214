"""A family that only the tests hold: FLUX.1 Kontext with other rules, on the official pipeline, with tiny random weights.

It has what no family of ftk has together: two block classes, a VAE with a shift, embedded guidance, one trainable encoder of
two, references of any size, and noise levels of its own. The protocol must carry it without a change anywhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

from ftk.errors import ConfigError
from ftk.models.base import AdapterNames, Conditions, Model, Texts, encoded
from ftk.models.components import clip
from ftk.models.components.geometry import ReferenceRule
from ftk.models.flux import FluxConfig, FluxTextEncoders
from ftk.models.flux_kontext import FluxKontext

Encoders = FluxTextEncoders


class ForeignEditConfig(FluxConfig):
    """Settings under `model:`."""

    max_text_tokens: int = Field(default=24, ge=1, le=512)


class ForeignEdit(FluxKontext):
    """Text item: `embeds` and `pooled` as FLUX.1 has them, and CLIP's `input_ids` [77]."""

    name = "foreign-edit"
    Config: ClassVar[type[BaseModel]] = ForeignEditConfig
    text_token_bytes = 64
    sigma_defaults: Mapping[str, Any] = {"sampling": "logit_normal", "logit_mean": 0.5, "shift": 3.0}
    sample_defaults: Mapping[str, Any] = {}
    native_sizes = ()
    references = ReferenceRule(multiple=16)
    trainable_encoders = ("text_encoder",)
    encoder_targets = clip.TARGETS

    def __init__(self, config: ForeignEditConfig | None = None) -> None:
        super().__init__(config or ForeignEditConfig())

    def encode_texts(
        self, encoder: FluxTextEncoders, captions: Sequence[str], references: Sequence[Sequence[torch.Tensor]] = ()
    ) -> list[dict[str, torch.Tensor]]:
        """With what CLIP reads."""
        ids = clip.tokenised(encoder.tokenizers[0], captions, encoder.models[0].device)["input_ids"].to(torch.int32)
        items = super().encode_texts(encoder, captions, references)
        return [{**item, "input_ids": row.clone()} for item, row in zip(items, ids, strict=True)]

    def predict(self, model: Model, noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Of texts as CLIP encodes them now."""
        texts = encoded(model, conditions.texts)
        return super().predict(model, noisy_BCHW, sigma_B, replace(conditions, texts=texts))

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


FAMILY = ForeignEdit()
