"""CLIP text encoders, as Stable Diffusion has one of and SDXL two: 77 tokens at a time, padding included.

A longer text is encoded in windows of 75 tokens, each with a beginning and an end of its own, whose hidden states are then put
in a row between the first beginning and the last end. Source: sd-scripts' `max_token_length`, `_get_input_ids` in
`library/strategy_base.py` and `encode_tokens` in `library/strategy_sd.py`.

Shape legend: B batch, N windows, L text tokens (75 N + 2), D text width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError, ModelError
from ftk.models.base import AdapterNames, TargetGroup
from ftk.models.components import configuration, placeholders
from ftk.models.components.loading import load_component, outline, reading

if TYPE_CHECKING:
    import torch

TOKENS = 77
"""What a text encoder takes at a time, with the beginning and the end of a text."""
_WINDOW = 75
_BLOCK = "CLIPEncoderLayer"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TARGETS: Mapping[str, TargetGroup] = {
    "attention": TargetGroup(in_blocks={_BLOCK: _ATTENTION}),
    "attention+mlp": TargetGroup(in_blocks={_BLOCK: (*_ATTENTION, "fc1", "fc2")}),
}
"""Groups of layers, of a text encoder that is trained."""
_ROOTS = ("text_model.", "text_projection")
LORA_FACTORS = ("lora_down", "lora_up")
"""What sd-scripts and all readers of its files call a LoRA's two factors."""


def load_text_model(directory: Path, name: str, dtype: "torch.dtype", *, has_projection: bool = False) -> Any:
    """CLIPTextModel, or CLIPTextModelWithProjection; frozen, on the CPU."""
    model = load_component(_text_model_class(has_projection), directory, name, dtype).requires_grad_(False).eval()
    if not isinstance(model.config.eos_token_id, int):
        end_id = model.config.eos_token_id
        raise ModelError(f"{directory / name / 'config.json'}: `eos_token_id` is {end_id!r:.80}. It must be a token's number.")
    return model


def load_trainable(
    directory: Path, name: str, dtype: "torch.dtype", device: "torch.device", *, has_projection: bool = False
) -> Any:
    """The same on the device, in training mode; on `meta` its shapes alone."""
    if device.type != "meta":
        return load_text_model(directory, name, dtype, has_projection=has_projection).train().to(device)
    return outline(_text_model_class(has_projection), directory / name, dtype)


def _text_model_class(has_projection: bool) -> Any:
    import transformers

    return transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel


def load_tokenizer(directory: Path, name: str) -> Any:
    """CLIPTokenizer; one of another length than 77 would give texts that no model of this line was trained on."""
    from transformers import CLIPTokenizer

    with reading(directory / name, "a tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(directory / name)
    if tokenizer.model_max_length != TOKENS:
        raise ModelError(
            f"{directory / name}: its texts have {tokenizer.model_max_length} tokens instead of {TOKENS}. "
            f"This is not the CLIP tokenizer of a Stable Diffusion model."
        )
    with reading(directory / name, "a tokenizer"):
        tokenizer("a", padding="max_length", max_length=TOKENS, truncation=True)
    return tokenizer


def tokenised(tokenizer: Any, captions: Sequence[str], device: "torch.device", windows: int = 1) -> "dict[str, torch.Tensor]":
    """`input_ids` and `attention_mask`, each [B,77 N], cut and padded by the tokenizer's own rule, as the pipelines do."""
    encoding = tokenizer(
        placeholders.expanded(tokenizer, captions),
        padding="max_length",
        max_length=_WINDOW * windows + 2,
        truncation=True,
        return_tensors="pt",
    ).to(device)
    ids_BL, mask_BL = encoding["input_ids"], encoding["attention_mask"]
    if windows > 1:
        ids_BL, mask_BL = _in_windows(ids_BL), _in_windows(mask_BL)
        _end_windows(ids_BL, tokenizer)
    return {"input_ids": ids_BL.flatten(1), "attention_mask": mask_BL.flatten(1)}


def _in_windows(tokens_BL: "torch.Tensor") -> "torch.Tensor":
    """[B,N,77]: each window between the first token of all and the last."""
    import torch

    first, last = tokens_BL[:, :1], tokens_BL[:, -1:]
    windows = [torch.cat([first, window, last], dim=1) for window in tokens_BL[:, 1:-1].split(_WINDOW, dim=1)]
    return torch.stack(windows, dim=1)


def _end_windows(ids_BNL: "torch.Tensor", tokenizer: Any) -> None:
    """Where padding is not the end of a text, put an end behind a full window, and at the beginning of an empty one."""
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if padding == end:
        return
    is_full = (ids_BNL[..., -2] != end) & (ids_BNL[..., -2] != padding)
    ids_BNL[..., -1].masked_fill_(is_full, end)
    ids_BNL[..., 1].masked_fill_(ids_BNL[..., 1] == padding, end)


def windows_of(tokens_BL: "torch.Tensor") -> "torch.Tensor":
    """[B N,77] of what `tokenised` gives: what the text encoder takes."""
    return tokens_BL.reshape(-1, TOKENS)


def joined(states_WLD: "torch.Tensor", batch: int) -> "torch.Tensor":
    """[B,75 N + 2,D]: the hidden states of windows in a row; the first one's beginning and the last one's end stay."""
    import torch

    states_BNLD = states_WLD.unflatten(0, (batch, -1))
    return torch.cat([states_BNLD[:, 0, :1], states_BNLD[:, :, 1:-1].flatten(1, 2), states_BNLD[:, -1, -1:]], dim=1)


def tokens_cut(tokenizer: Any, captions: Sequence[str], windows: int = 1) -> list[int]:
    """How many tokens of each caption `tokenised` leaves out."""
    most = _WINDOW * windows + 2
    texts = placeholders.expanded(tokenizer, captions)
    return [max(0, len(ids) - most) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def hidden_state(states: "Sequence[torch.Tensor]", from_end: int, skip: int) -> "torch.Tensor":
    """[B N,77,D]: one of a text encoder's hidden states, that of its embeddings first, `skip` layers before the usual one.

    Args:
        from_end: where the usual one stands, counted from the end: 1 is the last.

    Raises:
        ConfigError: the encoder has too few layers to skip so many.
    """
    if from_end + skip > len(states):
        raise ConfigError(
            f"model.clip_skip: {skip}: a text encoder of this model has {len(states) - 1} layers, of which at most "
            f"{len(states) - from_end} can be skipped. Set it to {len(states) - from_end} or less."
        )
    return states[-(from_end + skip)]


def published_key(key: str) -> str:
    """A module or tensor as every reader knows it: transformers 5 has flattened some encoders' names."""
    return key if key.startswith(_ROOTS) else _ROOTS[0] + key


def adapter_names(form: str, component: str, encoders: Sequence[str]) -> AdapterNames:
    """`lora_te_text_model_a_b_c`, and where there are several encoders `lora_te1_` and `lora_te2_`, as sd-scripts.

    Raises:
        ConfigError: LyCORIS' format, which holds one model alone.
    """
    if form == "lycoris":
        raise ConfigError("LyCORIS' names are those of one model, and this trained text encoders too. Write kohya.")
    number = encoders.index(component) + 1 if len(encoders) > 1 else ""
    return AdapterNames(
        module=lambda name: f"lora_te{number}_{published_key(name).replace('.', '_')}",
        factors=LORA_FACTORS,
        is_read=lambda name: form != "kohya" or ".layers." in name,
    )


def flops(directory: Path) -> float:
    """Two for each weight of the layers and token, of 77 tokens."""
    path = directory / "config.json"
    config = configuration.read(path)
    width, inner, layers = (
        configuration.number(path, config, name, lambda value: value > 0, "a number above 0")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    return 2.0 * TOKENS * layers * (4 * width**2 + 2 * width * inner)


def memory(model: Any, tokens: int) -> int:
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
        vocab={word: number for number, word in enumerate(words)}, merges=[], pad_token=pad_token, model_max_length=TOKENS
    )


def tiny_text_config(tokenizer: Any, **settings: Any) -> Any:
    """A CLIP text encoder of width 32."""
    from transformers import CLIPTextConfig

    plain = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return CLIPTextConfig(**{**plain, **settings})
