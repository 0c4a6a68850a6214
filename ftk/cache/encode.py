"""Encodes units: pictures through the VAE, captions through the text encoder. One component is in memory at a time.

One thread reads ahead and several decode (Pillow frees the interpreter meanwhile); copies to and from a GPU have streams of
their own; a thread writes finished shards. What a batch holds depends on its unit and the settings alone, so whoever encodes
a unit gives the same bytes.

Shape legend: B batch, C channels, H W pixels, h w latent cells.
"""

import gc
import io
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ftk import devices
from ftk.cache import pictures, shards
from ftk.cache.offload import placement
from ftk.cache.plan import ImageItem, TextItem, Unit
from ftk.configs.load import default_workers
from ftk.configs.schema import CacheConfig, ModelConfig
from ftk.errors import CacheError, EnvironmentFault
from ftk.models import base as models
from ftk.models.base import AddsTokens, Family, SharesTexts
from ftk.models.components.placeholders import Placeholders
from ftk.pipeline import prompt_images
from ftk.pipeline.dataset import PreparedDataset
from ftk.pipeline.engine import worker_place
from ftk.progress import human_bytes

LOGGER = logging.getLogger("ftk")

Tensors = dict[str, torch.Tensor]
Advance = Callable[[int, str], None]
Argument = TypeVar("Argument")
Result = TypeVar("Result")

_GIB = 1 << 30
_DEFAULT_MEMORY_GIB = {"cpu": 1.0}
_DEFAULT_GPU_MEMORY_GIB = 8.0
_MAX_BATCH = 256
_BATCHES_AHEAD = 2
_BATCHES_READ = 1
_SPEED_SECONDS = 0.2
_SHARDS_IN_WRITING = 1


def encoding_device(name: str) -> torch.device:
    """The device of that name, see `devices.resolve_device`; of a CPU the kernels that it keeps are limited."""
    device = devices.resolve_device(name)
    if device.type == "cpu":
        devices.limit_cpu_kernels()
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """All that a process needs to encode units of one kind, here or on another machine."""

    kind: str
    base: ModelConfig
    model: Path
    folder: Path
    prepared: Path
    config: CacheConfig
    workers: int
    placeholder_tokens: Placeholders = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of this process: with several GPUs, the one of its place among its pool's workers."""
        device = encoding_device(self.config.device)
        return torch.device("cuda", worker_place() % torch.cuda.device_count()) if device.type == "cuda" else device

    @property
    def memory_bytes(self) -> float:
        """The working memory that a batch may take."""
        default = _DEFAULT_MEMORY_GIB.get(devices.resolve_device(self.config.device).type, _DEFAULT_GPU_MEMORY_GIB)
        return (self.config.memory_gib or default) * _GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A unit that is committed."""

    unit: int
    num_items: int
    num_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Items of one unit that go through the encoder together: images with their pixels, texts with the references they see."""

    unit: int
    items: Sequence[Any]
    pixels_BHWC: torch.Tensor | None = None
    references: Sequence[Sequence[npt.NDArray[np.uint8]]] = ()


@dataclass(slots=True)
class _Encoder:
    """A component in memory, and how large a batch may still be after the device was out of memory."""

    job: EncodeJob
    family: Family
    component: Any
    device: torch.device
    limits: dict[tuple[int, ...], int] = field(default_factory=dict)
    _dataset: PreparedDataset | None = None

    @property
    def dataset(self) -> PreparedDataset:
        """What the job's pictures are read from; opened once, as it verifies each shard once."""
        self._dataset = self._dataset or PreparedDataset.open(self.job.prepared)
        return self._dataset

    @classmethod
    def load(cls, job: EncodeJob) -> "_Encoder":
        family, device = models.parse(job.base), job.device
        if job.kind == "latents":
            component = family.load_vae(job.model, getattr(torch, job.config.loaded_vae_dtype), device)
        else:
            # New words need rows in the embedding table, which must be there for that.
            place = None if job.placeholder_tokens else placement(job.config.offload, device)
            options = {"place": place} if place else {}
            component = family.load_text_encoder(job.model, getattr(torch, job.config.text_dtype), device, **options)
            if job.placeholder_tokens:
                assert isinstance(family, AddsTokens)
                family.add_tokens(component, job.placeholder_tokens)
        return cls(job, family, component, device)

    def encode(self, batch: _Batch) -> list[Tensors]:
        """The tensors of each item on the device, in stored precision."""
        if batch.pixels_BHWC is None:
            return self._halving((0,), list(itertools.zip_longest(batch.items, batch.references, fillvalue=())), self._texts)
        key = tuple(batch.pixels_BHWC.shape[1:])
        by_form = {"latents": self._latents, "mask": self._masks, "pixels": self._pixels}
        return self._halving(key, batch.pixels_BHWC, by_form[batch.items[0].form])

    def _texts(self, texts: Sequence[tuple[TextItem, Sequence[npt.NDArray[np.uint8]]]]) -> list[Tensors]:
        dtype = getattr(torch, self.job.config.stored_text_dtype)
        captions = [text.caption for text, _ in texts]
        parts = [text.part for text, _ in texts]
        references = [[self._pixels_of(image_HWC) for image_HWC in images] for _, images in texts]
        # Most families' texts see no references, and those take none.
        encoded = self.family.encode_texts(self.component, captions, *((references,) if any(references) else ()))
        stored = map(self._stored, encoded, parts, references)
        return [
            {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in item.items()}
            for item in stored
        ]

    def _stored(self, item: Tensors, part: str, references: Sequence[torch.Tensor]) -> Tensors:
        """What is stored of a text: all of it, or its states before or after those that its references share."""
        if part == "whole":
            return item
        assert isinstance(self.family, SharesTexts)
        shared = self.family.shared_tokens(self.component, references)
        # A copy: a view would keep the whole text in memory.
        return {name: (tensor[:shared] if part == "shared" else tensor[shared:]).clone() for name, tensor in item.items()}

    def _pixels_of(self, image_HWC: npt.NDArray[np.uint8]) -> torch.Tensor:
        """[3,H,W] in [-1, 1], of a reference that the text encoder sees."""
        return torch.tensor(image_HWC, device=self.device).permute(2, 0, 1).float() / 127.5 - 1.0

    def _latents(self, pixels_BHWC: torch.Tensor) -> list[Tensors]:
        dtype = getattr(torch, self.job.config.latents_dtype)
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        # By default torch lets a GPU's convolutions round fp32 to 10 bits, and choose other kernels from run to run.
        is_fast = self.job.config.vae_dtype == "tfloat32"
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=is_fast):
            mean, std = self.family.encode_images(self.component, pixels_BCHW)
        return [{"mean": one_mean, "std": one_std} for one_mean, one_std in zip(mean.to(dtype), std.to(dtype), strict=True)]

    def _pixels(self, pixels_BHWC: torch.Tensor) -> list[Tensors]:
        """[3,H,W] in 8 bits: what a control network reads."""
        return [{"pixels": image} for image in pixels_BHWC.permute(0, 3, 1, 2).contiguous()]

    def _masks(self, pixels_BHWC: torch.Tensor) -> list[Tensors]:
        dtype = getattr(torch, self.job.config.latents_dtype)
        masks_BHW = pixels_BHWC[..., 0].float() / 255.0
        cells_Bhw = torch.nn.functional.avg_pool2d(masks_BHW, self.family.geometry.factor)
        return [{"mask": cells} for cells in cells_Bhw.to(dtype)]

    def _halving(self, key: tuple[int, ...], batch: Any, encode: Callable[[Any], list[Tensors]]) -> list[Tensors]:
        """Encode a batch, in halves of halves once the device is out of memory; batches of this size stay halved."""
        encoded: list[Tensors] = []
        while len(encoded) < len(batch):
            size = min(self.limits.get(key, len(batch)), len(batch) - len(encoded))
            try:
                encoded += encode(batch[len(encoded) : len(encoded) + size])
                continue
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            free_memory()
            if size == 1:
                raise EnvironmentFault(
                    f"{self.device} is out of memory encoding one {self._describe(key)}: {reason}. Close what else uses it, "
                    f"set cache.vae_dtype or cache.text_dtype to bfloat16, cache.offload to layers (texts), or cache.device to "
                    f"cpu. Finished shards are kept."
                )
            self.limits[key] = size // 2
            LOGGER.warning("%s is out of memory with %d x %s: going on with %d at a time", self.device, size,
                           self._describe(key), size // 2)  # fmt: skip
        return encoded

    @staticmethod
    def _describe(key: tuple[int, ...]) -> str:
        return f"image of {key[1]}x{key[0]} px" if len(key) > 1 else "caption"


_loaded: dict[str, _Encoder] = {}


def release() -> None:
    """Free the component that this process holds."""
    _loaded.clear()
    free_memory()


def _encoder(job: EncodeJob) -> _Encoder:
    """The job's component: the one that this process holds, else that one is freed and the job's is loaded."""
    name = repr(job)
    if name not in _loaded:
        release()
        _loaded[name] = _Encoder.load(job)
    return _loaded[name]


def load(job: EncodeJob) -> None:
    """Load the job's component into this process, where it stays until `release`."""
    _encoder(job)


def encode_unit(job: EncodeJob, unit: Unit[Any]) -> Done:
    """Encode and commit one unit; the component stays in this process for the next."""
    (done,) = encode_units(job, [unit], lambda *_: None)
    return done


def encode_units(job: EncodeJob, units: Iterable[Unit[Any]], advance: Advance) -> Iterator[Done]:
    """Encode and commit units, one after another; the next one is under way while one is written.

    Raises:
        CacheError: the stored precision cannot hold a value.
        DatasetError: a prepared shard is damaged.
        EnvironmentFault: the device has no memory for a single item.
    """
    encoder = _encoder(job)
    copies, freed = _Copies(encoder.device), devices.FreedMemory()
    listed = list(units)
    by_number = {unit.number: unit for unit in listed}
    finished: deque[Future[Done]] = deque()
    gathered: dict[str, Tensors] = {}
    left = {unit.number: len(unit.items) for unit in listed}
    with ThreadPoolExecutor(1, "ftk-writer") as writer:
        for batch in _batches(encoder, listed):
            tensors = copies.to_host(encoder.encode(copies.to_device(batch)))
            gathered |= {item.id: one for item, one in zip(batch.items, tensors, strict=True)}
            freed.release()
            advance(len(batch.items), human_bytes(memory_bytes(encoder.device)))
            left[batch.unit] -= len(batch.items)
            if not left[batch.unit]:
                finished.append(writer.submit(_write, job, by_number[batch.unit], gathered, copies.event()))
                gathered = {}
            while finished and (len(finished) > _SHARDS_IN_WRITING or finished[0].done()):
                yield finished.popleft().result()
        while finished:
            yield finished.popleft().result()


def _write(job: EncodeJob, unit: Unit[Any], gathered: dict[str, Tensors], copied: "torch.cuda.Event | None") -> Done:
    if copied is not None:
        copied.synchronize()
    items = []
    for item in unit.items:
        _refuse_infinite(job, item, gathered[item.id])
        items.append((item.id, gathered[item.id]))
    receipt = shards.write(job.folder, items)
    return Done(
        unit=unit.number, num_items=len(items), num_bytes=receipt.bytes, peak_memory_bytes=memory_bytes(job.device, peak=True)
    )


def _refuse_infinite(job: EncodeJob, item: Any, tensors: Tensors) -> None:
    if all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        return
    if isinstance(item, TextItem):
        what, setting, dtype = f"caption {(item.caption or '')[:60]!r}", "text_stored", job.config.stored_text_dtype
    else:
        what, setting, dtype = f"sample {item.key}", "latents_dtype", job.config.latents_dtype
    raise CacheError(
        f"The encoder gave values that {dtype} cannot hold, or that are no numbers, for {what}. Set cache.{setting}: float32, "
        f"and compute in float32 too if that is not enough."
    )


def _batches(encoder: _Encoder, units: Sequence[Unit[Any]]) -> Iterator[_Batch]:
    """Batches in the order of the units, made ready ahead of time."""
    if encoder.job.kind == "texts":
        with ThreadPoolExecutor(1, "ftk-tokenizer") as tokenizing, ThreadPoolExecutor(1, "ftk-reader") as reading:
            units_of_batches = _mapped(tokenizing, lambda unit: _text_batches(encoder, unit), units, 1)
            batches = itertools.chain.from_iterable(units_of_batches)
            yield from _mapped(reading, _with_references, ((encoder, batch) for batch in batches), _BATCHES_READ)
        return
    planned = [(unit.number, items) for unit in units for items in _picture_batches(encoder, unit)]
    reader = pictures.PictureReader(encoder.dataset, [picture for unit in units for picture in unit.items])
    workers = default_workers(encoder.job.workers)
    largest = max((len(items) for _, items in planned), default=0)
    with ThreadPoolExecutor(1, "ftk-reader") as reading, ThreadPoolExecutor(workers, "ftk-decoder") as decoding:
        # A single reading thread: a tar is read in order, and only this thread touches the reader.
        files = _mapped(reading, lambda batch: list(zip(batch[1], reader.files(batch[1]), strict=True)), planned, _BATCHES_READ)
        decoded = _mapped(decoding, _decode, itertools.chain.from_iterable(files), workers + _BATCHES_AHEAD * largest)
        for number, items in planned:
            pixels_BHWC = torch.from_numpy(np.stack(list(itertools.islice(decoded, len(items)))))
            yield _Batch(number, items, pixels_BHWC)


def _picture_batches(encoder: _Encoder, unit: Unit[ImageItem]) -> list[Sequence[ImageItem]]:
    """Pictures of one size and kind together, as many as the memory allows."""
    groups: dict[tuple[int, int, str], list[ImageItem]] = {}
    for picture in unit.items:
        groups.setdefault((picture.height, picture.width, picture.form), []).append(picture)
    batches: list[Sequence[ImageItem]] = []
    for (height, width, _), members in groups.items():
        size = encoder.job.config.image_batch
        if size is None:
            fitting = encoder.job.memory_bytes // encoder.family.image_memory(encoder.component, height, width)
            size = max(1, min(_MAX_BATCH, int(fitting)))
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return pictures.in_order_of_reading(batches, unit.items)


def _text_batches(encoder: _Encoder, unit: Unit[TextItem]) -> list[_Batch]:
    """Captions of like length together: a batch is as long as its longest. Those beside the same references come first."""
    lengths = encoder.family.text_lengths(encoder.component, [text.caption for text in unit.items])
    lengths = [length + _shared_tokens(encoder, text) for length, text in zip(lengths, unit.items, strict=True)]
    ordered = sorted(
        zip(lengths, unit.items, strict=True),
        key=lambda pair: ([each.id for each in pair[1].references], pair[0], pair[1].id),
    )
    batches: list[_Batch] = []
    batch: list[TextItem] = []
    for length, text in ordered:
        most = encoder.job.config.text_batch
        if most is None:
            fitting = encoder.job.memory_bytes // encoder.family.text_memory(encoder.component, length)
            most = max(1, min(_MAX_BATCH, int(fitting)))
        if len(batch) >= most:
            batches.append(_Batch(unit.number, tuple(batch)))
            batch = []
        batch.append(text)
    return [*batches, _Batch(unit.number, tuple(batch))]


def _shared_tokens(encoder: _Encoder, text: TextItem) -> int:
    """What the references of a text add to its length, by their sizes alone."""
    if not (text.references and isinstance(encoder.family, SharesTexts)):
        return 0
    outlines = [torch.empty(3, each.height, each.width, device="meta") for each in text.references]
    return encoder.family.shared_tokens(encoder.component, outlines)


def _with_references(task: tuple[_Encoder, _Batch]) -> _Batch:
    """The same batch of texts with the references that they see, decoded: [H,W,3], 8 bits."""
    encoder, batch = task
    if not any(text.references for text in batch.items):
        return batch
    dataset = encoder.dataset
    references = [[_decode((each, pictures.place(dataset, each))) for each in text.references] for text in batch.items]
    return replace(batch, references=references)


def _mapped(
    pool: ThreadPoolExecutor, function: Callable[[Argument], Result], arguments: Iterable[Argument], ahead: int
) -> Iterator[Result]:
    """As `pool.map`, with at most `ahead` results waiting."""
    waiting: deque[Future[Result]] = deque()
    iterator = iter(arguments)
    try:
        for argument in iterator:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _decode(task: tuple[ImageItem, pictures.File]) -> npt.NDArray[np.uint8]:
    """[H,W,3] of an image, [H,W,1] of a mask, 8 bits."""
    picture, file = task
    if file is None:
        return np.asarray(prompt_images.load(Path(picture.key), picture.width, picture.height, picture.made))
    with Image.open(io.BytesIO(file if isinstance(file, bytes) else file.read())) as image:
        pixels = np.asarray(image.convert("L" if picture.is_mask else "RGB"))
    return pixels[..., None] if picture.is_mask else pixels


class _Copies:
    """Copies between host and device; on a GPU from pinned memory, on a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._in: torch.cuda.Stream | None = torch.cuda.Stream(device) if is_cuda else None
        self._out: torch.cuda.Stream | None = torch.cuda.Stream(device) if is_cuda else None

    def to_device(self, batch: _Batch) -> _Batch:
        """The batch with its pixels on the device; the copy runs beside the encoding of the batch before."""
        if batch.pixels_BHWC is None:
            return batch
        if self._in is None:
            return _Batch(batch.unit, batch.items, batch.pixels_BHWC.to(self._device))
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            pixels_BHWC = batch.pixels_BHWC.pin_memory().to(self._device, non_blocking=True)
        current.wait_stream(self._in)
        pixels_BHWC.record_stream(current)
        return _Batch(batch.unit, batch.items, pixels_BHWC)

    def to_host(self, items: list[Tensors]) -> list[Tensors]:
        """The tensors on the host; on a GPU they are only there once `event` has come to pass."""
        if self._out is None:
            return [{name: tensor.cpu() for name, tensor in item.items()} for item in items]
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            copied = [{name: tensor.to("cpu", non_blocking=True) for name, tensor in item.items()} for item in items]
        for item in items:
            for tensor in item.values():
                tensor.record_stream(self._out)
        return copied

    def event(self) -> "torch.cuda.Event | None":
        """Comes to pass when all copies to the host so far are done; None where copies are done at once."""
        if self._out is None:
            return None
        event = torch.cuda.Event()
        event.record(self._out)
        return event


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that this device does now, by a fifth of a second of matrix products."""
    side = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    product = matrix @ matrix
    _wait(device)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < _SPEED_SECONDS:
        torch.mm(matrix, matrix, out=product)
        _wait(device)
        count += 1
    return 2.0 * side**3 * count / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device, peak: bool = False) -> int:
    """Memory in use: what torch allocated on a GPU, elsewhere this process's resident set."""
    return devices.memory_bytes(device) if peak or device.type != "cuda" else int(torch.cuda.memory_allocated(device))


def free_memory() -> None:
    """Give back what a dropped component or a failed batch held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
