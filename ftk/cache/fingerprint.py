"""What a cached item depends on, part by part, so that a mismatch can be shown and not only felt."""

import importlib.metadata
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import blake3

from ftk import storage
from ftk.errors import ModelError
from ftk.run import Run

Parts = dict[str, Any]
_SAMPLED, _FULL = "sampled:", "full:"
_WHOLE_BYTES = 512 << 20
_MAX_HEADER_BYTES = 100 << 20
_BLOCK_BYTES = 4096
_RELEVANT = frozenset({".safetensors", ".json", ".txt", ".model"})
_LIBRARIES = {"latents": ("torch", "diffusers"), "texts": ("torch", "transformers", "tokenizers")}


def encoder_parts(kind: str, run: Run, directory: Path | None, full: bool | None = None) -> Parts:
    """The parts of an encoder's fingerprint; `directory` is the model's, or None where its weights are not at hand.

    Args:
        full: digest all bytes of the weights instead of samples of each tensor; `cache.full_hash` when None.
    """
    family, config = run.family, run.config.cache
    parts: Parts = {"family": family.name, "encoder_version": family.encoder_version}
    if kind == "latents":
        parts |= {"dtype": config.vae_dtype, "stored": config.latents_dtype}
    else:
        parts |= {"dtype": config.text_dtype, "stored": config.stored_text_dtype, **family.text_options()}
        if run.needs.placeholder_tokens:
            parts["placeholder_tokens"] = {word: asdict(each) for word, each in run.needs.placeholder_tokens.items()}
    if directory is not None:
        components = family.latent_components if kind == "latents" else family.text_components
        full = config.full_hash if full is None else full
        parts["weights"] = {name: weights_digest(directory / name, full) for name in components}
    return parts


def is_full(parts: Parts) -> bool:
    """Whether the weights in these parts were digested whole."""
    return any(str(digest).startswith(_FULL) for digest in parts.get("weights", {}).values())


def with_libraries(kind: str, parts: Parts) -> Parts:
    """The parts with the versions of the libraries that compute: what the encoding machine adds."""
    return {**parts, "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES[kind]}}


def of_parts(parts: Parts) -> str:
    """The name of the folder that holds items with these parts."""
    return storage.digest(parts, 16)


def weights_digest(directory: Path, full: bool = False) -> str:
    """BLAKE3 of a component's files: of large safetensors files the header and samples of every tensor, of others all bytes.

    Large is more than 512 MiB: a text encoder, no VAE. The samples are the first, middle and last 4 KiB of each tensor:
    training moves them all, so a fine-tuned or merged model differs from its base. A model of the Hub has the same digest as
    its copy elsewhere, and a commit that changes no weight leaves it alone. With `full`, every byte of every file.
    """
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    for path in sorted(directory.rglob("*")):
        if path.suffix not in _RELEVANT or not path.is_file():
            continue
        hasher.update(f"{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
        if path.suffix == ".safetensors" and path.stat().st_size > _WHOLE_BYTES and not full:
            _sample(path, hasher)
        else:
            hasher.update_mmap(path)
    return f"{_FULL if full else _SAMPLED}{hasher.hexdigest()[:32]}"


def _sample(path: Path, hasher: blake3.blake3) -> None:
    with path.open("rb") as file:
        size = file.read(8)
        (header_bytes,) = struct.unpack("<Q", size) if len(size) == 8 else (0,)
        header = file.read(min(header_bytes, _MAX_HEADER_BYTES))
        hasher.update(size + header)
        try:
            entries = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            tensors = sorted((begin, end) for begin, end in entries)
            if not all(isinstance(end, int) and isinstance(begin, int) and 0 <= begin <= end for begin, end in tensors):
                raise ValueError("offsets that are none")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ModelError(f"{path} is no safetensors file: its header cannot be read. Download the model again.") from None
        for begin, end in tensors:
            for place in (begin, (begin + end - _BLOCK_BYTES) // 2, end - _BLOCK_BYTES):
                start = max(begin, place)
                file.seek(8 + header_bytes + start)
                hasher.update(file.read(min(_BLOCK_BYTES, end - start)))


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(part, expected, found) for every part of `expected` that `found` does not share."""
    rows = []
    for part, value in expected.items():
        other = found.get(part)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            rows += [(f"{part}.{name}", e, f) for name, e, f in differences(value, other)]
        elif value != other:
            rows.append((part, _short(value), _short(other)))
    return rows


def table(rows: Sequence[tuple[str, str, str]], prefix: str = "") -> str:
    """Differences as indented lines for a message."""
    return "\n".join(f"  {prefix}{part}: expected {expected}, found {found}" for part, expected, found in rows)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
