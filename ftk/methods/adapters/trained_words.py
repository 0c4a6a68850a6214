"""New words whose vectors are trained: rows beside a text encoder's embedding table, or in place of its last states.

Nothing else is trained, so all other rows stay as they are, to the bit.

Shape legend: N new tokens, B batch, L text tokens, D width of the rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ftk.errors import ConfigError
from ftk.models.base import AddsTokens, HasTokenStates, Model, Texts
from ftk.models.components import placeholders
from ftk.models.components.placeholders import Placeholders

ROWS = "word_vectors"
"""The parameter, in a text encoder and in `Model.extras`."""


class TrainedEmbedding(nn.Module):  # type: ignore[misc]
    """An embedding table in which the rows of new tokens are a parameter of their own, [N,D] in fp32.

    With `keeps_norm` each row has the length that it started with, whatever the parameter's is.
    """

    def __init__(self, table: Any, first: int, start_ND: torch.Tensor, *, keeps_norm: bool) -> None:
        super().__init__()
        self.table = table
        self.first = first
        self.rows_ND = nn.Parameter(start_ND)
        norm_N1 = start_ND.norm(dim=1, keepdim=True) if keeps_norm else None
        self.register_buffer("norm_N1", norm_N1, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The table without the new rows: transformers asks it for its precision."""
        weight: torch.Tensor = self.table.weight
        return weight

    def values(self) -> torch.Tensor:
        """[N,D] fp32: the rows as they are read."""
        if self.norm_N1 is None:
            return self.rows_ND
        return self.rows_ND * (self.norm_N1 / self.rows_ND.norm(dim=1, keepdim=True))

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B,L,D] in the table's precision."""
        is_new_BL = (ids_BL >= self.first) & (ids_BL < self.first + len(self.rows_ND))
        return placeholders.overwritten(self.table(ids_BL.masked_fill(is_new_BL, 0)), ids_BL, self.first, self.values())


class TrainedStates(nn.Module):  # type: ignore[misc]
    """Rows [N,D] in fp32 that replace the last states of new tokens in collated texts."""

    def __init__(self, first: int, count: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.first = first
        self.rows_ND = nn.Parameter(torch.zeros(count, width, device=device))
        self.sums: _Sums | None = None
        """While it looks at the data, texts pass through as they are."""

    def forward(self, texts: Texts) -> dict[str, torch.Tensor | None]:
        """The same texts with `embeds` [B,L,D] overwritten where `input_ids` [B,L] are new tokens."""
        embeds_BLD, ids_BL = texts["embeds"], texts["input_ids"]
        assert embeds_BLD is not None
        assert ids_BL is not None
        if self.sums is not None:
            self.sums.add(embeds_BLD, ids_BL.long() - self.first, texts.get("mask"))
            return dict(texts)
        return {**texts, "embeds": placeholders.overwritten(embeds_BLD, ids_BL, self.first, self.rows_ND)}


class _Sums:
    """Sums of the states of each new token, and of all tokens, over batches; in fp64 on the CPU."""

    def __init__(self, count: int, width: int) -> None:
        self.by_token_ND = torch.zeros(count, width, dtype=torch.float64)
        self.count_N1 = torch.zeros(count, 1, dtype=torch.float64)
        self.total_D = torch.zeros(width, dtype=torch.float64)
        self.num_tokens = 0

    def add(self, embeds_BLD: torch.Tensor, number_BL: torch.Tensor, mask_BL: torch.Tensor | None) -> None:
        is_text_BL = torch.ones_like(number_BL, dtype=torch.bool) if mask_BL is None else mask_BL
        states_TD, number_T = embeds_BLD[is_text_BL].double().cpu(), number_BL[is_text_BL].cpu()
        self.total_D += states_TD.sum(0)
        self.num_tokens += len(states_TD)
        for number in range(len(self.by_token_ND)):
            self.by_token_ND[number] += states_TD[number_T == number].sum(0)
            self.count_N1[number] += (number_T == number).sum()

    def means(self) -> torch.Tensor:
        """[N,D] fp32: each token's mean state; that of all tokens for one that was never there."""
        mean_ND = self.by_token_ND / self.count_N1.clamp(min=1)
        return torch.where(self.count_N1 > 0, mean_ND, self.total_D / max(1, self.num_tokens)).float()


def _added(model: Model, encoder: str, words: Placeholders) -> tuple[Any, int]:
    """An encoder's tokenizer with the new words, and the number of their first token."""
    family = model.family
    assert isinstance(family, AddsTokens)
    assert model.directory is not None
    tokenizer = family.tokenizer_with(model.directory, encoder, words)
    return tokenizer, placeholders.first_id(tokenizer, words)


def attach_rows(model: Model, encoder: str, words: Placeholders, *, keeps_norm: bool) -> nn.Parameter:
    """Put trained rows beside the embedding table of a text encoder that is in memory.

    Raises:
        ConfigError: its tokenizer has a word already, or a word starts from more tokens than it has vectors.
    """
    module = model.encoders[encoder]
    tokenizer, first = _added(model, encoder, words)
    table = module.get_input_embeddings()
    start_ND = placeholders.start_rows(tokenizer, table.weight, words).to(table.weight.device)
    trained = TrainedEmbedding(table, first, start_ND, keeps_norm=keeps_norm)
    module.set_input_embeddings(trained)
    placeholders.find_end_by_number(tokenizer, module)
    return trained.rows_ND


def attach_states(model: Model, words: Placeholders) -> nn.Parameter:
    """Put trained rows in place of the last states of new tokens; they are zeros until `start_states`."""
    family = model.family
    assert isinstance(family, AddsTokens)
    (encoder,) = family.token_encoders
    _, first = _added(model, encoder, words)
    assert isinstance(family, HasTokenStates)
    count, width = len(placeholders.all_tokens(words)), family.state_width(model.denoiser)
    trained = TrainedStates(first, count, width, next(model.denoiser.parameters()).device)
    model.extras[ROWS] = trained
    return trained.rows_ND


def start_states(model: Model, predictions: Iterable[Callable[[], torch.Tensor]]) -> None:
    """Set each row to the mean of the states that the cache has in its place, over these micro-batches."""
    trained: TrainedStates = model.extras[ROWS]
    trained.sums = _Sums(*trained.rows_ND.shape)
    with torch.no_grad():
        for prediction in predictions:
            prediction()
        trained.rows_ND.copy_(trained.sums.means())
    trained.sums = None


def overwritten(model: Model, texts: Texts) -> Texts:
    """Collated texts with the trained states in them, where there are any."""
    return model.extras[ROWS](texts) if ROWS in model.extras else texts


def fold(model: Model) -> None:
    """Write the trained rows into the embedding tables of the text encoders, which get longer by them.

    Raises:
        ConfigError: a folder cannot hold the words, because the family's prompts must be taught them.
    """
    if isinstance(model.family, HasTokenStates):
        raise ConfigError(
            f"the new words of {model.family.name} cannot be merged: no pipeline reads them by itself. Use `ftk export`, and "
            f"load them with `ftk.deliver.words.load_words`."
        )
    for module in model.encoders.values():
        trained = module.get_input_embeddings()
        module.set_input_embeddings(trained.table)
        placeholders.grow(module, trained.first, trained.values().detach())
        for part in module.modules():
            # What `find_end_by_number` has changed goes into the configuration.
            module.config.eos_token_id = getattr(part, "eos_token_id", module.config.eos_token_id)


def values(model: Model) -> dict[str, torch.Tensor]:
    """[N,D] fp32 of each text encoder by name, and of the states as "" where those are what is trained."""
    rows = {name: module.get_input_embeddings().values() for name, module in model.encoders.items()}
    if ROWS in model.extras:
        rows[""] = model.extras[ROWS].rows_ND
    if not rows:
        raise ConfigError("no vectors of new words are trained in this model")
    return {name: tensor.detach().float() for name, tensor in rows.items()}
