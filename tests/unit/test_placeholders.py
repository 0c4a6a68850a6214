"""New words of a tokenizer: their tokens, and where their embeddings start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftk.errors import ConfigError
from ftk.models import base as families
from ftk.models.components import placeholders
from ftk.models.components.placeholders import Placeholder

CPU = torch.device("cpu")


def loaded(name: str, directory: Path, words: dict[str, Placeholder]) -> tuple[Any, Any]:
    """A family, and its text encoder with new words."""
    family: Any = families.get(name)
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    family.add_tokens(encoder, words)
    return family, encoder


def table(encoder: Any) -> torch.Tensor:
    weight: torch.Tensor = encoder.model.get_input_embeddings().weight
    return weight


@pytest.mark.parametrize("caption", ["describe <cat> in <dog>", "<cat>", "<dog> <cat>\nthe <cat>"])
def test_qwen_reads_a_word_that_starts_from_words_as_those(tiny_model: Path, caption: str) -> None:
    words = {"<cat>": Placeholder(vectors=2, start="the background"), "<dog>": Placeholder(start="objects")}
    family, encoder = loaded("qwen-image", tiny_model, words)
    # The words to start from have a space before them, which the beginning of a text has not.
    written = f"{' ' * caption.startswith('<')}{caption}".replace("<cat>", "the background").replace("<dog>", "objects")
    (ours,), (theirs,) = family.encode_texts(encoder, [caption]), family.encode_texts(encoder, [written])
    assert ours["embeds"].shape == theirs["embeds"].shape
    torch.testing.assert_close(ours["embeds"], theirs["embeds"], atol=1e-5, rtol=0)
    assert family.text_lengths(encoder, [caption]) == [len(ours["embeds"])]
    assert ours["input_ids"].dtype == torch.int32
    new = encoder.tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<dog>"])
    assert sorted({one for one in ours["input_ids"].tolist() if one in new}) == new if "<dog>" in caption else new[:2]


def test_the_rows_that_were_there_stay_to_the_bit(tiny_models: Callable[[str], Path]) -> None:
    for name in ("qwen-image", "stable-diffusion"):
        family = families.get(name)
        before = table(family.load_text_encoder(tiny_models(name), torch.float32, CPU))
        _, encoder = loaded(name, tiny_models(name), {"<cat>": Placeholder(vectors=2)})
        assert len(table(encoder)) == len(before) + 2
        assert torch.equal(table(encoder)[:-2], before)
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_a_table_with_spare_rows_is_not_cut(tiny_model: Path) -> None:
    family: Any = families.get("qwen-image")
    encoder = family.load_text_encoder(tiny_model, torch.float32, CPU)
    encoder.model.resize_token_embeddings(400, mean_resizing=False)
    first = len(encoder.tokenizer)
    family.add_tokens(encoder, {"<cat>": Placeholder(start="the")})
    assert len(table(encoder)) == 400
    assert torch.equal(table(encoder)[first], table(encoder)[encoder.tokenizer(" the")["input_ids"][0]])


def test_random_rows_are_as_long_as_the_mean_row_and_the_same_everywhere(tiny_models: Callable[[str], Path]) -> None:
    words = {"<cat>": Placeholder(vectors=3), "<dog>": Placeholder(vectors=2)}
    _, encoder = loaded("stable-diffusion", tiny_models("stable-diffusion"), words)
    rows = table(encoder)[-5:].clone()
    torch.testing.assert_close(rows.norm(dim=1), table(encoder)[:-5].norm(dim=1).mean().expand(5))
    assert len({tuple(row) for row in rows.tolist()}) == 5
    torch.manual_seed(5)
    _, again = loaded("stable-diffusion", tiny_models("stable-diffusion"), words)
    assert torch.equal(table(again)[-5:], rows)


def test_words_to_start_from_are_spread_over_the_vectors(tiny_models: Callable[[str], Path]) -> None:
    family: Any = families.get("stable-diffusion")
    tokenizer = family.tokenizer_with(tiny_models("stable-diffusion"), "text_encoder", {})
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    spread = {count: placeholders.start_ids(tokenizer, "<x>", Placeholder(vectors=count, start="ab")) for count in (2, 3, 4)}
    assert spread == {2: [a, b], 3: [a, a, b], 4: [a, a, b, b]}
    with pytest.raises(ConfigError, match=r"'<x>' has 1 vector and starts from ' ', .* 0 tokens. Start from a word"):
        placeholders.start_ids(tokenizer, "<x>", Placeholder(start=" "))


@pytest.mark.parametrize("name", ["stable-diffusion", "qwen-image"])
def test_each_vector_counts_among_the_tokens_that_are_cut(tiny_models: Callable[[str], Path], name: str) -> None:
    family: Any = families.get(name)
    words = {"<cat>": Placeholder(vectors=4)}
    most = family.max_text_tokens - (2 if name == "stable-diffusion" else 5)
    caption = " ".join(["<cat>"] * (most // 4 + 1))
    assert family.tokens_cut(tiny_models(name), [caption, "<cat>"], words) == [4 * (most // 4 + 1) - most, 0]


def test_more_than_nine_vectors_are_told_apart(tiny_models: Callable[[str], Path]) -> None:
    family, encoder = loaded("stable-diffusion", tiny_models("stable-diffusion"), {"<cat>": Placeholder(vectors=12)})
    ids = family.encode_texts(encoder, ["a <cat>"])[0]["input_ids"].tolist()
    first = encoder.tokenizer.convert_tokens_to_ids("<cat>")
    assert ids[2:15] == [*range(first, first + 12), encoder.tokenizer.eos_token_id]


def test_clip_pools_at_the_end_of_a_text_though_new_tokens_have_higher_numbers(tiny_models: Callable[[str], Path]) -> None:
    """Configurations before transformers 4.31, SDXL's among them, say that the end is token 2, and mean the highest."""
    family: Any = families.get("sdxl")
    pooled = []
    for end in (None, 2):
        encoder = family.load_text_encoder(tiny_models("sdxl"), torch.float32, CPU)
        if end is not None:
            encoder.models[1].text_model.eos_token_id = end
        family.add_tokens(encoder, {"<cat>": Placeholder(start="a")})
        pooled.append(family.encode_texts(encoder, ["x <cat> x"])[0]["pooled"])
    assert torch.equal(*pooled)
