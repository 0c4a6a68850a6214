"""What a cached item depends on, part by part, so that a mismatch can be shown and not only felt."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blake3

from ftk import storage
from ftk.configs.schema import CacheConfig
from ftk.models.base import Family

Parts = dict[str, Any]
KINDS = ("latents", "texts")

_BLOCK_BYTES = 1 << 16
_SAMPLED_BLOCKS = 64
_HASHED_WHOLE_BYTES = _BLOCK_BYTES * _SAMPLED_BLOCKS
_RELEVANT = frozenset({".safetensors", ".json", ".txt", ".model"})
_LIBRARIES = {"latents": ("torch", "diffusers"), "texts": ("torch", "transformers", "tokenizers")}


def encoder_parts(kind: str, family: Family, config: CacheConfig, directory: Path | None) -> Parts:
    """The parts of an encoder's fingerprint; `directory` is the model's, or None where its weights are not at hand."""
    parts: Parts = {"family": family.name, "encoder_version": family.encoder_version}
    if kind == "latents":
        parts |= {"dtype": config.vae_dtype, "stored": config.latents_dtype}
    else:
        parts |= {"dtype": config.text_dtype, "stored": config.text_dtype, **family.text_options()}
    if directory is not None:
        components = family.latent_components if kind == "latents" else family.text_components
        parts["weights"] = {name: weights_digest(directory / name) for name in components}
    return parts


def with_libraries(kind: str, parts: Parts) -> Parts:
    """The parts with the versions of the libraries that compute: what the encoding machine adds."""
    return {**parts, "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES[kind]}}


def of_parts(parts: Parts) -> str:
    """The name of the folder that holds items with these parts."""
    return storage.digest(parts, 16)


def weights_digest(directory: Path) -> str:
    """Digest of a component's files: small ones whole; of large ones the size, the head and evenly spaced blocks.

    The head of a safetensors file lists every tensor's name, type, shape and place.
    """
    hasher = blake3.blake3()
    for path in sorted(directory.rglob("*")):
        if path.suffix not in _RELEVANT or not path.is_file():
            continue
        size = path.stat().st_size
        hasher.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _HASHED_WHOLE_BYTES:
                hasher.update(file.read())
                continue
            for block in range(_SAMPLED_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
                hasher.update(file.read(_BLOCK_BYTES))
    return hasher.hexdigest()[:32]


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
