"""Encoding units: batches that memory allows and nothing else decides, halves when it does not, and no value but numbers.

Most of it with a family that stands in for a model: its latents are the pixels' means, its texts the letters.
"""

import gc
import io
import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftk import devices
from ftk.cache import encode, shards
from ftk.cache.encode import EncodeJob
from ftk.cache.plan import ImageItem, TextItem, Unit
from ftk.configs.schema import CacheConfig, ModelConfig
from ftk.contracts import SampleRow
from ftk.errors import CacheError, DatasetError, EnvironmentFault
from ftk.models import base as families
from ftk.models.components.geometry import LatentGeometry
from ftk.pipeline.dataset import PreparedDataset

GIB = 1 << 30


class Component:
    """Stands for weights in memory."""


class Family:
    """Notes what it is asked for; `limit` is the largest batch that its device has memory for."""

    name = "stand-in"
    geometry = LatentGeometry(channels=3, factor=8, patch=2)

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.living: list[weakref.ref[Component]] = []
        self.batches: list[Any] = []
        self.pixels: list[torch.Tensor] = []
        self.limit = 1 << 30
        self.error: Exception = torch.OutOfMemoryError("out of memory: tried to allocate 7 GiB\nand more lines")
        self.while_encoding: Callable[[], None] = lambda: None

    def _load(self, name: str) -> Component:
        assert not [one for one in self.living if one() is not None], "two components in memory"
        component = Component()
        self.loaded.append(name)
        self.living.append(weakref.ref(component))
        return component

    def load_vae(self, directory: Path, dtype: torch.dtype, device: torch.device) -> Component:
        return self._load(f"vae {dtype}")

    def load_text_encoder(self, directory: Path, dtype: torch.dtype, device: torch.device) -> Component:
        return self._load(f"text {dtype}")

    def image_memory(self, vae: Component, height: int, width: int) -> int:
        return height * width

    def text_memory(self, encoder: Component, tokens: int) -> int:
        return tokens * tokens

    def text_lengths(self, encoder: Component, captions: Sequence[str]) -> list[int]:
        return [len(caption) + 1 for caption in captions]

    def _note(self, batch: Any, size: int) -> None:
        if size > self.limit:
            raise type(self.error)(*self.error.args)
        self.batches.append(batch)
        self.while_encoding()

    def encode_images(self, vae: Component, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._note(tuple(pixels_BCHW.shape), len(pixels_BCHW))
        self.pixels += list(pixels_BCHW)
        mean = torch.nn.functional.avg_pool2d(pixels_BCHW, 8)
        return mean, mean.abs() / 2

    def encode_texts(self, encoder: Component, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        self._note(list(captions), len(captions))
        letters = [torch.tensor([0.5, *map(ord, caption)]) for caption in captions]
        padded = torch.nn.utils.rnn.pad_sequence(letters, batch_first=True)[:, :, None].expand(-1, -1, 4)
        return [{"embeds": row[: len(one)], "ids": torch.arange(len(one))} for row, one in zip(padded, letters, strict=True)]


class Prepared:
    """Pictures by (key, part), in place of a prepared dataset."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.num_read = 0

    def span(self, shard: str, key: str, part: str) -> "Prepared":
        found = Prepared()
        found.read = lambda: self._read(key, part)  # type: ignore[attr-defined]
        return found

    def num_samples(self, shard: str) -> int:
        # So many that the few of a test are read by `span`.
        return 1_000_000

    def _read(self, key: str, part: str) -> bytes:
        self.num_read += 1
        return self.files[key, part]

    def add(self, key: str, pixels: np.ndarray, part: str = "image") -> ImageItem:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        self.files[key, part] = buffer.getvalue()
        form = "mask" if part == "mask" else "latents"
        return ImageItem(f"{key}-{part}", "00000", key, part, pixels.shape[1], pixels.shape[0], form=form)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    stand_in = Family()
    monkeypatch.setattr(families, "parse", lambda config: stand_in)
    return stand_in


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    dataset = Prepared()
    monkeypatch.setattr(PreparedDataset, "open", lambda directory: dataset)
    return dataset


@pytest.fixture(autouse=True)
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows when memory is given back; the garbage collector itself takes half a second a call, so it is left out."""
    calls: list[str] = []
    monkeypatch.setattr(encode, "free_memory", lambda: calls.append("freed"))
    encode._loaded.clear()
    yield calls
    encode._loaded.clear()


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., EncodeJob]:
    """A job of one kind on the CPU; settings are those of `cache`."""

    def make(kind: str = "latents", folder: str = "out", workers: int = 2, **settings: Any) -> EncodeJob:
        config = CacheConfig(**{"device": "cpu", "latents_dtype": "float32", "text_stored": "float32", **settings})
        return EncodeJob(
            kind=kind, base=ModelConfig(family="qwen-image", path="model"), model=tmp_path / "model", folder=tmp_path / folder,
            prepared=tmp_path / "prepared", config=config, workers=workers,
        )  # fmt: skip

    return make


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _pictures(prepared: Prepared, sizes: Sequence[tuple[int, int]], first: int = 0) -> tuple[ImageItem, ...]:
    return tuple(prepared.add(f"k{first + n}", _noise(*size, seed=first + n)) for n, size in enumerate(sizes))


def _texts(*captions: str) -> tuple[TextItem, ...]:
    return tuple(TextItem(f"text-{caption}", caption) for caption in captions)


def _unit(items: Sequence[Any], number: int = 0) -> Unit[Any]:
    return Unit(number=number, items=tuple(items))


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    found, damages = shards.receipts(folder, {})
    assert not damages
    return {name: tensor for one in found for name, tensor in load_file(folder / f"{one.name}.safetensors").items()}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pixels_are_scaled_to_minus_one_to_one_exactly(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    pixels = np.zeros((8, 96, 3), dtype=np.uint8)
    pixels.reshape(-1)[:256] = np.arange(256)
    pixels[7, 95] = (255, 127, 0)
    encode.encode_unit(make_job(), _unit([prepared.add("a", pixels)]))
    (seen_CHW,) = family.pixels
    assert seen_CHW.dtype == torch.float32
    assert seen_CHW[:, 7, 95].tolist() == [1.0, float(np.float32(127) / np.float32(127.5) - np.float32(1)), -1.0]
    expected = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(seen_CHW.numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_a_picture_of_any_mode_is_seen_as_rgb(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], mode: str
) -> None:
    picture = prepared.add("a", _noise(16, 24))
    image = Image.fromarray(_noise(16, 24)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    prepared.files["a", "image"] = buffer.getvalue()
    encode.encode_unit(make_job(), _unit([picture]))
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(family.pixels[0], expected)


def test_masks_are_the_mean_of_each_latent_cell(family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]) -> None:
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:8, :8] = 255
    mask[:4, 8:16] = 255
    mask[0, 16] = 128
    mask[8:, 8:16] = np.arange(64).reshape(8, 8)
    picture = prepared.add("a", mask, "mask")
    encode.encode_unit(make_job(), _unit([picture]))
    stored = _stored(make_job().folder)
    assert set(stored) == {"a-mask.mask"}
    expected = torch.tensor([[1.0, 0.5, 128 / 255 / 64], [0.0, 31.5 / 255, 0.0]])
    assert torch.allclose(stored["a-mask.mask"], expected, rtol=0, atol=1e-7)
    assert family.batches == [], "the VAE sees no masks"


def test_control_images_are_encoded_like_images(family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]) -> None:
    pixels = _noise(16, 16)
    pictures = [prepared.add("a", pixels), prepared.add("b", pixels, "control0"), prepared.add("b", pixels, "control1")]
    encode.encode_unit(make_job(), _unit(pictures))
    stored = _stored(make_job().folder)
    assert {name.split(".")[1] for name in stored} == {"mean", "std"}
    for name in ("mean", "std"):
        assert torch.equal(stored[f"a-image.{name}"], stored[f"b-control0.{name}"])
        assert torch.equal(stored[f"a-image.{name}"], stored[f"b-control1.{name}"])
    assert family.batches == [(3, 3, 16, 16)]


def test_items_are_stored_in_the_order_of_their_unit(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    sizes = [(16, 16), (8, 16), (16, 16), (16, 8), (8, 16)]
    pictures = [*_pictures(prepared, sizes), prepared.add("m", _noise(16, 16)[..., 0], "mask")]
    pictures.insert(2, pictures.pop())
    done = encode.encode_unit(make_job(), _unit(pictures, number=7))
    (receipt,), _ = shards.receipts(make_job().folder, {})
    assert receipt.items["id"].to_pylist() == [picture.id for picture in pictures]
    assert receipt.name == shards.name_of(picture.id for picture in pictures)
    assert (done.unit, done.num_items, done.num_bytes) == (7, 6, receipt.bytes)
    assert done.peak_memory_bytes > 1 << 20


def test_pictures_of_one_size_go_together_as_many_as_memory_allows(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    pictures = _pictures(prepared, [(64, 64), (32, 64), (64, 32)] * 5)
    job = make_job(memory_gib=(2 * 64 * 64 + 1) / GIB)
    encode.encode_unit(job, _unit(pictures))
    assert sorted(family.batches) == sorted(
        [(2, 3, 64, 64)] * 2 + [(1, 3, 64, 64)] + [(4, 3, 32, 64), (1, 3, 32, 64), (4, 3, 64, 32), (1, 3, 64, 32)]
    )


def test_a_picture_larger_than_the_memory_is_tried_alone(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    encode.encode_unit(make_job(memory_gib=1 / GIB), _unit(_pictures(prepared, [(16, 16)] * 3)))
    assert family.batches == [(1, 3, 16, 16)] * 3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_image_batch_is_taken_instead_of_the_memory(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], size: int
) -> None:
    encode.encode_unit(make_job(memory_gib=1 / GIB, image_batch=size), _unit(_pictures(prepared, [(16, 16)] * 5)))
    assert [batch[0] for batch in family.batches] == [size] * (5 // size) + ([5 % size] if 5 % size else [])


def test_no_batch_grows_without_bound(family: Family, make_job: Callable[..., EncodeJob]) -> None:
    encode.encode_unit(make_job("texts", memory_gib=1000), _unit(_texts(*(f"{n:03}" for n in range(600)))))
    assert [len(batch) for batch in family.batches] == [256, 256, 88]


def test_captions_of_like_length_go_together_as_many_as_memory_allows(
    family: Family, make_job: Callable[..., EncodeJob]
) -> None:
    captions = [letter * length for length in (9, 1, 4, 19) for letter in "abcdefgh"]
    encode.encode_unit(make_job("texts", memory_gib=200 / GIB), _unit(_texts(*captions)))
    lengths = [[len(caption) + 1 for caption in batch] for batch in family.batches]
    assert [length for batch in lengths for length in batch] == sorted(len(caption) + 1 for caption in captions)
    assert all(len(batch) == 1 or len(batch) * max(batch) ** 2 <= 200 for batch in lengths)
    assert [len(batch) for batch in lengths] == [8, 8, 2, 2, 2, 2, *[1] * 8]


@pytest.mark.parametrize("size", [1, 3])
def test_text_batch_is_taken_instead_of_the_memory(family: Family, make_job: Callable[..., EncodeJob], size: int) -> None:
    encode.encode_unit(make_job("texts", memory_gib=1 / GIB, text_batch=size), _unit(_texts("a", "bb", "ccc", "dddd")))
    assert [len(batch) for batch in family.batches] == ([1] * 4 if size == 1 else [3, 1])


@pytest.mark.parametrize("workers", [1, 4])
def test_a_unit_has_the_same_batches_and_bytes_whoever_encodes_it(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], workers: int
) -> None:
    job = make_job(image_batch=3)
    units = [_unit(_pictures(prepared, [(16, 16), (8, 16)] * 4, first=8 * number), number) for number in range(4)]
    for unit in units:
        encode.encode_unit(job, unit)
    each = family.batches.copy()
    family.batches.clear()
    together = replace(make_job(image_batch=3, folder="together"), workers=workers)
    done = list(encode.encode_units(together, units, lambda *_: None))
    assert family.batches == each
    assert [one.unit for one in done] == [0, 1, 2, 3]
    assert _bytes(together.folder) == _bytes(job.folder)
    alone = make_job(image_batch=3, folder="alone")
    encode.encode_unit(alone, units[2])
    assert _bytes(alone.folder).items() <= _bytes(job.folder).items()


def test_texts_of_a_unit_are_the_same_bytes_whatever_is_encoded_beside(
    family: Family, make_job: Callable[..., EncodeJob]
) -> None:
    units = [_unit(_texts(*(f"{number}{'x' * n}" for n in range(7, 0, -1))), number) for number in range(3)]
    job, alone = make_job("texts", text_batch=3), make_job("texts", folder="alone", text_batch=3)
    list(encode.encode_units(job, units, lambda *_: None))
    encode.encode_unit(alone, units[1])
    assert _bytes(alone.folder).items() <= _bytes(job.folder).items()


def test_progress_counts_every_item(family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]) -> None:
    counted: list[int] = []
    units = [_unit(_pictures(prepared, [(16, 16)] * 5, first=5 * number), number) for number in range(2)]
    list(encode.encode_units(make_job(image_batch=2), units, lambda count, note: counted.append(count)))
    assert counted == [2, 2, 1, 2, 2, 1]


def test_stored_precision_is_of_floats_alone(family: Family, make_job: Callable[..., EncodeJob]) -> None:
    job = make_job("texts", text_stored="float16")
    encode.encode_unit(job, _unit(_texts("ab")))
    stored = _stored(job.folder)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "text-ab.embeds": torch.float16, "text-ab.ids": torch.int64,
    }  # fmt: skip
    assert stored["text-ab.embeds"][:, 0].tolist() == [0.5, ord("a"), ord("b")]


def test_a_text_is_stored_without_the_padding_of_its_batch(family: Family, make_job: Callable[..., EncodeJob]) -> None:
    job = make_job("texts")
    done = encode.encode_unit(job, _unit([*_texts("a"), TextItem("long", "b" * 5000)]))
    assert _stored(job.folder)["text-a.embeds"].shape == (2, 4)
    assert done.num_bytes < (5001 + 2) * (4 * 4 + 8) + 1000


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_out_of_memory_halves_the_batch_and_encodes_everything(
    family: Family,
    prepared: Prepared,
    make_job: Callable[..., EncodeJob],
    error: Exception,
    caplog: pytest.LogCaptureFixture,
    freed: list[str],
) -> None:
    pictures = _pictures(prepared, [(16, 16)] * 21)
    encode.encode_unit(make_job(folder="whole", image_batch=8), _unit(pictures))
    family.batches.clear()
    freed.clear()
    family.limit, family.error = 3, error
    with caplog.at_level(logging.WARNING, "ftk"):
        encode.encode_unit(make_job(folder="halved", image_batch=8), _unit(pictures))
    assert [batch[0] for batch in family.batches] == [2] * 8 + [2, 2, 1]
    assert len(freed) == 1 + 2, "once to load, and before each new try"
    assert _bytes(make_job(folder="halved").folder) == _bytes(make_job(folder="whole").folder)
    assert [record.getMessage() for record in caplog.records] == [
        "cpu is out of memory with 8 x image of 16x16 px: going on with 4 at a time",
        "cpu is out of memory with 4 x image of 16x16 px: going on with 2 at a time",
    ]


def test_pictures_of_another_size_are_not_halved_with_those(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = family._note
    monkeypatch.setattr(family, "_note", lambda batch, size: note(batch, size if batch[2:] == (32, 32) else 1))
    family.limit = 2
    encode.encode_unit(make_job(image_batch=4), _unit(_pictures(prepared, [(32, 32)] * 8 + [(16, 16)] * 8)))
    assert family.batches == [(2, 3, 32, 32)] * 4 + [(4, 3, 16, 16)] * 2


def test_captions_are_halved_too(family: Family, make_job: Callable[..., EncodeJob], caplog: pytest.LogCaptureFixture) -> None:
    units = [_unit(_texts(*(f"{number}{'x' * n}" for n in range(9))), number) for number in range(2)]
    list(encode.encode_units(make_job("texts", folder="whole"), units, lambda *_: None))
    family.batches.clear()
    family.limit = 4
    counted: list[int] = []
    with caplog.at_level(logging.WARNING, "ftk"):
        list(encode.encode_units(make_job("texts", folder="halved"), units, lambda count, _: counted.append(count)))
    assert [len(batch) for batch in family.batches] == [4, 4, 1] * 2
    assert sum(counted) == 18
    assert _bytes(make_job(folder="halved").folder) == _bytes(make_job(folder="whole").folder)
    assert [record.getMessage() for record in caplog.records] == [
        "cpu is out of memory with 9 x caption: going on with 4 at a time"
    ]


def test_an_image_that_does_not_fit_alone_is_a_fault_with_advice(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    units = [_unit(_pictures(prepared, [(16, 16)] * 2), 0), _unit(_pictures(prepared, [(16, 32)] * 2, first=2), 1)]
    job = make_job()
    encode.encode_unit(job, units[0])
    family.limit = 0
    with pytest.raises(EnvironmentFault) as caught:
        list(encode.encode_units(job, units[1:], lambda *_: None))
    text = str(caught.value)
    assert text.startswith("cpu is out of memory encoding one image of 32x16 px: out of memory: tried to allocate 7 GiB. ")
    assert "more lines" not in text
    for advice in ("cache.vae_dtype", "bfloat16", "cache.device to cpu", "Finished shards are kept"):
        assert advice in text
    assert len(shards.receipts(job.folder, {})[0]) == 1


def test_a_caption_that_does_not_fit_alone_is_a_fault(family: Family, make_job: Callable[..., EncodeJob]) -> None:
    family.limit = 0
    with pytest.raises(EnvironmentFault, match=r"encoding one caption: .*cache\.text_dtype"):
        encode.encode_unit(make_job("texts"), _unit(_texts("a")))


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_another_error_of_the_model_goes_through(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], kind: str
) -> None:
    family.limit, family.error = 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    items = _pictures(prepared, [(16, 16)] * 4) if kind == "latents" else _texts("a", "b")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
        encode.encode_unit(make_job(kind), _unit(items))
    assert not make_job(kind).folder.exists()


@pytest.mark.parametrize(("place", "value"), [("mean", math.nan), ("mean", 1e6), ("std", math.inf), ("std", -math.inf)])
def test_an_image_whose_latents_are_no_numbers_is_refused_by_its_key(
    family: Family,
    prepared: Prepared,
    make_job: Callable[..., EncodeJob],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    value: float,
) -> None:
    encoded = family.encode_images

    def overflowing(vae: Component, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = encoded(vae, pixels_BCHW)
        (mean if place == "mean" else std)[1, 0, 0, 0] = value
        return mean, std

    monkeypatch.setattr(family, "encode_images", overflowing)
    job = make_job(latents_dtype="float16")
    with pytest.raises(CacheError, match=r"float16 cannot hold.*for sample k1\. Set cache\.latents_dtype: float32"):
        encode.encode_unit(job, _unit(_pictures(prepared, [(16, 16)] * 3)))
    assert not job.folder.exists()


def test_a_caption_whose_embedding_is_no_number_is_refused_by_its_text(
    family: Family, make_job: Callable[..., EncodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = family.encode_texts

    def overflowing(encoder: Component, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        items = [{name: tensor.clone() for name, tensor in item.items()} for item in encoded(encoder, captions)]
        items[captions.index("a red fox")]["embeds"][2, 1] = 70000.0
        return items

    monkeypatch.setattr(family, "encode_texts", overflowing)
    with pytest.raises(CacheError, match=r"for caption 'a red fox'\. Set cache\.text_stored: float32"):
        encode.encode_unit(make_job("texts", text_stored="float16"), _unit(_texts("a", "a red fox", "b")))
    encode.encode_unit(make_job("texts", text_stored="float32"), _unit(_texts("a", "a red fox", "b")))


def test_a_refused_item_stops_the_run_and_keeps_the_shards_before(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = family.encode_images
    monkeypatch.setattr(
        family,
        "encode_images",
        lambda vae, pixels: tuple(t * (math.nan if len(family.batches) > 1 else 1) for t in encoded(vae, pixels)),
    )
    units = [_unit(_pictures(prepared, [(16, 16)], first=number), number) for number in range(9)]
    with pytest.raises(CacheError, match="sample k1"):
        list(encode.encode_units(make_job(), units, lambda *_: None))
    found, damages = shards.receipts(make_job().folder, {})
    assert ([one.name for one in found], damages) == ([shards.name_of(["k0-image"])], [])
    assert len(family.batches) < 9


def test_a_component_is_loaded_once_for_all_units_and_freed_for_the_next(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    texts, latents = make_job("texts", text_dtype="bfloat16"), make_job("latents", vae_dtype="float32")
    for n in range(3):
        encode.encode_unit(texts, _unit(_texts(str(n))))
    assert family.loaded == ["text torch.bfloat16"]
    for n in range(3):
        encode.encode_unit(latents, _unit(_pictures(prepared, [(16, 16)], first=n)))
    assert family.loaded == ["text torch.bfloat16", "vae torch.float32"]
    assert [one() is None for one in family.living] == [True, False]
    encode.release()
    assert [one() is None for one in family.living] == [True, True]


def test_a_component_can_be_loaded_ahead(family: Family, make_job: Callable[..., EncodeJob]) -> None:
    job = make_job("texts")
    encode.load(job)
    assert family.loaded == ["text torch.bfloat16"]
    encode.encode_unit(job, _unit(_texts("a")))
    assert len(family.loaded) == 1


def test_a_failed_unit_does_not_keep_the_component_from_being_freed(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]
) -> None:
    family.limit = 0
    with pytest.raises(EnvironmentFault):
        encode.encode_unit(make_job(), _unit(_pictures(prepared, [(16, 16)])))
    encode.release()
    gc.collect()  # what the error refers to
    assert [one() for one in family.living] == [None]


def test_decoding_runs_ahead_within_bounds(family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob]) -> None:
    workers, size, count = 2, 3, 90
    ahead: list[int] = []

    def wait_for_decoders() -> None:
        consumed = size * len(family.batches)
        wanted = min(count, consumed + workers)
        end = time.monotonic() + 5
        while prepared.num_read < wanted and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.005)
        ahead.append(prepared.num_read - consumed)

    family.while_encoding = wait_for_decoders
    encode.encode_unit(make_job(image_batch=size, workers=workers), _unit(_pictures(prepared, [(16, 16)] * count)))
    assert prepared.num_read == count
    assert min(ahead[: -(workers + 3 * size)]) >= workers
    assert max(ahead) <= workers + encode._BATCHES_AHEAD * size + 1


def test_one_unit_is_encoded_while_a_shard_is_written_and_no_more(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, ahead = shards.write, []

    def slow(folder: Path, items: Any) -> Any:
        end = time.monotonic() + 5
        while len(family.batches) < min(5, len(ahead) + 2) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        ahead.append(len(family.batches) - len(ahead))
        return write(folder, items)

    monkeypatch.setattr(shards, "write", slow)
    units = [_unit(_pictures(prepared, [(16, 16)], first=number), number) for number in range(5)]
    done = list(encode.encode_units(make_job(), units, lambda *_: None))
    assert [one.unit for one in done] == [0, 1, 2, 3, 4]
    # The shard itself is counted too.
    assert ahead[0] == 2
    assert max(ahead) <= 3


def test_an_error_in_writing_is_raised(
    family: Family, prepared: Prepared, make_job: Callable[..., EncodeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(OSError, match="No space left"):
        encode.encode_unit(make_job(), _unit(_pictures(prepared, [(16, 16)])))


@pytest.mark.parametrize(("settings", "gib"), [({}, 1.0), ({"memory_gib": 0.25}, 0.25)])
def test_a_cpu_works_in_a_gibibyte_unless_told(
    make_job: Callable[..., EncodeJob], settings: dict[str, Any], gib: float
) -> None:
    assert make_job(**settings).memory_bytes == gib * GIB


def _rows(count: int) -> list[SampleRow]:
    return [
        SampleRow(
            key=f"k{n}", source="s", content_sha256="", image_id=f"k{n}-image", width=32, height=48, bucket_width=32,
            bucket_height=48, resize_width=32, resize_height=48, crop_x=0, crop_y=0, flipped=False, copied=False,
            perceptual_hash="", captions=["a"], repeats=1, role="instance", num_controls=0, control_ids=[], has_mask=False,
            mask_id="", shard="00000",
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def real(
    written_dataset: Callable[..., PreparedDataset], tiny_model: Path, make_job: Callable[..., EncodeJob], tmp_path: Path
) -> EncodeJob:
    """A job on a prepared dataset of five images of one colour, with the tiny model."""
    written_dataset(tmp_path / "prepared", [_rows(5)])
    return replace(make_job(latents_dtype="float16"), model=tiny_model)


REAL = tuple(ImageItem(f"k{n}-image", "00000", f"k{n}", "image", 32, 48) for n in range(5))


def test_the_stored_latents_are_the_familys_of_the_prepared_pixels(real: EncodeJob) -> None:
    encode.encode_unit(real, _unit(REAL))
    stored = _stored(real.folder)
    family = families.get("qwen-image")
    vae = family.load_vae(real.model, torch.float32, torch.device("cpu"))
    dataset = PreparedDataset.open(real.prepared)
    rows = dataset.rows()
    images = [np.array(Image.open(io.BytesIO(dataset.image_bytes(row)))) for row in rows]
    assert len({image.tobytes() for image in images}) == 5
    pixels_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = family.encode_images(vae, pixels_BCHW)
    for n, row in enumerate(rows):
        assert torch.equal(stored[f"{row.image_id}.mean"], mean[n].half())
        assert torch.equal(stored[f"{row.image_id}.std"], std[n].half())


def test_halved_batches_of_a_model_differ_by_rounding_at_most(real: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halved = (replace(real, folder=real.folder / name) for name in ("whole", "halved"))
    texts = _texts("a photo of a red fox", "", "größe 猫", "a dog")
    captions = [
        replace(job, kind="texts", folder=job.folder / "texts", config=CacheConfig(device="cpu", text_dtype="float32"))
        for job in (whole, halved)
    ]
    encode.encode_unit(whole, _unit(REAL))
    encode.encode_unit(captions[0], _unit(texts))
    kind = type(families.get("qwen-image"))
    for name in ("encode_images", "encode_texts"):
        encoded = getattr(kind, name)

        def limited(self: Any, component: Any, batch: Any, encoded: Any = encoded) -> Any:
            if len(batch) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return encoded(self, component, batch)

        monkeypatch.setattr(kind, name, limited)
    encode.encode_unit(halved, _unit(REAL))
    encode.encode_unit(captions[1], _unit(texts))
    for one, other in ((whole.folder, halved.folder), (captions[0].folder, captions[1].folder)):
        expected, found = _stored(one), _stored(other)
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.allclose(expected[name].float(), found[name].float(), rtol=2e-3, atol=2e-3)


def test_a_damaged_prepared_shard_is_refused(real: EncodeJob) -> None:
    path = real.prepared / "shards" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"00000\.tar is damaged"):
        encode.encode_unit(real, _unit(REAL))
    assert not real.folder.exists()


def test_a_job_on_a_cpu_limits_the_kernels_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in devices._KERNELS_KEPT:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    assert encode.encoding_device("cpu").type == "cpu"
    assert all(os.environ[variable] == str(kernels) for variable, kernels in devices._KERNELS_KEPT.items())
