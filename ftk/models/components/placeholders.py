"""New words of a tokenizer ("placeholders", such as `<cat>`): one or several tokens each, and where their embeddings start.

A word of several vectors is the tokens `<cat> <cat>_1 <cat>_2`, which stand wherever a text says `<cat>`: the rule of
diffusers, `TextualInversionLoaderMixin` in `loaders/textual_inversion.py`.

Shape legend: N new tokens, V rows of the embedding table, D its width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import ConfigError

if TYPE_CHECKING:
    import torch

_MAX_CHARS = 64
_ROWS_FOR_NORM = 4096
_LEGACY_END = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholder:
    """A new word.

    Attributes:
        vectors: how many tokens it is.
        start: words whose embeddings the vectors start from, spread over them; None: random, as long as the mean row.
    """

    vectors: int = 1
    start: str | None = None


Placeholders = Mapping[str, Placeholder]


def tokens_of(word: str, placeholder: Placeholder) -> list[str]:
    """The tokens that stand for a word: itself, `word_1`, `word_2`."""
    return [word, *(f"{word}_{number}" for number in range(1, placeholder.vectors))]


def all_tokens(placeholders: Placeholders) -> list[str]:
    """Those of all words, in order."""
    return [token for word, placeholder in placeholders.items() for token in tokens_of(word, placeholder)]


def problem(words: Sequence[str]) -> str | None:
    """Why these cannot be new words, beside each other; None if they can."""
    for word in words:
        if not word or len(word) > _MAX_CHARS or not word.isprintable() or word.split() != [word]:
            return f"{word!r:.80} is not a new word: it must have 1 to {_MAX_CHARS} printable characters, and no spaces"
        if word != word.lower():
            return f"{word!r} has capital letters, which CLIP does not see. Write {word.lower()!r}"
        for other in words:
            if other != word and word in other:
                return f"{word!r} is part of {other!r}: no tokenizer could tell them apart everywhere. Choose other words"
    return None


def add(tokenizer: Any, placeholders: Placeholders) -> None:
    """Add the tokens of new words to a tokenizer.

    Raises:
        ConfigError: the tokenizer has the word already.
    """
    if (wrong := problem(list(placeholders))) is not None:
        raise ConfigError(f"{wrong}.")
    for word, placeholder in placeholders.items():
        _refuse_known(tokenizer, word)
        if placeholder.start is not None and any(other in placeholder.start for other in placeholders):
            raise ConfigError(f"{word!r} starts from {placeholder.start!r}, which holds a new word. Name words of the model.")
        tokenizer.add_tokens(tokens_of(word, placeholder))


def _refuse_known(tokenizer: Any, word: str) -> None:
    is_one_token = any(len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1 for text in (word, f" {word}"))
    if is_one_token or word in tokenizer.get_vocab():
        raise ConfigError(
            f"the model's tokenizer has the word {word!r} already, so it cannot become a new one. Choose another, such as "
            f"'<my-{word.strip('<>')}>', in the settings and in the captions."
        )


def expanded(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Texts in which every word of several vectors is followed by its further tokens."""
    added = tokenizer.added_tokens_encoder
    several = {word: [word] for word in added if f"{word}_1" in added}
    for word, tokens in several.items():
        while (following := f"{word}_{len(tokens)}") in added:
            tokens.append(following)
    for word, tokens in several.items():
        texts = [text.replace(word, " ".join(tokens)) for text in texts]
    return list(texts)


def joined(texts: Sequence[str], placeholders: Placeholders) -> list[str]:
    """The same for a tokenizer that keeps spaces: tokens follow each other directly, and take the space before the word.

    So a text with a new word has as many tokens as with the words that it starts from: ` cat` is one token, too.
    """
    for word, placeholder in placeholders.items():
        tokens = "".join(tokens_of(word, placeholder)).replace("\\", r"\\")
        texts = [re.sub(f" ?{re.escape(word)}", tokens, text) for text in texts]
    return list(texts)


def start_ids(tokenizer: Any, word: str, placeholder: Placeholder) -> list[int] | None:
    """The token from whose embedding each vector of a new word starts; None: from random numbers.

    Raises:
        ConfigError: the words to start from are more tokens than there are vectors, or none.
    """
    if placeholder.start is None:
        return None
    ids = tokenizer(f" {placeholder.start}", add_special_tokens=False)["input_ids"]
    count = placeholder.vectors
    if not ids or len(ids) > count:
        raise ConfigError(
            f"{word!r} has {count} {'vector' if count == 1 else 'vectors'} and starts from {placeholder.start!r}, which this "
            f"model's tokenizer reads as {len(ids)} tokens. "
            + (f"Give it {len(ids)} vectors, or start from a shorter word." if ids else "Start from a word.")
        )
    # As A1111 spreads them: two tokens over four vectors are a a b b.
    return [ids[number * len(ids) // count] for number in range(count)]


def start_rows(tokenizer: Any, table_VD: "torch.Tensor", placeholders: Placeholders) -> "torch.Tensor":
    """[N,D] fp32: where the embeddings of new words start, the same in every process and stage.

    Args:
        tokenizer: with or without the new words.

    Raises:
        ConfigError: see `start_ids`.
    """
    import torch

    if table_VD.is_meta:
        for word, placeholder in placeholders.items():
            start_ids(tokenizer, word, placeholder)
        return torch.empty(len(all_tokens(placeholders)), table_VD.shape[1], device="meta")
    rows = []
    for word, placeholder in placeholders.items():
        ids = start_ids(tokenizer, word, placeholder)
        if ids is not None:
            rows.append(table_VD[torch.tensor(ids, device=table_VD.device)].detach().float().cpu())
            continue
        draw = torch.Generator().manual_seed(int(storage.digest(word, 12), 16))
        random_ND = torch.randn(placeholder.vectors, table_VD.shape[1], generator=draw)
        rows.append(random_ND / random_ND.norm(dim=1, keepdim=True) * _mean_norm(table_VD).cpu())
    return torch.cat(rows)


def _mean_norm(table_VD: "torch.Tensor") -> "torch.Tensor":
    """The mean length of the rows, of every so manieth row of a large table."""
    return table_VD[:: max(1, len(table_VD) // _ROWS_FOR_NORM)].detach().float().norm(dim=1).mean()


def first_id(tokenizer: Any, placeholders: Placeholders) -> int:
    """The number of the first new token; the others follow it."""
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in all_tokens(placeholders)]
    assert ids == list(range(ids[0], ids[0] + len(ids))), ids
    return ids[0]


def overwritten(states_BLD: "torch.Tensor", ids_BL: "torch.Tensor", first: int, rows_ND: "torch.Tensor") -> "torch.Tensor":
    """[B,L,D] in the precision of `states_BLD`: where a token is new, its row of N stands."""
    import torch

    number_BL = ids_BL.long() - first
    is_new_BL = (number_BL >= 0) & (number_BL < len(rows_ND))
    rows_BLD = torch.nn.functional.embedding(number_BL.where(is_new_BL, 0), rows_ND.to(states_BLD.device))
    return torch.where(is_new_BL[..., None], rows_BLD.to(states_BLD.dtype), states_BLD)


def grow(model: Any, first: int, rows_ND: "torch.Tensor") -> None:
    """Write rows into a text encoder's embedding table, which gets longer where it has too few."""
    import torch

    end = first + len(rows_ND)
    if end > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(end, mean_resizing=False)
        model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[first:end] = rows_ND.to(weight)


def find_end_by_number(tokenizer: Any, model: Any) -> None:
    """Have CLIP pool at the end of a text, where its configuration has it look for the highest token: new ones are higher.

    Sources: sd-scripts, `pool_workaround`, and what transformers says of it in `CLIPTextModel`.
    """
    for module in model.modules():
        if getattr(module, "eos_token_id", None) == _LEGACY_END:
            module.eos_token_id = tokenizer.eos_token_id


def add_to_encoder(tokenizer: Any, model: Any, placeholders: Placeholders) -> None:
    """Add new words to a tokenizer and to the embedding table of its model.

    Raises:
        ConfigError: see `add` and `start_ids`.
    """
    rows_ND = start_rows(tokenizer, model.get_input_embeddings().weight, placeholders)
    add(tokenizer, placeholders)
    grow(model, first_id(tokenizer, placeholders), rows_ND)
    find_end_by_number(tokenizer, model)
