"""Captions for methods of the contract tests, with new words where a method asks for some."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ftk.methods.base import CacheNeeds
from ftk.models.base import Family

_PLAIN = ("a red cat", "two dogs on a long chair")
_RESULTS = {"stable-diffusion": ("embeds",), "sdxl": ("embeds", None, "pooled"), "qwen-image": ("embeds", "mask")}
"""What pipelines' `encode_prompt` returns, by the names of collated texts."""


def captions(needs: CacheNeeds) -> list[str]:
    """Two captions, with every new word in both of them."""
    return [" ".join([caption, *needs.placeholder_tokens]) for caption in _PLAIN]


def encoded(family: Any, directory: Path, needs: CacheNeeds) -> list[dict[str, torch.Tensor]]:
    """The same as `ftk cache` stores them."""
    encoder = family.load_text_encoder(directory, torch.float32, torch.device("cpu"))
    if needs.placeholder_tokens:
        family.add_tokens(encoder, needs.placeholder_tokens)
    return [{key: value.clone() for key, value in item.items()} for item in family.encode_texts(encoder, captions(needs))]


def encoded_by(family: Family, pipeline: Any, texts: Sequence[str]) -> dict[str, torch.Tensor | None]:
    """The same as a pipeline encodes them, collated."""
    options = {} if family.name == "qwen-image" else {"do_classifier_free_guidance": False}
    results = pipeline.encode_prompt(list(texts), device=torch.device("cpu"), num_images_per_prompt=1, **options)
    named = {name: result for name, result in zip(_RESULTS[family.name], results, strict=False) if name is not None}
    mask = named.get("mask")
    return {**named, **({"mask": None if mask is None else mask.bool()} if family.name == "qwen-image" else {})}
