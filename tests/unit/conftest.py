"""Fixtures of several unit tests: a small cache that nothing was encoded for, and trust in the times of files.

Unit tests make files and look at them at once: their times are trusted here, whatever their age.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from ftk import locations
from ftk.cache import shards, view
from ftk.contracts import CachedSample, CacheManifest

Tensors = dict[str, torch.Tensor]
Items = dict[str, dict[str, Tensors]]


@pytest.fixture(autouse=True)
def _trusted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "FRESH_SECONDS", 0.0)


@pytest.fixture(scope="session")
def cached_samples() -> Callable[[int], list[CachedSample]]:
    """So many samples of a cache: in every third a mask, in every fourth two controls, in every second two captions.

    Items are named `image0`, `mask0`, `control0`, `text0` and so on. No two numbers of a sample are equal.
    """

    def sample(n: int) -> CachedSample:
        captions = [n, n - 1] if n % 2 else [n]
        return CachedSample(
            key=f"k{n}", latents=f"image{n}", controls=["control0", f"control{n}"] if n % 4 == 3 else [],
            mask="" if n % 3 else f"mask{n}", texts=[f"text{one}" for one in captions],
            text_lengths=[one + 1 for one in captions], width=1000 + n, height=2000 + n, bucket_width=32 if n % 2 else 64,
            bucket_height=48 if n % 2 else 80, resize_width=300 + n, resize_height=400 + n, crop_x=500 + n, crop_y=600 + n,
            flipped=n % 2 == 1, repeats=n + 7, role="class" if n % 3 == 2 else "instance",
        )  # fmt: skip

    return lambda count: [sample(n) for n in range(count)]


@pytest.fixture(scope="session")
def written_cache(
    cached_samples: Callable[[int], list[CachedSample]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Items]:
    """Write a cache of `cached_samples` without encoding anything; gives its items by kind and id.

    Latents lie in `latents/aaaa`, texts in `texts/bbbb`, `per_shard` to a shard. Images have mean and std [4,h,w] in fp16,
    captions embeds [L,16] in bf16, where caption N has N + 1 tokens. `facts` replace those of the manifest.
    """
    written: dict[str, Path] = {}

    def write(directory: Path, **settings: Any) -> Items:
        # The disk takes a third of a second for one: equal caches are copies.
        name = repr(settings)
        if name not in written:
            written[name] = tmp_path_factory.mktemp("caches") / "cache"
            build(written[name], **settings)
        shutil.copytree(written[name], directory, dirs_exist_ok=True)
        return items_of(**settings)

    def build(
        directory: Path, num_samples: int = 8, per_shard: int = 4, samples: Sequence[CachedSample] | None = None, **facts: Any
    ) -> None:
        samples = cached_samples(num_samples) if samples is None else samples
        items = _items(samples)
        receipts = {}
        for kind, fingerprint in (("latents", "aaaa"), ("texts", "bbbb")):
            listed = list(items[kind].items())
            groups = [listed[start : start + per_shard] for start in range(0, len(listed), per_shard)]
            receipts[kind, fingerprint] = [shards.write(directory / kind / fingerprint, group) for group in groups]
        tables = view.merged(receipts)
        tables["samples"] = pa.Table.from_pylist([asdict(one) for one in samples], schema=view.SAMPLE_SCHEMA)
        manifest = {
            "family": "qwen-image", "latents_fingerprint": "aaaa", "texts_fingerprint": "bbbb",
            "encoders": {"latents": {"dtype": "float32"}, "texts": {"dtype": "bfloat16"}},
            "normalisation": {"latents_mean": [0.0], "latents_std": [1.0]}, "prepared_fingerprint": "abc",
            "prepared_recipe": {}, "empty_text": "empty", "prompts": {"a red fox": "prompt0", "": "empty"}, **facts,
        }  # fmt: skip
        view.commit(directory, tables, manifest)

    def items_of(num_samples: int = 8, samples: Sequence[CachedSample] | None = None, **_: Any) -> Items:
        return _items(cached_samples(num_samples) if samples is None else samples)

    return write


@pytest.fixture(scope="session")
def resealed() -> Callable[..., CacheManifest]:
    """Commit a view of all whole shards of a `written_cache` for other samples; `facts` replace those of the manifest."""

    def seal(directory: Path, samples: Sequence[CachedSample], **facts: Any) -> CacheManifest:
        manifest = view.read_manifest(directory)
        assert manifest is not None
        given = {"schema_version", "num_samples", "tables", "digest"}
        kept = {entry.name: getattr(manifest, entry.name) for entry in fields(manifest) if entry.name not in given} | facts
        folders = [("latents", kept["latents_fingerprint"]), ("texts", kept["texts_fingerprint"])]
        tables = view.merged({folder: shards.receipts(directory.joinpath(*folder), {})[0] for folder in folders})
        tables["samples"] = pa.Table.from_pylist([asdict(one) for one in samples], schema=view.SAMPLE_SCHEMA)
        return view.commit(directory, tables, kept)

    return seal


def _items(samples: Sequence[CachedSample]) -> Items:
    return {"latents": _pictures(samples), "texts": _texts(samples)}


def _pictures(samples: Sequence[CachedSample]) -> dict[str, Tensors]:
    items: dict[str, Tensors] = {}
    for n, sample in enumerate(samples):
        height, width = sample.bucket_height // 8, sample.bucket_width // 8
        for number, name in enumerate([sample.latents, *sample.controls]):
            pair = _noise(n + 100 * number, 2, 4, height, width).half()
            items.setdefault(name, {"mean": pair[0].clone(), "std": pair[1].abs()})
        if sample.mask:
            items[sample.mask] = {"mask": _noise(n + 500, height, width).abs().clamp(max=1).half()}
    return items


def _texts(samples: Sequence[CachedSample]) -> dict[str, Tensors]:
    lengths = {text: length for sample in samples for text, length in zip(sample.texts, sample.text_lengths, strict=True)}
    lengths |= {"empty": 1, "prompt0": 3}
    return {name: {"embeds": _noise(1000 + n, length, 16).bfloat16()} for n, (name, length) in enumerate(lengths.items())}


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
