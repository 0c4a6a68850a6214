"""The numbers and the page of a cache, from shards and tables written by hand."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ftk.cache import cache_page, cache_summary, gc, shards, view
from ftk.cache.store import CacheStore
from ftk.cli import inspect as command
from ftk.contracts import SampleRow
from ftk.errors import CacheError, ConfigError, DatasetError, ModelError

HOSTILE = '<script>document.title = "ran"</script>'
EMPTY = "e" * 32

Tensors = Mapping[str, torch.Tensor]


def item(number: int) -> str:
    return f"{number:032x}"


def latents(mean: Any, std: Any = 0.5, dtype: torch.dtype = torch.float32) -> Tensors:
    """An item whose mean is given as nested lists [C,h,w] and whose std is the same everywhere."""
    mean = torch.tensor(mean, dtype=dtype)
    return {"mean": mean, "std": torch.full_like(mean, std)}


def text(length: int) -> Tensors:
    return {"embeds": torch.zeros(length, 4)}


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A square sample with one caption of its own number in tokens, whose items have that number as their id."""
    plain = {
        "key": f"k{number}", "latents": item(number), "controls": [], "mask": "", "texts": [item(number)],
        "text_lengths": [number], "width": 64, "height": 64, "bucket_width": 64, "bucket_height": 64, "resize_width": 64,
        "resize_height": 64, "crop_x": 0, "crop_y": 0, "flipped": False, "repeats": 1, "role": "instance",
    }  # fmt: skip
    return {**plain, **changes}


def built(
    directory: Path,
    samples: Sequence[dict[str, Any]],
    latent_shards: Sequence[Mapping[str, Tensors]] | None = None,
    texts: Mapping[str, Tensors] | None = None,
    **facts: Any,
) -> CacheStore:
    """A sealed cache; by default with an item of zeros for each image, and a text of each length, in one shard a kind."""
    if latent_shards is None:
        latent_shards = [{one["latents"]: latents([[[0.0]]]) for one in samples}]
    if texts is None:
        named = {name: text(tokens) for one in samples for name, tokens in zip(one["texts"], one["text_lengths"], strict=True)}
        texts = {**named, EMPTY: text(1)}
    receipts = {
        ("latents", "aaaa"): [shards.write(directory / "latents" / "aaaa", list(one.items())) for one in latent_shards],
        ("texts", "bbbb"): [shards.write(directory / "texts" / "bbbb", list(texts.items()))],
    }
    tables = {**view.merged(receipts), "samples": pa.Table.from_pylist(list(samples), schema=view.SAMPLE_SCHEMA)}
    plain = {
        "family": "qwen-image", "latents_fingerprint": "aaaa", "texts_fingerprint": "bbbb",
        "encoders": {"latents": {"dtype": "float32"}, "texts": {"dtype": "bfloat16", "max_text_tokens": 8}},
        "normalisation": {}, "prepared_fingerprint": "abc", "prepared_recipe": {}, "empty_text": EMPTY, "prompts": {},
    }  # fmt: skip
    view.commit(directory, tables, {**plain, **facts})
    return CacheStore.open(directory)


def html(store: CacheStore, **options: Any) -> str:
    return cache_page.page(store, **options)[1].decode()


def prepared_row(key: str, **changes: Any) -> SampleRow:
    row = SampleRow(
        key=key, source="dogs", content_sha256="0" * 64, image_id=key, width=64, height=64, bucket_width=64, bucket_height=64,
        resize_width=64, resize_height=64, crop_x=0, crop_y=0, flipped=False, copied=False, perceptual_hash="0" * 16,
        captions=["a dog"], repeats=1, role="instance", num_controls=0, control_ids=[], has_mask=False, mask_id="", shard="",
    )  # fmt: skip
    return replace(row, **changes)


@pytest.fixture
def workspace(tmp_path: Path, written_dataset: Callable[..., Any]) -> Path:
    """A prepared dataset and a cache, of one sample each."""
    written_dataset(tmp_path / "prepared", [[prepared_row("k1")]])
    built(tmp_path / "cache", [sample(1)])
    return tmp_path


def test_items_that_samples_share_are_counted_once(tmp_path):
    samples = [
        sample(1, controls=[item(7), item(8)], mask=item(9), texts=[item(1), item(2)], text_lengths=[1, 2]),
        sample(2, controls=[item(7)], mask=item(9), latents=item(1)),
        sample(3),
    ]
    held = {**{item(number): latents([[[0.0]]]) for number in (1, 3, 7, 8)}, item(9): {"mask": torch.zeros(1, 1)}}
    summary = cache_summary.summarise(built(tmp_path, samples, [held]))
    assert (summary.num_samples, summary.num_images, summary.num_controls, summary.num_masks) == (3, 2, 2, 1)
    assert (summary.num_texts, summary.text_lengths.num_captions) == (3, 4)
    assert summary.latents.num_read == 4
    assert [one.num_unnamed for one in summary.storage] == [0, 0]
    assert (summary.directory, summary.family, summary.prepared_fingerprint) == (str(tmp_path), "qwen-image", "abc")


def test_storage_is_what_lies_on_disk_and_what_of_it_is_garbage(tmp_path):
    held = [{item(1): latents([[[1.0]]]), item(5): latents([[[2.0, 3.0]]])}, {item(6): latents([[[4.0]]])}]
    built(tmp_path, [sample(1)], held)
    for name in ("latents/aaaa/x.damaged", "latents/old/y.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * 1000)
    latents_on_disk, texts_on_disk = cache_summary.summarise(CacheStore.open(tmp_path)).storage
    assert (latents_on_disk.kind, latents_on_disk.num_items, latents_on_disk.num_shards) == ("latents", 3, 2)
    assert latents_on_disk.num_bytes == sum(path.stat().st_size for path in (tmp_path / "latents").rglob("*.*"))
    # Mean and std in fp32: two values of each in the one item, one in the other.
    assert (latents_on_disk.num_unnamed, latents_on_disk.unnamed_bytes, latents_on_disk.unlisted_bytes) == (2, 24, 2000)
    assert latents_on_disk.garbage_bytes == 2024
    assert (texts_on_disk.num_items, texts_on_disk.num_unnamed, texts_on_disk.garbage_bytes) == (2, 0, 0)
    assert gc.run(tmp_path, remove=False).num_bytes == 2024


def test_prompts_are_no_garbage(tmp_path):
    texts = {item(1): text(1), item(2): text(1), item(3): text(1), EMPTY: text(1)}
    summary = cache_summary.summarise(built(tmp_path, [sample(1)], texts=texts, prompts={"a cat": item(2)}))
    assert summary.storage[1].num_unnamed == 1
    assert (summary.prompts, summary.num_texts) == (["a cat"], 1)


def test_buckets_go_from_tall_to_wide_with_their_share(tmp_path):
    wide, tall = {"bucket_width": 96, "bucket_height": 48}, {"bucket_width": 48, "bucket_height": 96}
    samples = [sample(1, **wide), sample(2, **tall), sample(3, **wide), sample(4, **wide)]
    found = cache_summary.summarise(built(tmp_path, samples)).buckets
    assert [(one.width, one.height, one.num_samples, one.share) for one in found] == [(48, 96, 1, 0.25), (96, 48, 3, 0.75)]


def test_text_lengths_are_of_every_caption_of_every_sample(tmp_path):
    samples = [sample(2, texts=[item(2), item(8)], text_lengths=[2, 8]), sample(4), sample(5), sample(8)]
    lengths = cache_summary.summarise(built(tmp_path, samples)).text_lengths
    assert (lengths.num_captions, lengths.least, lengths.median, lengths.most) == (5, 2, 5, 8)
    assert lengths.percentile_95 == pytest.approx(8)
    assert (lengths.limit, lengths.num_at_limit) == (8, 2)
    assert [(low, number) for low, _, number in lengths.histogram if number] == [(2, 1), (4, 1), (5, 1), (8, 2)]


@pytest.mark.parametrize(("family", "limit", "cut"), [("qwen-image", 1024, 1), ("of-the-future", None, 0)])
def test_a_limit_that_was_not_recorded_is_the_familys(tmp_path, family, limit, cut):
    store = built(tmp_path, [sample(2), sample(1024)], family=family, encoders={})
    lengths = cache_summary.summarise(store).text_lengths
    assert (lengths.limit, lengths.num_at_limit) == (limit, cut)


def test_moments_of_each_channel_and_of_all(tmp_path):
    first = latents([[[1.0, 3.0]], [[-2.0, -2.0]]], std=0.25)
    second = latents([[[5.0], [7.0]], [[-2.0], [6.0]]], std=0.75)  # another bucket
    found = cache_summary.summarise(built(tmp_path, [sample(1), sample(2)], [{item(1): first, item(2): second}])).latents
    assert [(one.mean, one.posterior_std) for one in found.channels] == [(4, 0.5), (0, 0.5)]
    # 1 3 5 7 about 4: squares 9 1 1 9; -2 -2 -2 6 about 0: squares 4 4 4 36.
    assert [one.std for one in found.channels] == pytest.approx([math.sqrt(5), math.sqrt(12)])
    # All eight about 2: squares 1 1 9 25 16 16 16 16.
    assert (found.mean, found.std, found.posterior_std) == (2, pytest.approx(math.sqrt(12.5)), 0.5)
    assert (found.largest, found.non_finite_share, found.dtype, found.num_read) == (7, 0, "float32", 2)
    assert not found.is_normalised


def test_latents_near_zero_and_one_are_normalised(tmp_path):
    for number, (centre, spread, verdict) in enumerate([(0, 1, True), (0.3, 0.6, True), (0, 0.3, False), (0.8, 1, False)]):
        held = {item(1): latents([[[centre - spread, centre + spread]]], dtype=torch.float16)}
        found = cache_summary.summarise(built(tmp_path / str(number), [sample(1)], [held])).latents
        assert (found.is_normalised, found.dtype) == (verdict, "float16"), (centre, spread)


def test_what_is_not_finite_is_counted_and_left_out(tmp_path):
    broken = {
        "mean": torch.tensor([[[1.0, float("nan"), 3.0, float("inf")]]]),
        "std": torch.tensor([[[0.5, 1.0, float("inf"), 1.0]]]),
    }
    summary = cache_summary.summarise(built(tmp_path, [sample(1)], [{item(1): broken}]))
    assert summary.latents.non_finite_share == 3 / 8
    assert (summary.latents.mean, summary.latents.posterior_std, summary.latents.largest) == (1, 0.5, 1)
    assert sum(number for *_, number in summary.latents.histogram) == 1


def test_a_cache_without_one_finite_value_is_still_shown(tmp_path, capsys):
    store = built(tmp_path, [sample(1)], [{item(1): latents([[[float("nan")]]])}])
    page = html(store)
    assert not re.search(r'="[^"]*nan', page), "a drawing with a coordinate that is no number"
    assert "50% of the values are infinite or no numbers" in page
    command.inspect(tmp_path, json=True)
    assert json.loads(capsys.readouterr().out)["latents"]["mean"] is None


def test_the_sample_of_latents_is_bounded_seeded_and_from_all_shards(tmp_path, monkeypatch):
    numbers = [list(range(start, start + 10)) for start in range(1, 81, 10)]
    held = [{item(number): latents([[[float(number)]]]) for number in shard} for shard in numbers]
    store = built(tmp_path, [sample(number) for shard in numbers for number in shard], held)
    monkeypatch.setattr(cache_summary, "_LATENTS_READ", 8)
    read: list[int] = []
    monkeypatch.setattr(CacheStore, "latents", lambda store, number: (read.append(number), latents([[[1.0]]]).values())[1])
    assert cache_summary.summarise(store).latents.num_read == 8
    assert [number // 10 for number in read] == list(range(8))
    first = list(read)
    cache_summary.summarise(store)
    assert read == first * 2


def test_control_images_take_their_share_of_the_sample(tmp_path, monkeypatch):
    samples = [sample(number, controls=[item(100 + number)]) for number in range(1, 21)]
    held = {item(number): latents([[[0.0]]]) for number in (*range(1, 21), *range(101, 121))}
    monkeypatch.setattr(cache_summary, "_LATENTS_READ", 10)
    assert cache_summary.summarise(built(tmp_path, samples, [held])).latents.num_read == 10


def test_spread_takes_one_of_each_stretch():
    generator = np.random.default_rng(0)
    assert cache_summary.spread(3, 5, generator).tolist() == [0, 1, 2]
    assert cache_summary.spread(0, 5, generator).tolist() == []
    for number in (24, 25, 37, 1000):
        positions = cache_summary.spread(number, 24, generator)
        edges = np.arange(25) * number // 24
        assert ((edges[:-1] <= positions) & (positions < edges[1:])).all()


@pytest.mark.parametrize(("scale", "step"), [(0.01, 1 / 32), (0.9, 1 / 16), (3.9, 0.25), (500.0, 4.0)])
def test_values_are_binned_over_the_range_where_they_lie(tmp_path, scale, step):
    values = [[[-scale, -scale / 2, scale / 2, scale]]]
    bins = cache_summary.summarise(built(tmp_path, [sample(1)], [{item(1): latents(values)}])).latents.histogram
    assert (len(bins), bins[0][0], bins[-1][1], bins[16][:2]) == (32, None, None, (0, step))
    assert sum(number for *_, number in bins) == 4
    expected = [number for value in values[0][0] for number, (low, high, _) in enumerate(bins)
                if (low is None or value >= low) and (high is None or value < high)]  # fmt: skip
    assert [number for number, (*_, count) in enumerate(bins) for _ in range(count)] == expected


def test_a_few_values_far_away_are_in_the_outermost_bins(tmp_path):
    values = [[[-60.0, -1.0] + [0.1] * 5000 + [90.0]]]
    bins = cache_summary.summarise(built(tmp_path, [sample(1)], [{item(1): latents(values)}])).latents.histogram
    assert [(low, high, number) for low, high, number in bins if number] == [
        (None, -15 / 32, 2), (3 / 32, 4 / 32, 5000), (15 / 32, None, 1),
    ]  # fmt: skip


def test_psnr():
    dark, light = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 110, np.uint8)
    assert cache_page.psnr(dark, light) == cache_page.psnr(light, dark) == pytest.approx(20 * math.log10(25.5))
    assert cache_page.psnr(dark, dark) == math.inf
    assert cache_page.psnr(dark, light[:1]) is None


def test_every_bucket_has_pictures_on_the_sheet(tmp_path):
    sizes = [(64, 64)] * 60 + [(96, 48)] * 30 + [(48, 96)] * 2
    samples = [sample(n + 1, bucket_width=width, bucket_height=height) for n, (width, height) in enumerate(sizes)]
    picks = cache_page._picks(built(tmp_path, samples).table)
    assert len(picks) == len(set(picks)) == 24
    assert [sizes[pick] for pick in picks] == [(48, 96)] * 2 + [(64, 64)] * 11 + [(96, 48)] * 11
    many = [sample(n + 1, bucket_width=64 + n) for n in range(40)]
    assert len(set(cache_page._picks(built(tmp_path / "many", many).table))) == 24


def test_the_page_without_a_model_says_how_to_see_pictures(tmp_path):
    page = html(built(tmp_path, [sample(1)]))
    assert f"ftk inspect {tmp_path} --html --model MODEL" in page
    assert "<article" not in page


def test_the_page_runs_no_script_and_fetches_nothing(tmp_path):
    page = html(built(tmp_path, [sample(1)]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "<script" not in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)


def test_what_users_wrote_is_escaped(tmp_path):
    page = html(built(tmp_path / "<b>dir", [sample(1)], prompts={HOSTILE: EMPTY}, prepared_recipe={"sources": {HOSTILE: {}}}))
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;script&gt;") == 2


def test_other_weights_than_those_that_encoded_are_told(tmp_path, tiny_model):
    encoders = {"latents": {"weights": {"vae": "sampled:0123"}}, "texts": {}}
    store = built(tmp_path, [sample(1)], [{item(1): latents([[[0.0] * 8] * 8] * 16)}], encoders=encoders)
    page = html(store, model=tiny_model)
    assert "These are not the weights that made the cache" in page
    assert "vae: expected sampled:0123, found sampled:" in page
    assert page.count("<article") == 1
    assert "No prepared dataset lies beside the cache" in page


def test_sources_are_of_the_same_pixels_and_of_the_dataset_that_is_named(tmp_path, tiny_model, written_dataset):
    built(tmp_path / "cache", [sample(1)], [{item(1): latents([[[0.0] * 8] * 8] * 16)}])
    written_dataset(tmp_path / "prepared", [[prepared_row("k1")]])
    written_dataset(tmp_path / "other", [[prepared_row("k0"), prepared_row("k1", image_id=item(1), captions=["same"])]])
    command.inspect(tmp_path, html=True, model=tiny_model)
    page = (tmp_path / "cache" / "inspect.html").read_text()
    assert f"Sources and captions: {tmp_path / 'prepared'}" in page
    assert "no such sample any more, or other pixels for it" in page
    command.inspect(tmp_path, html=True, model=tiny_model, prepared=tmp_path / "other")
    page = (tmp_path / "cache" / "inspect.html").read_text()
    assert f"Sources and captions: {tmp_path / 'other'}" in page
    assert '<p class="caption">same</p>' in page


def test_a_folder_without_a_vae_is_named_with_what_it_holds(tmp_path, tiny_model):
    store = built(tmp_path / "cache", [sample(1)])
    with pytest.raises(ModelError, match=r"no vae folder of a qwen-image model in it \(found: no such folder\)"):
        cache_page.page(store, tmp_path / "nowhere")
    (tmp_path / "weights").mkdir()
    with pytest.raises(ModelError, match="found: cache, weights"):
        cache_page.page(store, tmp_path)
    assert cache_page.Decoder.load(store.manifest, tiny_model / "vae").model == str(tiny_model)


def test_the_terminal_shows_names_as_they_are(tmp_path, capsys):
    encoders = {"latents": {"weights": {"vae": "[bold]digest"}}, "texts": {"template": "two\nlines\x1b"}}
    built(tmp_path, [sample(8)], prompts={"[red]cat\x1b[31m": EMPTY}, encoders=encoders)
    command.inspect(tmp_path)
    shown = capsys.readouterr().out
    for expected in ("[red]cat�[31m", "[bold]digest", "weights.vae", "two lines�", "64x64", "far from 0 and 1"):
        assert expected in shown
    assert "\x1b" not in shown


def test_of_many_channels_and_prompts_the_terminal_shows_some(tmp_path, capsys):
    prompts = {f"prompt {letter}": EMPTY for letter in "abcdefghijkl"}
    held = {item(1): latents([[[-1.0 + (number == 77), 1.0 + (number == 77)]] for number in range(100)])}
    built(tmp_path, [sample(1)], [held], prompts=prompts)
    command.inspect(tmp_path)
    shown = capsys.readouterr().out
    assert "the 32 of 100 that are furthest from 0 and 1" in shown
    assert re.search(r"std +77 +1\.000 +1\.000", " ".join(shown.split()))
    assert "prompt j" in shown
    assert "prompt k" not in shown
    assert "and 2 more" in shown


def test_a_workspace_shows_its_dataset_and_then_its_cache(workspace, capsys):
    command.inspect(workspace)
    shown = capsys.readouterr().out
    assert 0 <= shown.index(str(workspace / "prepared")) < shown.index(str(workspace / "cache"))
    command.inspect(workspace, json=True)
    both = json.loads(capsys.readouterr().out)
    assert (both["num_inputs"], both["cache"]["num_images"]) == (1, 1)
    for name in ("prepared", "cache"):
        command.inspect(workspace / name, json=True)
        alone = json.loads(capsys.readouterr().out)
        assert alone == (both["cache"] if name == "cache" else {key: both[key] for key in both if key != "cache"})
    shutil.rmtree(workspace / "prepared")
    command.inspect(workspace, json=True)
    assert json.loads(capsys.readouterr().out) == both["cache"]


def test_each_page_goes_into_the_folder_that_it_shows(workspace, capsys):
    command.inspect(workspace, html=True)
    pages = [workspace / "prepared" / "inspect.html", workspace / "cache" / "inspect.html"]
    assert capsys.readouterr().out.split() == [str(page) for page in pages]
    assert "<h1>" in pages[0].read_text()
    assert "Text lengths" in pages[1].read_text()
    CacheStore.open(workspace / "cache")
    command.inspect(workspace / "cache", html=True, out=workspace / "x.html", json=True)
    assert json.loads(capsys.readouterr().out)["page"] == str(workspace / "x.html")
    assert "Text lengths" in (workspace / "x.html").read_text()


def test_options_that_would_have_no_effect_are_refused(workspace, tiny_model):
    with pytest.raises(ConfigError, match=r"there are two pages to write. Name the one to show, .*prepared or .*cache"):
        command.inspect(workspace, html=True, out=workspace / "x.html")
    with pytest.raises(ConfigError, match=r"decoded latents are on the page. Add --html"):
        command.inspect(workspace, model=tiny_model)
    with pytest.raises(ConfigError, match="Add --html --model DIR"):
        command.inspect(workspace / "cache", html=True, prepared=workspace / "prepared")
    with pytest.raises(ConfigError, match="is a prepared dataset and has no latents"):
        command.inspect(workspace / "prepared", html=True, model=tiny_model)


def test_an_unfinished_or_damaged_cache_is_an_error_and_leaves_no_page(workspace, caplog):
    cache = workspace / "cache"
    shard = next((cache / "latents").rglob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    for directory in (cache, workspace):
        with pytest.raises(CacheError, match=r"is damaged:[\s\S]*ftk verify"):
            command.inspect(directory, html=True)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheError, match=r"is damaged: item .* does not have its checksum"):
        command.inspect(cache, html=True)
    (cache / "cache.json").write_text("{}")
    with pytest.raises(CacheError, match=r"cache\.json is damaged"):
        command.inspect(workspace)
    (cache / "cache.json").unlink()
    with pytest.raises(CacheError, match=r"holds no finished cache. Run `ftk cache"):
        command.inspect(cache)
    assert not list(workspace.rglob("inspect.html"))
    with caplog.at_level("INFO", logger="ftk"):
        command.inspect(workspace)
    assert f"{cache} is not finished and not shown" in caplog.text
    shutil.rmtree(workspace / "prepared")
    with pytest.raises(CacheError, match="holds no finished cache"):
        command.inspect(workspace)
    shutil.rmtree(cache)
    with pytest.raises(DatasetError, match=r"it holds nothing, and no dataset\.json or cache\.json"):
        command.inspect(workspace)
