"""Batches from the cache: every random choice about a sample comes from a generator of its own (seed, epoch, sample, use).

Shape legend: B batch, C channels, H W latent cells.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import torch

from ftk.cache.store import CacheStore
from ftk.configs.schema import TrainConfig
from ftk.models.base import Conditions, Texts
from ftk.models.components.geometry import SampleGeometry
from ftk.run import Run
from ftk.train import controls, flow
from ftk.train.flow import SigmaDistribution
from ftk.train.order import Draw, MicroBatch, Order, keyed_permutation, keyed_seed, share

_AHEAD = 2
_ANNOUNCED_STEPS = 32
_U_BELOW_1 = 1 - 2.0**-24
_GEOMETRY_COLUMNS = tuple(field.name for field in fields(SampleGeometry))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: clean latents and noise in the working dtype, sigma in fp32, and what the samples are conditioned on.

    `weight_B` is each sample's own (that of class images), `cell_weight_BHW` that of its cells (masks). `seen_noise_BCHW` is
    what the image is mixed with, where that is not the noise to predict. `preserved` are the conditions under which the base
    model's prediction is kept, in steps that do so; `preserved_B` is 1 for samples that take part, else 0. `share` is 0 where a
    process computes along only because the others do.
    """

    latents_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    sigma_B: torch.Tensor
    weight_B: torch.Tensor
    conditions: Conditions
    cell_weight_BHW: torch.Tensor | None = None
    seen_noise_BCHW: torch.Tensor | None = None
    preserved: Conditions | None = None
    preserved_B: torch.Tensor | None = None
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.sigma_B)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The same batch with each tensor replaced."""
        return Batch(
            latents_BCHW=function(self.latents_BCHW),
            noise_BCHW=function(self.noise_BCHW),
            sigma_B=function(self.sigma_B),
            weight_B=function(self.weight_B),
            conditions=self.conditions.map(function),
            cell_weight_BHW=None if self.cell_weight_BHW is None else function(self.cell_weight_BHW),
            seen_noise_BCHW=None if self.seen_noise_BCHW is None else function(self.seen_noise_BCHW),
            preserved=None if self.preserved is None else self.preserved.map(function),
            preserved_B=None if self.preserved_B is None else function(self.preserved_B),
            share=self.share,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What this process computes of a step: (number of the micro-batch within the step, batch); samples over all processes."""

    batches: Sequence[tuple[int, Batch]]
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class BatchBuilder:
    """Turns the order's micro-batches into tensors."""

    store: CacheStore
    run: Run
    sigmas: SigmaDistribution
    dtype: torch.dtype

    @property
    def config(self) -> TrainConfig:
        """The settings under `train`."""
        return self.run.config.train

    def build(
        self, micro_batch: MicroBatch, strata: Sequence[tuple[int, int]] | None = None, *, preserves: bool = False
    ) -> Batch:
        """Latents [B,C,H,W] drawn from their posterior, noise, sigma, and texts.

        Args:
            strata: for each sample (i, n): its sigma comes from the i-th of n equal shares of the distribution.
            preserves: add what the base model's prediction is kept for (`train.loss.preservation`).
        """
        keys = [self._key(draw) for draw in micro_batch]
        pairs = [self._latents_and_noise(draw, key) for draw, key in zip(micro_batch, keys, strict=True)]
        u_B = torch.stack([torch.rand((), generator=_generator(*key, "sigma")) for key in keys])
        if strata is not None:
            first_B, count_B = torch.tensor(strata, dtype=torch.float32).T
            u_B = ((first_B + u_B) / count_B).clamp(max=_U_BELOW_1)
        control_images = [
            controls.drawn(self.store, self.run, draw.sample, key, can_drop=True)
            for draw, key in zip(micro_batch, keys, strict=True)
        ]
        samples, captions = [draw.sample for draw in micro_batch], [draw.caption for draw in micro_batch]
        batch = self._batch(samples, captions, pairs, control_images, u_B)
        if preserves:
            batch = self._with_preserved(batch, samples, captions)
        strength = self.config.noise.perturbation
        if not strength:
            return batch
        # Ning et al. 2023 (arXiv 2301.11706): the model sees more noise than it is told to predict.
        seen = [
            noise + strength * _normal(noise.shape, *key, "perturbation") for (_, noise), key in zip(pairs, keys, strict=True)
        ]
        return replace(batch, seen_noise_BCHW=torch.stack(seen).to(self.dtype))

    def _with_preserved(self, batch: Batch, samples: Sequence[int], captions: Sequence[int]) -> Batch:
        """The batch with the texts for which the base model's prediction is kept; control images are dropped from these."""
        found = [self.store.preserved_text(sample, caption) for sample, caption in zip(samples, captions, strict=True)]
        # Samples that take no part keep their own text: it counts nothing.
        texts = [
            _text(self.store, sample, caption) if text is None else text
            for text, sample, caption in zip(found, samples, captions, strict=True)
        ]
        dropped = tuple(controls.dropped(self.run, each) for each in batch.conditions.controls)
        return replace(
            batch,
            preserved=replace(batch.conditions, texts=_collated(self.run, texts, self.dtype), controls=dropped),
            preserved_B=torch.tensor([text is not None for text in found], dtype=torch.float32),
        )

    def fixed(self, samples: Sequence[int], position: int, count: int) -> Batch:
        """For validation: latents' means, first captions, and noise, sigma and control images that never change.

        Sigma is at the middle of share `position` of `count` equal shares of the distribution.
        """
        pairs, control_images = [], []
        for sample in samples:
            key = (self.config.seed, "validation", self._name(sample), position)
            mean = self.store.latents(sample)[0].float()
            pairs.append((mean, _normal(mean.shape, *key, "noise")))
            control_images.append(controls.drawn(self.store, self.run, sample, key))
        u_B = torch.full((len(samples),), (position + 0.5) / count)
        return self._batch(samples, [0] * len(samples), pairs, control_images, u_B)

    def _batch(
        self,
        samples: Sequence[int],
        captions: Sequence[int],
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        control_images: Sequence[Sequence[torch.Tensor]],
        u_B: torch.Tensor,
    ) -> Batch:
        latents_BCHW = torch.stack([latents for latents, _ in pairs])
        height, width = latents_BCHW.shape[-2:]
        return Batch(
            latents_BCHW=latents_BCHW.to(self.dtype),
            noise_BCHW=torch.stack([noise for _, noise in pairs]).to(self.dtype),
            sigma_B=self.sigmas.sigma(u_B, height * width // self.run.family.geometry.patch**2),
            weight_B=torch.tensor([self._weights[sample] for sample in samples], dtype=torch.float32),
            conditions=conditions_of(self.store, self.run, samples, captions, control_images, self.dtype),
            cell_weight_BHW=self._cell_weights(samples, height, width),
        )

    def _key(self, draw: Draw) -> tuple[object, ...]:
        return (self.config.seed, draw.epoch, self._name(draw.sample), draw.repeat)

    def _name(self, sample: int) -> str:
        name: str = self.store.table["key"][sample].as_py()
        return name

    @cached_property
    def _weights(self) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        is_class = pc.equal(self.store.table["role"], "class").to_numpy()
        return np.where(is_class, self.config.loss.prior_weight, 1.0).astype(np.float32)

    def _latents_and_noise(self, draw: Draw, key: tuple[object, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (tensor.float() for tensor in self.store.latents(draw.sample))
        latents = mean
        if self.config.posterior != "mean":
            drawn_by = key if self.config.posterior == "sample" else (self.config.seed, self._name(draw.sample))
            latents = mean + std * _normal(mean.shape, *drawn_by, "posterior")
        return latents, self._noise(mean.shape, key)

    def _noise(self, shape: Sequence[int], key: Sequence[object]) -> torch.Tensor:
        """[C,H,W]."""
        settings, noise = self.config.noise, _normal(shape, *key, "noise")
        if settings.offset:
            noise = noise + settings.offset * _normal((shape[0], 1, 1), *key, "noise offset")
        if settings.pyramid_levels:
            layers = _generator(*key, "pyramid")
            noise = flow.pyramid_noise(noise, settings.pyramid_levels, settings.pyramid_discount, layers)
        return noise

    def _cell_weights(self, samples: Sequence[int], height: int, width: int) -> torch.Tensor | None:
        unmasked = self.config.loss.unmasked_weight
        if unmasked == 1:
            return None
        masks = [self.store.mask(sample) for sample in samples]
        if all(mask is None for mask in masks):
            return None
        whole = torch.ones(height, width)
        return torch.stack([whole if mask is None else unmasked + (1 - unmasked) * mask.float() for mask in masks])


def conditions_of(
    store: CacheStore,
    run: Run,
    samples: Sequence[int],
    captions: Sequence[int],
    control_images: Sequence[Sequence[torch.Tensor]],
    dtype: torch.dtype,
) -> Conditions:
    """What these samples of a cache are conditioned on, in the working dtype: the same for training and for all that checks it.

    Args:
        samples: of one group of the order: they have as many references, of the same sizes.
        captions: for each sample which of its captions, or `EMPTY_CAPTION`.
        control_images: for each sample its control images, as `controls.drawn` gives them; all have as many.
    """
    texts = [_text(store, sample, caption) for sample, caption in zip(samples, captions, strict=True)]
    references = [store.references(sample) for sample in samples] if store.has_references else []
    geometries = [
        SampleGeometry(**{name: store.table[name][sample].as_py() for name in _GEOMETRY_COLUMNS}) for sample in samples
    ]
    return Conditions(
        texts=_collated(run, texts, dtype),
        references=tuple(torch.stack(tensors).to(dtype) for tensors in zip(*references, strict=True)),
        controls=tuple(torch.stack(tensors).to(dtype) for tensors in zip(*control_images, strict=True)),
        geometry_BG=torch.tensor([geometry.numbers() for geometry in geometries]),
    )


def _text(store: CacheStore, sample: int, caption: int) -> dict[str, torch.Tensor]:
    return store.text(sample, caption) if caption >= 0 else store.empty_text(sample)


def _collated(run: Run, texts: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype) -> Texts:
    """Cached texts as one batch, in the working dtype."""

    def as_computed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return run.family.collate_texts([{name: as_computed(tensor) for name, tensor in text.items()} for text in texts])


def _normal(shape: Sequence[int], *key: object) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator(*key))


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(keyed_seed(*key))


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Builds the steps that one process computes, a few ahead of the loop.

    `is_even`: every process gets as many micro-batches as any other, those too many with a share of 0: processes that split
    the weights of a model must all compute whenever one does.
    """

    order: Order
    builder: BatchBuilder
    device: torch.device
    rank: int = 0
    world_size: int = 1
    is_even: bool = False

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Steps first..last-1 on the device, made by a thread; its errors are raised here."""
        ready: queue.Queue[tuple[Step, torch.cuda.Event | None] | BaseException] = queue.Queue(maxsize=_AHEAD)
        stopped = threading.Event()
        thread = threading.Thread(target=self._work, args=(first, last, ready, stopped), name="ftk-batches", daemon=True)
        thread.start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                step, copied = item
                if copied is not None:
                    torch.cuda.current_stream(self.device).wait_event(copied)
                    for _, batch in step.batches:
                        batch.map(self._in_use)
                yield step
        finally:
            stopped.set()
            thread.join(timeout=5)

    def step(self, index: int) -> Step:
        """One step, on the CPU."""
        micro_batches = self.order.step(index)
        num_samples = sum(len(micro_batch) for micro_batch in micro_batches)
        starts = np.cumsum([0, *(len(micro_batch) for micro_batch in micro_batches)])
        strata: list[tuple[int, int]] | None = None
        if self.builder.config.sigma.stratified:
            shuffled = keyed_permutation(num_samples, self.builder.config.seed, "strata", index)
            strata = [(int(stratum), num_samples) for stratum in shuffled]

        preservation = self.builder.config.loss.preservation
        preserves = preservation is not None and index % preservation.every == 0

        def build(number: int, micro_batch: MicroBatch) -> Batch:
            part = strata and strata[starts[number] : starts[number + 1]]
            batch = self.builder.build(micro_batch, part, preserves=preserves)
            # Processes that split the weights compute along although nothing of theirs is preserved.
            is_idle = batch.preserved_B is not None and not self.is_even and not batch.preserved_B.any()
            return replace(batch, preserved=None, preserved_B=None) if is_idle else batch

        batches = [(number, build(number, each)) for number, each in share(micro_batches, self.rank, self.world_size)]
        most = -(-len(micro_batches) // self.world_size)
        while self.is_even and len(batches) < most:
            number = len(micro_batches) - 1
            batches.append((number, replace(build(number, micro_batches[number]), share=0.0)))
        return Step(batches=batches, num_samples=num_samples)

    def _work(
        self,
        first: int,
        last: int,
        ready: "queue.Queue[tuple[Step, torch.cuda.Event | None] | BaseException]",
        stopped: threading.Event,
    ) -> None:
        def put(item: "tuple[Step, torch.cuda.Event | None] | BaseException") -> None:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            for index in range(first, last):
                self._announce(index, first, last)
                put(self._moved(self.step(index), stream))
                if stopped.is_set():
                    return
        except BaseException as error:
            put(error)

    def _announce(self, index: int, first: int, last: int) -> None:
        """Every so often, tell the store which samples are coming: it may have to fetch them."""
        if (index - first) % _ANNOUNCED_STEPS == 0:
            coming = range(index, min(last, index + 2 * _ANNOUNCED_STEPS))
            self.builder.store.ahead(self._samples(coming))

    def _samples(self, steps: Iterable[int]) -> Iterator[int]:
        for index in steps:
            for _, micro_batch in share(self.order.step(index), self.rank, self.world_size):
                yield from (draw.sample for draw in micro_batch)

    def _moved(self, step: Step, stream: "torch.cuda.Stream | None") -> "tuple[Step, torch.cuda.Event | None]":
        """The step on the device; on a GPU copied from pinned memory beside what the GPU computes."""
        if self.device.type == "cpu":
            return step, None
        if stream is None:
            batches = [(number, batch.map(lambda tensor: tensor.to(self.device))) for number, batch in step.batches]
            return replace(step, batches=batches), None
        with torch.cuda.stream(stream):
            batches = [
                (number, batch.map(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True)))
                for number, batch in step.batches
            ]
            copied = torch.cuda.Event()
            copied.record(stream)
        return replace(step, batches=batches), copied

    def _in_use(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor
