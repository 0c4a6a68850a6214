"""Batches from the cache: every random choice about a sample comes from a generator of its own (seed, epoch, sample, use).

Shape legend: B batch, C channels, H W latent cells.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ftk.cache.store import CacheStore
from ftk.configs.schema import TrainConfig
from ftk.models.base import Family
from ftk.train import flow
from ftk.train.order import Draw, MicroBatch, Order, keyed_seed

_AHEAD = 2


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
            texts=self.family.collate_texts([self._text(item) for _, _, _, item in parts]),
        )

    def _sample(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
        sample = self.store.samples[draw.sample]
        key = (self.config.seed, draw.epoch, sample.key, draw.repeat)
        mean, std = (tensor.float() for tensor in self.store.latents(sample.latents))
        latents = mean
        if self.config.posterior == "sample":
            latents = mean + std * torch.randn(mean.shape, generator=_generator(*key, "posterior"))
        noise = torch.randn(mean.shape, generator=_generator(*key, "noise"))
        settings = self.config.sigma
        u = flow.draw_u(
            settings.sampling, _generator(*key, "sigma"), settings.logit_mean, settings.logit_std, settings.mode_scale
        )
        return latents, noise, flow.sigma_at(u, self.table, settings.shift), self._choose_text(key, sample.texts)

    def _choose_text(self, key: tuple[object, ...], texts: Sequence[str]) -> str:
        if self.config.caption_dropout:
            dropped = torch.rand((), generator=_generator(*key, "caption dropout")) < self.config.caption_dropout
            if dropped:
                return self.store.manifest.empty_text
        if len(texts) == 1:
            return texts[0]
        return texts[int(torch.randint(len(texts), (), generator=_generator(*key, "caption choice")))]

    def _text(self, item: str) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.store.text(item).items()
        }


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(keyed_seed(*key))


def steps(order: Order, build: Callable[[MicroBatch], Batch], first: int, last: int) -> Iterator[list[Batch]]:
    """The batches of steps first..last-1, built a few steps ahead by a thread; its errors are raised here."""
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
            for step in range(first, last):
                put([build(micro_batch) for micro_batch in order.step(step)])
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
