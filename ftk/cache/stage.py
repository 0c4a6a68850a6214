"""`ftk cache`: encode what is not there yet. The text encoder first, freed, then the VAE; then the view that readers open."""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ftk import devices, locations, storage
from ftk.cache import encode, fingerprint, plan, prompts, shards, view
from ftk.cache.encode import Done, EncodeJob
from ftk.cache.prompts import Prompts
from ftk.cache.shards import KINDS, Damage, Receipt
from ftk.configs.load import default_workers
from ftk.configs.schema import PreservationConfig
from ftk.contracts import CacheManifest
from ftk.errors import CacheError, ConfigError, DatasetError, did_you_mean
from ftk.models import base as models
from ftk.models.base import SharesTexts
from ftk.pipeline.dataset import PreparedDataset, recipes, without_places
from ftk.pipeline.engine import WHOLE, JobPart, map_units
from ftk.progress import ProgressBar, human_bytes, plain_text, track
from ftk.run import Run

LOGGER = logging.getLogger("ftk")

_NOUNS = {"latents": "image", "texts": "text"}
_LISTED = 5
_SHOWN_CHARS = 80
_TOKENISED_AT_ONCE = 10_000
# For the estimate: encoders reach about half the speed of plain matrix products, and each item has a cost of its own.
_EFFICIENCY = 0.5
_SECONDS_AN_ITEM = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What `ftk cache` did; `num_bytes` counts every item that the samples' encoders have stored.

    Images are pictures of samples, control images and masks. `num_shards_missing` is of a part of a job array that ended
    before the others: the last one seals the cache. Memory is that of the device; on a CPU the process's.
    """

    num_samples: int
    num_latents_encoded: int
    num_latents_reused: int
    num_texts_encoded: int
    num_texts_reused: int
    num_texts_truncated: int
    num_shards_missing: int
    images_per_second: float
    texts_per_second: float
    peak_memory_bytes: int
    num_bytes: int
    directory: str


@dataclass(slots=True, kw_only=True)
class _Kind:
    """The work on latents or on texts: what is there, what is damaged, and the units that lack something.

    `units` is emptied once they are encoded, so that captions and places of pictures leave memory; `unit_ids` are their items.
    """

    kind: str
    parts: fingerprint.Parts
    folder: Path
    found: list[Receipt]
    damages: list[Damage]
    differences: list[tuple[str, str, str]]
    is_sealed: bool
    num_needed: int = 0
    num_missing: int = 0
    missing_bytes: int = 0
    units: list[plan.Unit[Any]] = field(default_factory=list)
    unit_ids: list[list[str]] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Items a second; loading counts only where it happens in other processes."""
        return sum(done.num_items for done in self.done) / self.seconds if self.seconds else 0.0

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    def reasons(self) -> list[str]:
        """Why what is encoded now was not there."""
        lines = [f"damaged: {damage}" for damage in self.damages]
        if self.differences:
            lines.append(f"the {self.kind} that are there were made by another encoder:")
            lines += [f"  {part}: expected {expected}, found {found}" for part, expected, found in self.differences]
        elif self.num_missing and not lines:
            unfinished = "the rest of a cache that is not finished" if self.found else "nothing is there yet"
            lines.append("new or edited since the cache was made" if self.is_sealed else unfinished)
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """All of it."""

    run: Run
    model: Path
    directory: Path
    dataset: PreparedDataset
    prompts: Prompts
    kinds: dict[str, _Kind]

    @property
    def texts_see_references(self) -> bool:
        """Whether a text depends on the references beside it: the family's rule, where the dataset has any."""
        rule = self.run.family.references
        return rule is not None and rule.in_texts and self.dataset.has_references

    @property
    def texts_are_split(self) -> bool:
        """Whether what texts of the same references begin with is stored once."""
        return self.texts_see_references and isinstance(self.run.family, SharesTexts)

    @property
    def dropped_text(self) -> str | None:
        """What a sample trains on without its caption."""
        return self.run.dropped_text(self.model)

    def needed_texts(self) -> Iterator[plan.TextItem]:
        """Every text, in the order in which shards are cut."""
        prompts, dropped = self.prompts.items, self.dropped_text
        if self.texts_see_references:
            tables = self.dataset.tables(plan.SAMPLE_COLUMNS)
            texts = plan.needed_texts_of_edits(tables, prompts, dropped, is_split=self.texts_are_split)
        else:
            # Read when they are asked for: a column of all captions would stay in memory beside the texts until the end.
            texts = plan.needed_texts(_captions(self.dataset.tables(["captions"])), prompts, dropped)
        if self.preservation is None:
            return texts
        # At the end: what others share keeps its place in the shards.
        return plan.each_once(itertools.chain(texts, self._preserved_texts(self.preservation)))

    def _preserved_texts(self, settings: PreservationConfig) -> Iterator[plan.TextItem]:
        if self.texts_see_references:
            tables = self.dataset.tables(plan.SAMPLE_COLUMNS)
            return plan.preserved_texts_of_edits(tables, settings, is_split=self.texts_are_split)
        return plan.preserved_texts(_captions(self.dataset.tables(["captions"])), settings)

    @property
    def preservation(self) -> PreservationConfig | None:
        """`train.loss.preservation`."""
        return self.run.config.train.loss.preservation


def run(run: Run, part: JobPart = WHOLE) -> CacheReport:
    """Encode what is missing and rebuild the view; a second run encodes nothing.

    Raises:
        DatasetError: there is no prepared dataset, it is damaged, or was made with other settings.
        ModelError: the model's VAE or text encoder cannot be loaded.
        EnvironmentFault: disk, memory, network, or another writer.
    """
    directory = locations.local_path(run.paths.cache)
    PreparedDataset.open(run.paths.prepared)
    with storage.lock(directory, part.label):
        work = _plan(run, directory)
        if part == WHOLE:
            _sweep(work)
        _drop_damaged(work)
        for kind in ("texts", "latents"):
            _announce(work, work.kinds[kind])
            _encode(work, work.kinds[kind], part)
        num_left = _look_again(work, part)
        if num_left:
            return _report_of_part(work, num_left)
        tables = _seal(work)
    return _report(work, tables)


def dry_run(run: Run, part: JobPart = WHOLE) -> dict[str, Any]:
    """Counts, bytes and time of what `run` would encode, what it would reuse, and why not the rest; writes nothing."""
    work = _plan(run, locations.local_path(run.paths.cache))
    latents, texts = work.kinds["latents"], work.kinds["texts"]
    return {
        "num_samples": work.dataset.manifest.num_samples,
        "num_latents_to_encode": latents.num_missing,
        "num_latents_reused": latents.num_needed - latents.num_missing,
        "num_texts_to_encode": texts.num_missing,
        "num_texts_reused": texts.num_needed - texts.num_missing,
        "latent_bytes": latents.missing_bytes,
        "estimated_text_bytes": texts.missing_bytes,
        "estimated_latents_seconds": _seconds(work, latents),
        "estimated_texts_seconds": _seconds(work, texts),
        "num_shards_to_write": sum(part.has(unit.number) for kind in work.kinds.values() for unit in kind.units),
        "why_latents": latents.reasons(),
        "why_texts": texts.reasons(),
        "device": str(devices.resolve_device(run.config.cache.device)),
    }


def _plan(run: Run, directory: Path) -> _Work:
    config, family = run.config, run.family
    dataset = PreparedDataset.open(run.paths.prepared)
    differs = fingerprint.differences(*recipes(config, dataset.manifest.recipe))
    if differs:
        raise DatasetError(
            f"{dataset.directory} was prepared with other settings:\n{fingerprint.table(differs, 'data.')}\n"
            f"Run `ftk prepare RUN.yaml`: it makes anew what changed."
        )
    if not dataset.manifest.num_samples:
        raise CacheError(f"{dataset.directory} holds no samples. Run `ftk prepare RUN.yaml` with images that can be used.")
    model = run.locate((*family.latent_components, *family.text_components))
    tables = list(dataset.tables([*plan.SAMPLE_COLUMNS, "role"]))
    _check_needs(run, tables)
    _check_tokens(run, model, _captions(tables))
    _check_preservation(run, _captions(tables))
    previous = _previous(directory)
    kinds = {kind: _look(run, model, directory, kind, previous) for kind in KINDS}
    work = _Work(
        run=run,
        model=model,
        directory=directory,
        dataset=dataset,
        prompts=prompts.of(run, model),
        kinds=kinds,
    )
    itemsize = getattr(torch, config.cache.latents_dtype).itemsize
    pictures = plan.needed_pictures(tables, run.needs, work.prompts.images)
    _cut(work, "latents", pictures, lambda item: plan.picture_bytes(item, family.geometry, itemsize))
    _cut(work, "texts", work.needed_texts(), lambda item: plan.text_bytes(item, family.text_token_bytes))
    return work


def _captions(tables: Iterable[pa.Table]) -> pa.ChunkedArray:
    chunks = [chunk for table in tables for chunk in table["captions"].chunks]
    return pa.chunked_array(chunks, pa.list_(pa.string()))


def _check_needs(run: Run, tables: Sequence[pa.Table]) -> None:
    """Refuse a dataset that lacks what the method needs.

    Raises:
        CacheError: it has no class images.
    """
    if run.needs.class_images and not any(pc.any(pc.equal(table["role"], "class")).as_py() for table in tables):
        raise CacheError(
            f"method {run.method.name} needs class images, and {run.paths.prepared} has none. Add a source with `role: class` "
            f"to data.sources, and run `ftk prepare RUN.yaml`."
        )


def _check_tokens(run: Run, model: Path, captions: pa.ChunkedArray) -> None:
    """Refuse new words that the tokenizers cannot be given, or that nothing teaches.

    Raises:
        ConfigError: so, or `cache.offload` asks for an embedding table that is not in one piece.
        CacheError: a word stands in no caption.
    """
    tokens = run.needs.placeholder_tokens
    models.check_tokens(run.family, model, tokens)
    if tokens and run.config.cache.offload == "layers":
        raise ConfigError(
            f"cache.offload: layers does not go with new words ({next(iter(tokens))!r}), which need the whole text encoder in "
            f"memory. Leave it out."
        )
    flat = pc.list_flatten(captions)
    for word in tokens:
        if not pc.any(pc.match_substring(flat, word)).as_py():
            raise CacheError(
                f"the new word {word!r} stands in no caption of {run.paths.prepared}, so nothing would be learned of it. "
                f"Write it into the captions, for example with `trigger: {word}` or a template, and run `ftk prepare RUN.yaml`."
            )


def _check_preservation(run: Run, captions: pa.ChunkedArray) -> None:
    """Refuse words that no caption has, and tell how many lack them.

    Raises:
        CacheError: no caption has any of the words of `train.loss.preservation.replace`.
    """
    settings = run.config.train.loss.preservation
    if settings is None or not settings.replace:
        return
    distinct: list[str] = pc.unique(pc.list_flatten(captions)).to_pylist()
    without = [caption for caption in distinct if settings.text(caption) is None]
    listed = ", ".join(map(repr, settings.replace))
    if len(without) == len(distinct):
        word = next(iter(settings.replace))
        near = did_you_mean(word, {part for caption in distinct[:_TOKENISED_AT_ONCE] for part in caption.split()})
        raise CacheError(
            f"train.loss.preservation.replace: none of the {len(distinct):,} captions has {listed}, such as "
            f"{_beginning(distinct[0])!r}.{near}"
        )
    if without:
        LOGGER.warning(
            "train.loss.preservation.replace: %d of %d captions have none of %s, and nothing is preserved for them, such as %r",
            len(without), len(distinct), listed, _beginning(without[0]),
        )  # fmt: skip


def _previous(directory: Path) -> CacheManifest | None:
    """The manifest that is there; a damaged one is said and made anew, one of a newer ftk is left alone."""
    try:
        return view.read_manifest(directory)
    except view.NewerCacheError:
        raise
    except CacheError as error:
        LOGGER.warning("%s", error)
        return None


def _look(run: Run, model: Path, directory: Path, kind: str, previous: CacheManifest | None) -> _Kind:
    parts = fingerprint.with_libraries(kind, fingerprint.encoder_parts(kind, run, model))
    folder = directory / kind / fingerprint.of_parts(parts)
    known = view.receipt_digests(directory, previous) if previous else {}
    found, damages = shards.receipts(folder, known)
    differences = fingerprint.differences(parts, previous.encoders[kind]) if previous else []
    return _Kind(
        kind=kind,
        parts=parts,
        folder=folder,
        found=found,
        damages=damages,
        differences=differences,
        is_sealed=previous is not None,
    )


def _cut(work: _Work, kind: str, needed: Iterable[Any], size: Callable[[Any], int]) -> None:
    """Find the units that lack something, and count."""
    one = work.kinds[kind]

    def counted() -> Iterator[Any]:
        for item in needed:
            one.num_needed += 1
            yield item

    there = {item for receipt in one.found for item in receipt.items["id"].to_pylist()}
    one.units = list(plan.units(counted(), size, work.run.config.cache.shard_bytes, there))
    one.unit_ids = [[item.id for item in unit.items] for unit in one.units]
    one.num_missing = sum(map(len, one.unit_ids))
    one.missing_bytes = sum(size(item) for unit in one.units for item in unit.items)


def _sweep(work: _Work) -> None:
    """Remove what killed runs left behind."""
    for folder in (work.directory, work.directory / "view", *(kind.folder for kind in work.kinds.values())):
        storage.sweep(folder)


def _drop_damaged(work: _Work) -> None:
    """Remove the receipts of damaged shards, so that these count no more and are encoded again."""
    for kind in work.kinds.values():
        for damage in kind.damages:
            shards.drop(kind.folder, Path(damage.shard).name)


def _announce(work: _Work, kind: _Kind) -> None:
    num_reused = kind.num_needed - kind.num_missing
    cost = ""
    if kind.num_missing:
        clock = time.strftime("%H:%M:%S", time.gmtime(_seconds(work, kind)))
        cost = f" (about {human_bytes(kind.missing_bytes)} in {len(kind.units)} shards, {clock} a device)"
    LOGGER.info("%s: %d to encode%s, %d reused", kind.kind, kind.num_missing, cost, num_reused)
    reasons = kind.reasons() if num_reused or kind.differences or kind.damages else []
    for line in reasons[:_LISTED]:
        LOGGER.info("  %s", line)
    if len(reasons) > _LISTED:
        LOGGER.info("  and %d more", len(reasons) - _LISTED)


def _seconds(work: _Work, kind: _Kind) -> float:
    """About how long one device takes for what is missing: its speed now, and the work as the family counts it."""
    if not kind.num_missing:
        return 0.0
    family, config = work.run.family, work.run.config.cache
    sizes: Counter[tuple[int, ...]] = Counter()
    for unit in kind.units:
        for item in unit.items:
            tokens = plan.text_bytes(item, 1) if isinstance(item, plan.TextItem) else 0
            sizes[(tokens,) if tokens else (item.height, item.width)] += 1
    flops = sum(
        count * (family.image_flops(work.model, *size) if len(size) == 2 else family.text_flops(work.model, *size))
        for size, count in sizes.items()
    )
    dtype = getattr(torch, config.loaded_vae_dtype if kind.kind == "latents" else config.text_dtype)
    speed = encode.speed(encode.encoding_device(config.device), dtype)
    return flops / (_EFFICIENCY * speed) + _SECONDS_AN_ITEM * kind.num_missing


def _encode(work: _Work, kind: _Kind, part: JobPart) -> None:
    """Encode and commit the part's units that lack something."""
    mine = [unit for unit in kind.units if part.has(unit.number)]
    kind.units = []
    if not mine:
        return
    config = work.run.config.cache
    processes = _processes(config.processes, config.device)
    job = EncodeJob(
        kind=kind.kind,
        base=work.run.config.model,
        placeholder_tokens=work.run.needs.placeholder_tokens,
        model=work.model.resolve(),
        folder=kind.folder.resolve(),
        prepared=work.dataset.directory.resolve(),
        config=config,
        workers=max(1, default_workers(work.run.config.data.workers) // processes),
    )
    if config.engine == "local" and processes == 1:
        encode.load(job)
    began = time.monotonic()
    with track(kind.kind, sum(len(unit.items) for unit in mine), _NOUNS[kind.kind]) as progress:
        kind.done += list(_done(job, mine, processes, progress))
    kind.seconds = time.monotonic() - began
    encode.release()


def _done(job: EncodeJob, units: Sequence[plan.Unit[Any]], processes: int, progress: ProgressBar) -> Iterator[Done]:
    if job.config.engine == "local" and processes == 1:
        yield from encode.encode_units(job, units, progress.advance)
        return
    encode_one = partial(encode.encode_unit, job)
    gpu = job.config.device in ("auto", "cuda")
    for done in map_units(job.config.engine, encode_one, units, workers=job.workers, processes=processes, gpu=gpu):
        progress.advance(done.num_items, human_bytes(done.peak_memory_bytes))
        yield done


def _processes(configured: int, device: str) -> int:
    """`cache.processes`, where 0 means one a GPU."""
    if configured:
        return configured
    return torch.cuda.device_count() if devices.resolve_device(device).type == "cuda" else 1


def _look_again(work: _Work, part: JobPart) -> int:
    """Read the receipts once more, those of other parts too; returns how many units still lack something."""
    num_left = 0
    for kind in work.kinds.values():
        if part != WHOLE or kind.done:
            kind.found, kind.damages = shards.receipts(kind.folder, {})
        there = {item for receipt in kind.found for item in receipt.items["id"].to_pylist()} if kind.unit_ids else set()
        num_left += sum(not there.issuperset(ids) for ids in kind.unit_ids)
    return num_left


def _seal(work: _Work) -> dict[str, pa.Table]:
    """Commit the view of everything that is there, for these samples."""
    tables = view.merged({(name, kind.fingerprint): kind.found for name, kind in work.kinds.items()})
    tables["samples"] = _samples(work, tables["texts"])
    latents, texts = work.kinds["latents"], work.kinds["texts"]
    facts = {
        "family": work.run.family.name,
        "latents_fingerprint": latents.fingerprint,
        "texts_fingerprint": texts.fingerprint,
        "encoders": {name: kind.parts for name, kind in work.kinds.items()},
        "normalisation": work.run.family.normalisation(work.model),
        "prepared_fingerprint": work.dataset.manifest.fingerprint,
        "prepared_recipe": without_places(work.dataset.manifest.recipe, work.run.config),
        "empty_text": plan.text_id(work.dropped_text),
        "prompts": {key: item.id for key, item in work.prompts.texts.items()},
        "prompt_images": _prompt_images(work.prompts),
        "shared_texts": {key: item.id for key, item in work.prompts.shared.items()},
        "preservation": work.preservation.texts if work.preservation else {},
    }
    view.commit(work.directory, tables, facts)
    return tables


def _prompt_images(prompts: Prompts) -> dict[str, dict[str, list[str]]]:
    """The items of the prompts' images, by what the cache lists a prompt under."""
    images: dict[str, dict[str, list[str]]] = {}
    for part, by_key in (("references", prompts.references), ("controls", prompts.controls)):
        for key, items in by_key.items():
            images.setdefault(key, {})[part] = [item.id for item in items]
    return images


def _samples(work: _Work, texts: pa.Table) -> pa.Table:
    """The samples' table, from the prepared dataset's columns."""
    prepared = work.dataset.tables([*plan.SAMPLE_COLUMNS, *view.SAMPLE_SCHEMA.names])
    table = pa.concat_tables([_with_text_ids(work, table) for table in prepared])
    per_caption = table["captions"].combine_chunks().flatten()
    distinct = per_caption.dictionary_encode()
    rows = pc.index_in(distinct.dictionary, value_set=texts["id"].combine_chunks())
    lengths = texts["length"].combine_chunks().take(rows).take(distinct.indices)
    num_captions = pc.list_value_length(table["captions"]).to_numpy()
    shared = _shared_texts(work, table)
    if work.texts_are_split:
        counts = texts["length"].combine_chunks().take(pc.index_in(shared, value_set=texts["id"].combine_chunks()))
        per_sample = pa.array(pc.fill_null(counts, 0).to_numpy().repeat(num_captions), lengths.type)
        lengths = pc.add(lengths, per_sample)
    offsets = pa.array(np.concatenate([[0], np.cumsum(num_captions)]), pa.int32())
    columns = {
        "latents": table["image_id"],
        "controls": plan.control_ids(table["control_ids"], work.run.needs),
        "mask": table["mask_id"],
        "texts": pa.ListArray.from_arrays(offsets, per_caption),
        "text_lengths": pa.ListArray.from_arrays(offsets, lengths),
    }
    schema = view.sample_schema(
        table["repeats"].type, has_references=work.dataset.has_references, has_preserved=work.preservation is not None
    )
    if work.dataset.has_references:
        columns |= {"references": table["reference_ids"], "empty_text": _empty_texts(work, table)}
        columns["shared_text"] = shared
    return pa.table([columns.get(entry.name, table[entry.name] if entry.name not in columns else None) for entry in schema],
                    schema=schema)  # fmt: skip


def _with_text_ids(work: _Work, table: pa.Table) -> pa.Table:
    """The table of a prepared shard, where each caption is replaced by the id of its item."""
    captions = table["captions"].to_pylist()
    references = plan.seen_ids(table) if work.texts_see_references else itertools.repeat([])
    ids = [[plan.text_id(caption, beside) for caption in own] for own, beside in zip(captions, references, strict=False)]
    if work.preservation is not None:
        table = _with_preserved_ids(table, work.preservation, references)
    return table.set_column(table.column_names.index("captions"), "captions", pa.array(ids, pa.list_(pa.string())))


def _with_preserved_ids(table: pa.Table, settings: PreservationConfig, references: Iterable[Sequence[str]]) -> pa.Table:
    """The table with the item of the text that is preserved beside each caption; "" where there is none."""

    def item(caption: str, beside: Sequence[str]) -> str:
        text = settings.text(caption)
        return "" if text is None else plan.text_id(text, beside)

    pairs = zip(table["captions"].to_pylist(), references, strict=False)
    ids = [[item(caption, beside) for caption in own] for own, beside in pairs]
    return table.append_column(view.PRESERVED_FIELD, pa.array(ids, view.PRESERVED_FIELD.type))


def _empty_texts(work: _Work, table: pa.Table) -> pa.Array:
    """The text of dropped captions beside each sample's references; "" where one serves all."""
    if not work.texts_see_references:
        return pa.array([""] * len(table), pa.string())
    dropped = work.dropped_text
    return pa.array([plan.text_id(dropped, references) for references in plan.seen_ids(table)], pa.string())


def _shared_texts(work: _Work, table: pa.Table) -> pa.Array:
    """What the texts of each sample begin with; "" where it is in them."""
    if not work.texts_are_split:
        return pa.array([""] * len(table), pa.string())
    return pa.array([plan.shared_text_id(references) for references in plan.seen_ids(table)], pa.string())


def _report_of_part(work: _Work, num_left: int) -> CacheReport:
    LOGGER.info("%d shards are other parts' to make, or not done there yet: the last part to end seals the cache.", num_left)
    return _summary(work, num_shards_missing=num_left, num_texts_truncated=0, num_bytes=sum(
        done.num_bytes for kind in work.kinds.values() for done in kind.done
    ))  # fmt: skip


def _report(work: _Work, tables: dict[str, pa.Table]) -> CacheReport:
    cut = _texts_cut(work, tables["texts"])
    if cut:
        _warn_of_texts_cut(work, cut)
    num_bytes = sum(int(pc.sum(tables[kind]["bytes"]).as_py() or 0) for kind in KINDS)
    return _summary(work, num_shards_missing=0, num_texts_truncated=len(cut), num_bytes=num_bytes)


def _texts_cut(work: _Work, stored: pa.Table) -> list[tuple[str, int]]:
    """Texts that are longer than the encoder reads, in the order of the samples, and by how many tokens."""
    at_limit = stored.filter(pc.greater_equal(stored["length"], work.run.family.max_text_tokens))
    suspects = set(at_limit["id"].to_pylist())
    if not suspects:
        return []
    captions = [text.caption for text in work.needed_texts() if text.id in suspects and text.caption is not None]
    texts_cut: list[tuple[str, int]] = []
    for start in range(0, len(captions), _TOKENISED_AT_ONCE):
        batch = captions[start : start + _TOKENISED_AT_ONCE]
        # Only a family that adds tokens takes them.
        tokens = [work.run.needs.placeholder_tokens] if work.run.needs.placeholder_tokens else []
        counts = work.run.family.tokens_cut(work.model, batch, *tokens)
        texts_cut += [(caption, count) for caption, count in zip(batch, counts, strict=True) if count]
    return texts_cut


def _warn_of_texts_cut(work: _Work, cut: Sequence[tuple[str, int]]) -> None:
    LOGGER.warning(
        "%d of %d texts are longer than the %d tokens that %s reads, and were cut. Shorten them, or put first what matters:",
        len(cut), work.kinds["texts"].num_needed, work.run.family.max_text_tokens, work.run.family.name,
    )  # fmt: skip
    for caption, num in cut[:_LISTED]:
        LOGGER.warning("  %s (tokens cut: %d)", _beginning(caption), num)
    if len(cut) > _LISTED:
        LOGGER.warning("  and %d more", len(cut) - _LISTED)


def _beginning(caption: str) -> str:
    line = plain_text(" ".join(caption.split()))
    return line if len(line) <= _SHOWN_CHARS else f"{line[:_SHOWN_CHARS].rstrip()}..."


def _summary(work: _Work, **counts: int) -> CacheReport:
    latents, texts = work.kinds["latents"], work.kinds["texts"]
    return CacheReport(
        num_samples=work.dataset.manifest.num_samples,
        num_latents_encoded=sum(done.num_items for done in latents.done),
        num_latents_reused=latents.num_needed - latents.num_missing,
        num_texts_encoded=sum(done.num_items for done in texts.done),
        num_texts_reused=texts.num_needed - texts.num_missing,
        images_per_second=latents.rate,
        texts_per_second=texts.rate,
        peak_memory_bytes=max((done.peak_memory_bytes for kind in work.kinds.values() for done in kind.done), default=0),
        directory=str(work.directory),
        **counts,
    )
