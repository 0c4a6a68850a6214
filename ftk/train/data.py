"""Batches from the cache: every random choice about a sample comes from a generator of its own (seed, epoch, sample, use).

Shape legend: B batch, C channels, H W latent cells.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ftk.cache.store import CacheStore
from ftk.configs.schema import TrainConfig
from ftk.models.base import Family
from ftk.train import flow
from ftk.train.order import Draw, MicroBatch, Order, keyed_seed

_AHEAD = 2
_ANNOUNCED_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: clean latents and noise in the working dtype, sigma in fp32, texts as the family collates them."""

    latents_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    sigma_B: torch.Tensor
    texts: Mapping[str, torch.Tensor | None]

    def __len__(self) -> int:
        return len(self.sigma_B)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        return Batch(
            latents_BCHW=move(self.latents_BCHW),
            noise_BCHW=move(self.noise_BCHW),
            sigma_B=move(self.sigma_B),
            texts={name: None if tensor is None else move(tensor) for name, tensor in self.texts.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuilder:
    """Turns the order's micro-batches into tensors."""

    store: CacheStore
    family: Family
    table: torch.Tensor
    config: TrainConfig
    dtype: torch.dtype

    def build(self, micro_batch: MicroBatch) -> Batch:
        """Latents [B,C,H,W] drawn from their posterior, noise, sigma, and texts after caption choice and dropout."""
        parts = [self._sample(draw) for draw in micro_batch]
        return Batch(
            latents_BCHW=torch.stack([latents for latents, _, _, _ in parts]).to(self.dtype),
            noise_BCHW=torch.stack([noise for _, noise, _, _ in parts]).to(self.dtype),
            sigma_B=torch.stack([sigma for _, _, sigma, _ in parts]),
            texts=self.family.collate_texts([text for _, _, _, text in parts]),
        )

    def _sample(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        name = self.store.table["key"][draw.sample].as_py()
        key = (self.config.seed, draw.epoch, name, draw.repeat)
        mean, std = (tensor.float() for tensor in self.store.latents(draw.sample))
        latents = mean
        if self.config.posterior != "mean":
            drawn_by = key if self.config.posterior == "sample" else (self.config.seed, name)
            latents = mean + std * torch.randn(mean.shape, generator=_generator(*drawn_by, "posterior"))
        noise = torch.randn(mean.shape, generator=_generator(*key, "noise"))
        settings = self.config.sigma
        u = flow.draw_u(
            settings.sampling, _generator(*key, "sigma"), settings.logit_mean, settings.logit_std, settings.mode_scale
        )
        return latents, noise, flow.sigma_at(u, self.table, settings.shift), self._text(key, draw.sample)

    def _text(self, key: tuple[object, ...], sample: int) -> dict[str, torch.Tensor]:
        text = self._choose_text(key, sample)
        return {name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in text.items()}

    def _choose_text(self, key: tuple[object, ...], sample: int) -> dict[str, torch.Tensor]:
        if self.config.caption_dropout:
            dropped = torch.rand((), generator=_generator(*key, "caption dropout")) < self.config.caption_dropout
            if dropped:
                return self.store.empty_text()
        captions = self.store.num_texts(sample)
        if captions == 1:
            return self.store.text(sample)
        return self.store.text(sample, int(torch.randint(captions, (), generator=_generator(*key, "caption choice"))))


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(keyed_seed(*key))


def _announced(order: Order, first: int, last: int, announce: Callable[[Iterable[int]], None]) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step; every so often the samples of the coming ones are announced."""
    for step in range(first, last):
        if (step - first) % _ANNOUNCED_STEPS == 0:
            coming = range(step, min(last, step + 2 * _ANNOUNCED_STEPS))
            announce(draw.sample for later in coming for micro_batch in order.step(later) for draw in micro_batch)
        yield order.step(step)


def steps(
    order: Order,
    build: Callable[[MicroBatch], Batch],
    first: int,
    last: int,
    announce: Callable[[Iterable[int]], None] = lambda _: None,
) -> Iterator[list[Batch]]:
    """The batches of steps first..last-1, built a few steps ahead by a thread; its errors are raised here.

    Args:
        announce: is told long before which samples are coming, in their order.
    """
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=_AHEAD)
    stopped = threading.Event()

    def put(item: list[Batch] | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for micro_batches in _announced(order, first, last, announce):
                put([build(micro_batch) for micro_batch in micro_batches])
                if stopped.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="ftk-batches", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5)
