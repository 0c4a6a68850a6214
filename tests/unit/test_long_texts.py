"""Texts of more than 75 tokens in CLIP families, compared with what sd-scripts documents of its `max_token_length`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftk.configs.schema import ModelConfig
from ftk.errors import ConfigError
from ftk.models import base as models
from ftk.models.base import load_model

CPU = torch.device("cpu")
FAMILIES = ["stable-diffusion", "sdxl"]
# The tiny tokenizers make one token of a letter: 3, 75, 76, 150 and 400 of them.
CAPTIONS = ["fox", "f" * 75, "ab" * 38, "abc" * 50, "abcd" * 100, ""]


def family_of(name: str, **settings: Any) -> Any:
    return models.parse(ModelConfig.model_validate({"family": name, "path": "unused", **settings}))


def windows(tokenizer: Any, caption: str, count: int) -> list[list[int]]:
    """The ids of each window: 75 tokens of the caption between a beginning and an end, and padding behind the last end.

    A tokenizer that pads with the end of a text goes on with ends. Another one closes an empty window at once.
    """
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    content = tokenizer(caption, add_special_tokens=False)["input_ids"][: 75 * count]
    rows = []
    for number in range(count):
        part = content[75 * number : 75 * (number + 1)]
        rows.append([start, *part, end, *[pad] * (75 - len(part))])
    return rows


@torch.no_grad()
def expected(family: Any, encoder: Any, caption: str, count: int) -> dict[str, torch.Tensor]:
    """The hidden states of the windows in a row, without the ends between them; pooled of the first window."""
    tokenizers = getattr(encoder, "tokenizers", None) or (encoder.tokenizer,)
    text_encoders = getattr(encoder, "models", None) or (encoder.model,)
    rows, pooled = [], None
    for tokenizer, model in zip(tokenizers, text_encoders, strict=True):
        outputs = [model(torch.tensor([ids]), output_hidden_states=True) for ids in windows(tokenizer, caption, count)]
        if family.name == "sdxl":
            states = [output.hidden_states[-2][0] for output in outputs]
            pooled = outputs[0].text_embeds[0] if hasattr(outputs[0], "text_embeds") else None
        else:
            states = [output[0][0] for output in outputs]
        rows.append(torch.cat([states[0][:1], *(each[1:76] for each in states), states[-1][76:]]))
    item = {"embeds": torch.cat(rows, dim=-1)}
    return item if pooled is None else {**item, "pooled": pooled}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [150, 225])
def test_long_texts_are_encoded_in_windows_as_sd_scripts_does(
    tiny_models: Callable[[str], Path], name: str, tokens: int
) -> None:
    family = family_of(name, max_text_tokens=tokens)
    encoder = family.load_text_encoder(tiny_models(name), torch.float32, CPU)
    items = family.encode_texts(encoder, CAPTIONS)
    for caption, item in zip(CAPTIONS, items, strict=True):
        reference = expected(family, encoder, caption, tokens // 75)
        assert len(item["embeds"]) == tokens + 2 == family.max_text_tokens
        assert len(item["input_ids"]) == 77 * tokens // 75
        for key, tensor in reference.items():
            torch.testing.assert_close(item[key], tensor, rtol=1e-5, atol=1e-6)
    assert family.text_lengths(encoder, CAPTIONS) == [tokens + 2] * len(CAPTIONS)
    assert family.tokens_cut(tiny_models(name), CAPTIONS) == [max(0, len(caption) - tokens) for caption in CAPTIONS]


@pytest.mark.parametrize("name", FAMILIES)
def test_75_tokens_are_what_the_pipeline_encodes(tiny_models: Callable[[str], Path], name: str) -> None:
    plain, family = models.get(name), family_of(name, max_text_tokens=75)
    assert family.max_text_tokens == 77
    encoder = plain.load_text_encoder(tiny_models(name), torch.float32, CPU)
    for before, after in zip(plain.encode_texts(encoder, CAPTIONS), family.encode_texts(encoder, CAPTIONS), strict=True):
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_text_encoders_encode_long_texts_from_their_ids(tiny_models: Callable[[str], Path], name: str) -> None:
    family = family_of(name, max_text_tokens=225)
    encoder = family.load_text_encoder(tiny_models(name), torch.float32, CPU)
    cached = family.collate_texts(family.encode_texts(encoder, CAPTIONS[:4]))
    model = load_model(family, tiny_models(name), family.trainable_encoders, torch.float32, CPU)
    with torch.no_grad():
        from_ids = models.encoded(model, {key: tensor.clone() for key, tensor in cached.items()})
    for key in cached:
        torch.testing.assert_close(from_ids[key], cached[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_draws_long_prompts_as_the_cache_has_them(tiny_models: Callable[[str], Path], name: str) -> None:
    family = family_of(name, max_text_tokens=150)
    pipeline = family.pipeline(tiny_models(name), torch.float32, CPU)
    prompt, negative = CAPTIONS[3], CAPTIONS[2]
    encoder = family.load_text_encoder(tiny_models(name), torch.float32, CPU)
    texts = [family.pipeline_texts(item) for item in family.encode_texts(encoder, [prompt, negative])]
    cached = {**texts[0], **{f"negative_{key}": tensor for key, tensor in texts[1].items()}}

    def draw(**arguments: Any) -> Any:
        return pipeline(
            **arguments, width=64, height=64, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0), **family.generation(4.0),
        ).images  # fmt: skip

    from_cache = draw(**cached)
    assert (draw(prompt=prompt, negative_prompt=negative) == from_cache).all()
    assert draw(prompt=[prompt, "a"], negative_prompt=negative).shape == (2, *from_cache.shape[1:])
    assert (draw(prompt=prompt[:75], negative_prompt=negative) != from_cache).any()
    assert draw(prompt=prompt).shape == from_cache.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_other_lengths_are_refused_and_another_length_is_another_text(name: str) -> None:
    with pytest.raises(ConfigError, match=r"`model\.max_text_tokens`: Input should be 75, 150 or 225"):
        family_of(name, max_text_tokens=77)
    options = {tokens: family_of(name, max_text_tokens=tokens).text_options() for tokens in (75, 150, 225)}
    assert options[75] == models.get(name).text_options()
    assert options[75] != options[150] != options[225]
