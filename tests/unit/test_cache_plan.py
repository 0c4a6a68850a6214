"""What is to be encoded: everything once, cut in the same places by whoever plans, less what is there."""

import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from ftk.cache import plan, prompts
from ftk.cache.plan import ImageItem, TextItem
from ftk.configs.schema import RunConfig
from ftk.contracts import SampleRow
from ftk.methods.base import CacheNeeds
from ftk.models import base as families
from ftk.models.components.geometry import LatentGeometry
from ftk.pipeline import dataset
from ftk.pipeline.engine import JobPart
from ftk.run import resolve

GEOMETRY = LatentGeometry(channels=16, factor=8, patch=2)

Sized = list[tuple[TextItem, int]]


def _row(key: str, **changes: object) -> SampleRow:
    row = SampleRow(
        key=key, source="photos", content_sha256="", image_id=f"{key}-image", width=100, height=100, bucket_width=64,
        bucket_height=32, resize_width=64, resize_height=64, crop_x=0, crop_y=0, flipped=False, copied=False,
        perceptual_hash="", captions=[key], repeats=1, role="instance", num_controls=0, control_ids=[], has_mask=False,
        mask_id="", shard="00000",
    )  # fmt: skip
    return replace(row, **changes)  # type: ignore[arg-type]


def _pictures(*tables: list[SampleRow]) -> list[ImageItem]:
    return list(plan.needed_pictures([dataset.sample_table(rows) for rows in tables], CacheNeeds()))


def _captions(*samples: list[str]) -> pa.ChunkedArray:
    half = len(samples) // 2
    return pa.chunked_array([samples[:half], samples[half:]], pa.list_(pa.string()))


def _texts(captions: pa.ChunkedArray, **settings: object) -> list[TextItem]:
    tree = {"run": "test", "model": {"family": "qwen-image", "path": "unused"}, "data": {"sources": [{"path": "unused"}]}}
    run = resolve(RunConfig.model_validate({**tree, "sample": settings}))
    model = Path("unused")
    return list(plan.needed_texts(captions, prompts.of(run, model).texts.values(), run.dropped_text(model)))


def _sized(count: int, seed: int = 0) -> tuple[list[TextItem], dict[str, int]]:
    draw = random.Random(seed)
    return [TextItem(f"t{n}", str(n)) for n in range(count)], {f"t{n}": draw.randint(1, 60) for n in range(count)}


def _units(
    items: list[TextItem], sizes: dict[str, int], there: set[str] | None = None, limit: int = 100
) -> dict[int, list[str]]:
    made = plan.units(items, lambda item: sizes[item.id], limit, there or set())
    return {unit.number: [item.id for item in unit.items] for unit in made}


def test_units_hold_everything_in_order_up_to_their_size() -> None:
    items, sizes = _sized(200)
    units = _units(items, sizes)
    assert list(units) == list(range(len(units)))
    assert [item for ids in units.values() for item in ids] == [item.id for item in items]
    totals = [sum(sizes[item] for item in ids) for ids in units.values()]
    assert max(totals) <= 100
    for number, ids in list(units.items())[:-1]:
        assert sum(sizes[item] for item in ids) + sizes[units[number + 1][0]] > 100


def test_an_item_that_just_fits_is_taken_and_one_larger_than_a_shard_is_alone() -> None:
    items, _ = _sized(5)
    assert _units(items, {"t0": 40, "t1": 60, "t2": 250, "t3": 1, "t4": 100}) == {
        0: ["t0", "t1"], 1: ["t2"], 2: ["t3"], 3: ["t4"],
    }  # fmt: skip


def test_nothing_needed_is_no_unit() -> None:
    assert _units([], {}) == {}


@pytest.mark.parametrize("seed", range(5))
def test_a_unit_lacks_just_what_is_missing_and_is_cut_where_it_always_was(seed: int) -> None:
    items, sizes = _sized(150, seed)
    whole = _units(items, sizes)
    draw = random.Random(seed)
    there = {item.id for item in items if draw.random() < 0.7} | {"of no one"}
    expected = {number: [item for item in ids if item not in there] for number, ids in whole.items()}
    assert _units(items, sizes, there) == {number: ids for number, ids in expected.items() if ids}
    assert _units(items, sizes, {item.id for item in items}) == {}


@pytest.mark.parametrize("more", [1, 2, 50])
def test_units_of_fewer_items_are_those_of_more_but_for_the_last(more: int) -> None:
    items, sizes = _sized(150)
    fewer, all_of_them = _units(items[:-more], sizes), _units(items, sizes)
    *begun, last = fewer
    assert {number: fewer[number] for number in begun} == {number: all_of_them[number] for number in begun}
    assert all_of_them[last][: len(fewer[last])] == fewer[last]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_share_all_units_among_them(count: int) -> None:
    numbers = list(_units(*_sized(150)))
    shares = [[number for number in numbers if JobPart(index=index, count=count).has(number)] for index in range(count)]
    assert sorted(number for share in shares for number in share) == numbers
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_pictures_are_image_controls_and_mask_of_each_sample() -> None:
    rows = [
        _row("a", num_controls=2, control_ids=["c0", "c1"], has_mask=True, mask_id="m", shard="00001"),
        _row("b", bucket_width=96, bucket_height=128),
    ]
    assert _pictures(rows) == [
        ImageItem("a-image", "00001", "a", "image", 64, 32),
        ImageItem("c0", "00001", "a", "control0", 64, 32),
        ImageItem("c1", "00001", "a", "control1", 64, 32),
        ImageItem("m", "00001", "a", "mask", 64, 32, form="mask"),
        ImageItem("b-image", "00000", "b", "image", 96, 128),
    ]
    assert [picture.is_mask for picture in _pictures(rows)] == [False, False, False, True, False]


def test_equal_pixels_are_encoded_once_where_they_come_first() -> None:
    rows = [
        _row("a", num_controls=1, control_ids=["b-image"], has_mask=True, mask_id="m"),
        _row("b", has_mask=True, mask_id="m", num_controls=2, control_ids=["x", "x"]),
        _row("c", image_id="a-image"),
    ]
    found = _pictures(rows[:1], rows[1:], rows)
    assert [(picture.id, picture.key, picture.part) for picture in found] == [
        ("a-image", "a", "image"),
        ("b-image", "a", "control0"),
        ("m", "a", "mask"),
        ("x", "b", "control0"),
    ]


def test_a_mask_id_without_a_mask_needs_nothing() -> None:
    assert [picture.id for picture in _pictures([_row("a", mask_id="stale")])] == ["a-image"]


def test_texts_are_distinct_captions_in_order_then_what_dropped_ones_train() -> None:
    texts = _texts(_captions(["b", "a"], ["a", "c"], [], ["b"], ["d"]))
    assert [text.caption for text in texts] == ["b", "a", "c", "d", " "]
    assert [text.id for text in texts] == [plan.text_id(text.caption) for text in texts]


def test_a_caption_that_dropped_ones_train_too_is_one_text() -> None:
    assert [text.caption for text in _texts(_captions(["a"], [" "], ["b"]))] == ["a", " ", "b"]


def test_prompts_come_last_and_once_with_their_negative() -> None:
    texts = _texts(_captions(["a"], ["b"]), prompts=["fox", "a", "fox"], negative_prompt="blurred")
    assert [text.caption for text in texts] == ["a", "b", " ", "fox", "blurred"]


def test_without_prompts_there_is_nothing_to_be_negative_about() -> None:
    assert [text.caption for text in _texts(_captions(["a"], ["b"]), negative_prompt="blurred")] == ["a", "b", " "]


def test_dropped_captions_and_pictures_without_a_negative_prompt_share_a_text() -> None:
    assert [text.caption for text in _texts(_captions(["a"], ["b"]), prompts=["fox"])] == ["a", "b", " ", "fox"]


def test_the_id_of_a_text_is_of_its_content_alone() -> None:
    captions = ["a", "A", "a ", " a", "", "é", "e\u0301", "猫", "\udcff"]
    assert len({plan.text_id(caption) for caption in captions}) == len(captions)
    assert plan.text_id("a") == plan.text_id("a")
    assert all(len(plan.text_id(caption)) == 32 for caption in captions)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bytes_of_a_picture_are_those_that_the_encoder_gives(tiny_model: Path, dtype: str) -> None:
    family = families.get("qwen-image")
    vae = family.load_vae(tiny_model, torch.float32, torch.device("cpu"))
    width, height, kind = 48, 32, getattr(torch, dtype)
    mean, std = family.encode_images(vae, torch.zeros(1, 3, height, width))
    image, mask = (ImageItem("p", "00000", "k", "image", width, height, form=form) for form in ("latents", "mask"))
    num_bytes = mean[0].to(kind).nbytes + std[0].to(kind).nbytes
    assert plan.picture_bytes(image, family.geometry, kind.itemsize) == num_bytes
    assert plan.picture_bytes(mask, family.geometry, kind.itemsize) == mean[0, 0].to(kind).nbytes


def test_the_guess_at_a_text_grows_with_its_bytes() -> None:
    sizes = [plan.text_bytes(TextItem("t", caption), 100) for caption in ("", "a" * 40, "猫" * 40, "\udcff" * 40)]
    assert sizes == [800, 1800, 3800, 1800]


def test_a_size_is_asked_for_once_an_item_or_little_more() -> None:
    asked = 0

    def size(_: TextItem) -> int:
        nonlocal asked
        asked += 1
        return 10

    items, _ = _sized(100)
    assert len(list(plan.units(items, size, 100, set()))) == 10
    assert asked <= 2 * len(items)


def test_what_is_held_of_a_picture_until_it_is_encoded_is_small() -> None:
    rows = [_row(f"{number:06}-{number:012x}", image_id=f"{number:032x}", captions=[]) for number in range(3000)]
    table = dataset.sample_table(rows)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    pictures = list(plan.needed_pictures([table], CacheNeeds()))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({id(picture.shard) for picture in pictures}) == 1
    # Its id of 81 bytes, its key of 68, the item that names them, and a place in the list.
    assert (after - before) / len(pictures) < 300
