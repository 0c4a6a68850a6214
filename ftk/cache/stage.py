"""`ftk cache`: encode what is not there yet. The text encoder first, freed, then the VAE; then the view of samples."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ftk import storage
from ftk.cache import encode, fingerprint, plan, store
from ftk.configs.load import workspace_paths
from ftk.configs.schema import RunConfig
from ftk.contracts import CachedSample, SampleRow
from ftk.errors import CacheError, DatasetError
from ftk.models import base as models
from ftk.models.base import Family
from ftk.pipeline.dataset import PreparedDataset, recipe
from ftk.progress import human_bytes, track

LOGGER = logging.getLogger("ftk")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What `ftk cache` did; `num_bytes` counts every item that the samples' encoders have stored."""

    num_samples: int
    num_latents_encoded: int
    num_latents_reused: int
    num_texts_encoded: int
    num_texts_reused: int
    num_texts_truncated: int
    num_bytes: int
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the samples need, and which of it has to be encoded."""

    family: Family
    model: Path
    dataset: PreparedDataset
    rows: list[SampleRow]
    parts: dict[str, fingerprint.Parts]
    captions: list[str]
    images: list[SampleRow]
    missing_captions: list[str]
    missing_images: list[SampleRow]
    directory: Path

    def folder(self, kind: str) -> Path:
        return self.directory / kind / fingerprint.of_parts(self.parts[kind])


def run(config: RunConfig) -> CacheReport:
    """Encode what is missing and rebuild the view; a second run encodes nothing.

    Raises:
        DatasetError: there is no prepared dataset, or it is damaged.
        ModelError: the model's VAE or text encoder cannot be loaded.
    """
    directory = workspace_paths(config)[1]
    with storage.lock(directory):
        work = _plan(config, directory, damaged="drop")
        for kind in fingerprint.KINDS:
            storage.sweep(work.folder(kind))
        storage.sweep(directory)
        _encode_texts(config, work)
        normalisation = _encode_latents(config, work)
        manifest = _commit_view(config, work, normalisation)
    opened = store.CacheStore(directory, manifest, [])
    return CacheReport(
        num_samples=manifest.num_samples,
        num_latents_encoded=len(work.missing_images),
        num_latents_reused=len(work.images) - len(work.missing_images),
        num_texts_encoded=len(work.missing_captions),
        num_texts_reused=len(work.captions) - len(work.missing_captions),
        num_texts_truncated=sum(
            opened.text_length(plan.text_id(caption)) >= work.family.max_text_tokens for caption in work.captions
        ),
        num_bytes=opened.num_bytes(),
        directory=str(directory),
    )


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Counts and bytes of what `run` would encode and reuse."""
    work = _plan(config, workspace_paths(config)[1], damaged="skip")
    latents, texts = _sizes(config, work)
    return {
        "num_samples": len(work.rows),
        "num_latents_to_encode": len(work.missing_images),
        "num_latents_reused": len(work.images) - len(work.missing_images),
        "num_texts_to_encode": len(work.missing_captions),
        "num_texts_reused": len(work.captions) - len(work.missing_captions),
        "latent_bytes": sum(latents),
        "text_bytes_estimated": sum(texts),
    }


def _plan(config: RunConfig, directory: Path, damaged: Literal["skip", "drop"]) -> _Plan:
    family = models.get(config.model.family)
    dataset = PreparedDataset.open(workspace_paths(config)[0])
    differs = fingerprint.differences(recipe(config), dataset.manifest.recipe)
    if differs:
        raise DatasetError(
            f"{dataset.directory} was prepared with other settings:\n{fingerprint.table(differs, 'data.')}\n"
            f"Run `ftk prepare RUN.yaml`: it makes anew what changed."
        )
    rows = dataset.rows()
    if not rows:
        raise CacheError(f"{dataset.directory} holds no samples. Run `ftk prepare RUN.yaml` with images that can be used.")
    unused = sum(row.has_mask or row.num_controls > 0 for row in rows)
    if unused:
        LOGGER.warning("%d samples have masks or control images: no method uses them yet, and they are not cached.", unused)
    model = models.locate(config.model, (*family.latent_components, *family.text_components))
    parts = {
        kind: fingerprint.with_libraries(kind, fingerprint.encoder_parts(kind, family, config.cache, model))
        for kind in fingerprint.KINDS
    }
    folders = {kind: directory / kind / fingerprint.of_parts(parts[kind]) for kind in fingerprint.KINDS}
    there = {kind: store.read_index(folder, damaged) for kind, folder in folders.items()}
    captions = plan.needed_captions(rows, config.sample)
    images = plan.needed_images(rows)
    return _Plan(
        family=family,
        model=model,
        dataset=dataset,
        rows=rows,
        parts=parts,
        captions=captions,
        images=images,
        missing_captions=[caption for caption in captions if plan.text_id(caption) not in there["texts"]],
        missing_images=[row for row in images if row.image_id not in there["latents"]],
        directory=directory,
    )


def _sizes(config: RunConfig, work: _Plan) -> tuple[list[int], list[int]]:
    itemsize = getattr(torch, config.cache.latents_dtype).itemsize
    latents = [plan.latent_bytes(row, work.family.geometry, itemsize) for row in work.missing_images]
    texts = [plan.text_bytes(caption, work.family.text_token_bytes) for caption in work.missing_captions]
    return latents, texts


def _encode_texts(config: RunConfig, work: _Plan) -> None:
    if not work.missing_captions:
        return
    device, dtype = models.resolve_device(config.cache.device), getattr(torch, config.cache.text_dtype)
    _log_reuse("texts", len(work.captions), len(work.missing_captions), sum(_sizes(config, work)[1]), device)
    encoder = work.family.load_text_encoder(work.model, dtype, device)
    folder = work.folder("texts")
    units = plan.cut(
        work.missing_captions,
        lambda caption: plan.text_bytes(caption, work.family.text_token_bytes),
        config.cache.shard_bytes,
        store.next_number(folder),
    )
    with track("texts", len(work.missing_captions), "text") as progress:
        for unit in units:
            items = encode.encode_texts(unit, work.family, encoder, dtype, config.cache.text_batch, progress.advance)
            store.write_shard(folder, unit.number, items)
    del encoder
    free_memory()


def _encode_latents(config: RunConfig, work: _Plan) -> dict[str, Any]:
    """Encode the missing images; returns the normalisation that the latents carry."""
    device = models.resolve_device(config.cache.device)
    manifest = store.read_manifest(work.directory)
    if not work.missing_images and manifest and manifest.latents_fingerprint == work.folder("latents").name:
        return manifest.normalisation
    vae = work.family.load_vae(work.model, getattr(torch, config.cache.vae_dtype), device)
    normalisation = work.family.normalisation(vae)
    if work.missing_images:
        _log_reuse("latents", len(work.images), len(work.missing_images), sum(_sizes(config, work)[0]), device)
        _encode_images(config, work, vae)
    del vae
    free_memory()
    return normalisation


def _encode_images(config: RunConfig, work: _Plan, vae: Any) -> None:
    folder, dtype = work.folder("latents"), getattr(torch, config.cache.latents_dtype)
    units = plan.cut(
        work.missing_images,
        lambda row: plan.latent_bytes(row, work.family.geometry, dtype.itemsize),
        config.cache.shard_bytes,
        store.next_number(folder),
    )
    with track("latents", len(work.missing_images), "image") as progress:
        for unit in units:
            items = encode.encode_latents(
                unit, work.dataset, work.family, vae, dtype, config.cache.image_batch, progress.advance
            )
            store.write_shard(folder, unit.number, items)


def _commit_view(config: RunConfig, work: _Plan, normalisation: dict[str, Any]) -> Any:
    samples = [
        CachedSample(
            key=row.key,
            latents=row.image_id,
            texts=[plan.text_id(caption) for caption in row.captions],
            bucket_width=row.bucket_width,
            bucket_height=row.bucket_height,
            repeats=row.repeats,
            role=row.role,
        )
        for row in work.rows
    ]
    prompts: Sequence[str] = [*config.sample.prompts, config.sample.negative_prompt] if config.sample.prompts else ()
    return store.commit_samples(
        work.directory,
        samples,
        {
            "family": work.family.name,
            "latents_fingerprint": work.folder("latents").name,
            "texts_fingerprint": work.folder("texts").name,
            "encoders": work.parts,
            "normalisation": normalisation,
            "prepared_fingerprint": work.dataset.manifest.fingerprint,
            "prepared_recipe": work.dataset.manifest.recipe,
            "empty_text": plan.text_id(""),
            "prompts": {prompt: plan.text_id(prompt) for prompt in prompts},
        },
    )


def _log_reuse(kind: str, total: int, missing: int, num_bytes: int, device: torch.device) -> None:
    LOGGER.info("%s: %d to encode on %s (about %s), %d reused", kind, missing, device, human_bytes(num_bytes), total - missing)


def free_memory() -> None:
    """Give back what the component that was just dropped held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
