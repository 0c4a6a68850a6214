"""The numbers and the page of a prepared dataset, from tables and shards written by hand."""

import base64
import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftk import storage
from ftk.cli import inspect as command
from ftk.contracts import Reject, RejectReason, SampleRow
from ftk.errors import CacheError, ConfigError, DatasetError
from ftk.pipeline import prepared_page, prepared_summary
from ftk.pipeline.dataset import PreparedDataset

HOSTILE = '<script>document.title = "ran"</script>'


def sample(key: str, **changes: Any) -> SampleRow:
    """A square image of 640 pixels that was resized and not cropped."""
    row = SampleRow(
        key=key, source="dogs", content_sha256="0" * 64, image_id=key, width=640, height=640, bucket_width=64, bucket_height=64,
        resize_width=64, resize_height=64, crop_x=0, crop_y=0, flipped=False, copied=False, perceptual_hash="0" * 16,
        captions=["a dog"], repeats=1, role="instance", num_controls=0, control_ids=[], has_mask=False, mask_id="", shard="",
    )  # fmt: skip
    return replace(row, **changes)


def reject(path: str, reason: RejectReason = RejectReason.UNREADABLE, source: str = "dogs", detail: str = "why") -> Reject:
    return Reject(source=source, path=path, reason=reason, detail=detail)


def colour_of(key: str) -> tuple[int, int, int]:
    return tuple(storage.digest(key).encode()[:3])  # type: ignore[return-value]


def html(prepared: PreparedDataset) -> str:
    return prepared_page.page(prepared)[1].decode()


def shown_keys(page: str) -> list[str]:
    """Keys on the contact sheets, in their order."""
    samples = page[page.index('<section id="samples">') : page.index('<section id="rejects">')]
    return re.findall(r'<p class="key">\w+: ([\w-]+)</p>', samples)


def test_totals_are_those_of_manifest_and_rows(tmp_path, written_dataset):
    prepared = written_dataset(
        tmp_path,
        [
            [sample("a", flipped=True), sample("b", has_mask=True, mask_id="m")],
            [sample("c", num_controls=2, control_ids=["x", "y"]), sample("d", flipped=True, num_controls=1, control_ids=["x"])],
        ],
        [reject("z.png")],
        num_upscaled=3, num_copied=1, num_long_captions=2, num_empty_masks=1,
    )  # fmt: skip
    summary = prepared_summary.summarise(prepared)
    assert (summary.num_inputs, summary.num_samples, summary.num_rejects, summary.num_shards) == (5, 4, 1, 2)
    assert (summary.num_upscaled, summary.num_copied, summary.num_long_captions) == (3, 1, 2)
    assert (summary.num_flipped, summary.num_masks, summary.num_empty_masks, summary.num_controls) == (2, 1, 1, 2)
    assert summary.num_bytes == sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    assert (summary.directory, summary.fingerprint) == (str(tmp_path), "abc")


def test_crop_loss_is_the_share_of_the_resized_image_that_was_left_out(tmp_path, written_dataset):
    rows = [sample("a"), sample("b", resize_width=80, crop_x=8), sample("c", resize_height=128, crop_y=32)]
    loss = prepared_summary.summarise(written_dataset(tmp_path, [rows])).crop_loss
    assert loss is not None
    assert (loss.least, loss.median, loss.most) == pytest.approx((0, 0.2, 0.5))


def test_original_sizes_are_of_all_shards(tmp_path, written_dataset):
    rows = [[sample("a", width=1000, height=500)], [sample("b", width=4000, height=2000), sample("c", width=2000, height=1000)]]
    size = prepared_summary.summarise(written_dataset(tmp_path, rows)).original_megapixels
    assert size is not None
    assert (size.least, size.median, size.most) == (0.5, 2, 8)


def test_buckets_go_from_tall_to_wide_with_their_share(tmp_path, written_dataset):
    wide = [sample(f"w{n}", bucket_width=96, bucket_height=48, resize_width=96) for n in range(3)]
    tall = sample("t", bucket_width=48, bucket_height=96, resize_height=96)
    buckets = prepared_summary.summarise(written_dataset(tmp_path, [wide[:2], [tall, wide[2]]])).buckets
    assert [(one.width, one.height, one.num_samples, one.share) for one in buckets] == [(48, 96, 1, 0.25), (96, 48, 3, 0.75)]


def test_captions_are_counted_and_measured(tmp_path, written_dataset):
    rows = [sample("a", captions=["1234", "1234567", "ä"]), sample("b", captions=["123456"]), sample("c", captions=["12345"])]
    captions = prepared_summary.summarise(written_dataset(tmp_path, [rows])).captions
    assert captions.num_captions == 5
    assert captions.captions_a_sample == {1: 2, 3: 1}
    assert captions.characters == prepared_summary.Spread(least=1, median=5, most=7)
    assert captions.leading_tags == {}


def test_leading_tags_are_those_that_many_captions_share(tmp_path, written_dataset):
    rows = [sample(f"k{n}", captions=[f"sks dog, number {n}"]) for n in range(4)]
    rows += [sample(f"o{n}", captions=[f"tag {n}, other"]) for n in range(4)]
    assert prepared_summary.summarise(written_dataset(tmp_path, [rows[:5], rows[5:]])).captions.leading_tags == {"sks dog": 4}


def test_leading_tags_end_at_the_separator_of_the_recipe(tmp_path, written_dataset):
    rows = [sample(f"k{n}", captions=[f"red, blue ; {n}"]) for n in range(3)]
    prepared = written_dataset(tmp_path, [rows], recipe={"captions": {"tag_separator": ";"}})
    assert prepared_summary.summarise(prepared).captions.leading_tags == {"red, blue": 3}


def test_leading_tags_that_are_all_different_do_not_fill_the_memory(tmp_path, monkeypatch, written_dataset):
    monkeypatch.setattr(prepared_summary, "_LEADING_TAGS_HELD", 10)
    rows = [sample(f"k{n}", captions=[f"sks, {n}", f"sks, {n}", f"tag {n}, other"]) for n in range(40)]
    prepared = written_dataset(tmp_path, [rows[:20], rows[20:]])
    scan = prepared_summary.scan(prepared)
    assert scan.leading_tags["sks"] == 80
    assert len(scan.leading_tags) <= 10


def test_sources_have_their_samples_and_rejects(tmp_path, written_dataset):
    rows = [sample("a"), sample("b"), sample("c", source="men", repeats=3, role="class")]
    rejects = [reject("1", source="men"), reject("2", source="gone"), reject("3", source="gone")]
    sources = prepared_summary.summarise(written_dataset(tmp_path, [rows], rejects)).sources
    assert [(one.name, one.num_samples, one.num_rejects, one.repeats, one.role) for one in sources] == [
        ("dogs", 2, 0, 1, "instance"),
        ("men", 1, 1, 3, "class"),
        ("gone", 0, 2, None, None),
    ]


def test_a_source_of_several_repeats_has_a_row_for_each_and_its_rejects_once(tmp_path, written_dataset):
    rows = [[sample("a", repeats=2), sample("b", repeats=10), sample("c", repeats=10)]]
    sources = prepared_summary.summarise(written_dataset(tmp_path, rows, [reject("1"), reject("2")])).sources
    assert [(one.repeats, one.num_samples, one.num_rejects) for one in sources] == [(2, 1, 2), (10, 2, 0)]


def test_rejects_are_grouped_with_the_first_examples(tmp_path, written_dataset):
    rejects = [reject(f"{n}.png", detail=f"detail {n}") for n in range(5)] + [reject("s.png", RejectReason.TOO_SMALL)]
    groups = prepared_summary.summarise(written_dataset(tmp_path, [[sample("a")]], rejects)).rejects
    assert [(group.reason, group.num_inputs, len(group.examples)) for group in groups] == [
        ("unreadable", 5, 3),
        ("too_small", 1, 1),
    ]
    assert groups[0].examples[2] == {"source": "dogs", "path": "2.png", "detail": "detail 2"}


def test_duplicates_show_both_kinds(tmp_path, written_dataset):
    pairs = [(f"e{n}", "a", -1) for n in range(9)] + [(f"n{n}", "a", n) for n in range(5)]
    summary = prepared_summary.summarise(written_dataset(tmp_path, [[sample("a")]], pairs=pairs))
    assert (summary.num_duplicates, summary.num_near_duplicates) == (9, 5)
    assert [pair["key"] for pair in summary.duplicates] == ["e0", "e1", "e2", "n0", "n1", "n2"]


def test_a_dataset_of_rejects_alone(tmp_path, capsys, written_dataset):
    prepared = written_dataset(tmp_path, [[]], [reject("broken.png", detail="the file is empty")])
    summary, page = prepared_page.page(prepared)
    assert (summary.num_samples, summary.crop_loss, summary.original_megapixels) == (0, None, None)
    assert summary.captions.characters is None
    assert b"the file is empty" in page
    assert b"every input was rejected" in page
    command.inspect(tmp_path)
    assert "broken.png: the file is empty" in capsys.readouterr().out


def test_a_dataset_without_shards(tmp_path, written_dataset):
    summary, page = prepared_page.page(written_dataset(tmp_path, []))
    assert summary.num_inputs == 0
    assert b"There are none." in page


def test_what_users_wrote_is_escaped_everywhere(tmp_path, written_dataset):
    row = sample("a", captions=[HOSTILE, HOSTILE], source=HOSTILE)
    rejects = [reject(HOSTILE, source=HOSTILE, detail=HOSTILE)]
    rows = [row, *(sample(f"k{n}", captions=["<b>tag</b>, x"]) for n in range(3))]
    page = html(written_dataset(tmp_path / "<b>dir", [rows], rejects, [("k1", "a", 1)], recipe={"sources": {HOSTILE: {}}}))
    assert page.count("<script>") == 1
    assert "<b>" not in page
    # Source, two captions, caption of the pair, key line (twice), reject's source, path and detail, recipe.
    assert page.count("&lt;script&gt;") == 10


def test_the_page_allows_its_own_script_and_no_other(tmp_path, written_dataset):
    page = html(written_dataset(tmp_path, [[sample("a")]]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    assert f"script-src 'sha256-{prepared_page._template().environment.filters['sha256'](script)}'" in policy
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)


def test_a_sheet_shows_samples_from_all_over_the_bucket(tmp_path, written_dataset):
    rows = [sample(f"k{n:02}") for n in range(30)]
    rows[3:3] = [sample("odd", bucket_width=96, resize_width=96)]
    page = html(written_dataset(tmp_path, [rows[:7], rows[7:20], rows[20:]]))
    assert "24 of 30 shown" in page
    assert "1 of 1 shown" in page
    assert shown_keys(page) == [*(f"k{n * 30 // 24:02}" for n in range(24)), "odd"]


def test_each_thumbnail_is_of_its_sample(tmp_path, written_dataset):
    rows = [sample("a"), sample("b", bucket_width=96, resize_width=96), sample("c")]
    page = html(written_dataset(tmp_path, [rows[:2], rows[2:]]))
    cards = re.findall(r'src="data:image/jpeg;base64,([^"]+)".*?class="key">dogs: (\w)<', page, re.DOTALL)
    assert [key for _, key in cards] == ["a", "c", "b"]
    for data, key in cards:
        found = Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))
        assert found == pytest.approx(colour_of(key), abs=4)


def test_thumbnails_are_small(tmp_path, written_dataset):
    row = sample("a", bucket_width=1024, bucket_height=512, resize_width=1024, resize_height=512)
    data = re.search(r"base64,([^\"]+)", html(written_dataset(tmp_path, [[row]]))).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 96)


def test_the_crop_is_drawn_to_scale(tmp_path, written_dataset):
    row = sample("a", width=1280, resize_width=128, resize_height=80, crop_x=32, crop_y=8)
    page = html(written_dataset(tmp_path, [[row]]))
    assert 'style="width:100.00%;aspect-ratio:128/80"' in page
    assert 'style="left:25.000%;top:10.000%;width:50.000%;height:80.000%"' in page
    assert "1280×640 → 128×80, cut to 64×64 at 32,8: 60.0% lost" in " ".join(page.split())


def test_badges_say_what_was_done(tmp_path, written_dataset):
    plain, enlarged = sample("a"), sample("b", width=32, height=32)
    marked = sample("c", flipped=True, copied=True, has_mask=True, num_controls=2, control_ids=["x", "y"])
    page = html(written_dataset(tmp_path, [[plain, enlarged, marked]]))
    badges = [re.findall("<li>(.*?)</li>", card) for card in page.split("<article")[1:]]
    assert badges == [[], ["upscaled"], ["flipped", "copied", "mask", "2 controls"]]


def test_controls_are_shown_beside_their_image_with_what_the_recipe_says_they_are(tmp_path, written_dataset):
    mixed = {"controls": ["a place", {"make": "canny", "low": 50.0}, "depth.png", {"make": "holes", "share": [0.1, 0.25]}]}
    sources = {"dogs": mixed, "cats": {**mixed, "optional": True}}
    given = {"num_controls": 4, "control_ids": list("wxyz")}
    rows = [sample("a", source="dogs", **given), sample("b", source="dogs", num_controls=2, control_ids=["x", "y"]),
            sample("c", source="cats", **given)]  # fmt: skip
    page = html(written_dataset(tmp_path, [rows[:2], rows[2:]], recipe={"sources": sources}))
    labels = [re.findall("<figcaption>(.*?)</figcaption>", card) for card in page.split("<article")[1:]]
    # Where an image may lack some or have several, their number alone does not tell which they are.
    unknown = [f"control {number}" for number in range(4)]
    assert labels == [["given", "canny, low 50", "depth.png", "holes, share 0.1 to 0.25"], unknown[:2], unknown]


def test_long_and_many_captions_are_cut_and_counted(tmp_path, written_dataset):
    page = html(written_dataset(tmp_path, [[sample("a", captions=["x" * 1000, *"bcdefgh"])]]))
    assert f"{'x' * 400}… (1,000 characters)" in page
    assert "x" * 401 not in page
    assert "7 more captions" in page
    assert "and 3 that are not on this page" in page


def test_five_hundred_rejects_are_shown_the_rare_ones_among_them(tmp_path, written_dataset):
    rejects = [reject(f"{n}.png", RejectReason.TOO_SMALL) for n in range(700)] + [reject(f"r{n}.png") for n in range(3)]
    page = html(written_dataset(tmp_path, [[sample("a")]], rejects))
    assert len(re.findall(r"<td class=\"name\">\w+\.png</td>", page)) == 500
    assert page.count(">r2.png<") == 1
    assert "500 shown; 203 more in rejects.parquet" in page


def test_pairs_are_drawn_side_by_side(tmp_path, written_dataset):
    rows = [sample("a", captions=["first"]), sample("b", captions=["second"]), sample("c", captions=["third"])]
    page = html(written_dataset(tmp_path, [rows[:1], rows[1:]], pairs=[("b", "a", -1), ("c", "a", 3)]))
    pairs = page[page.index('<section id="duplicates">') :]
    assert re.findall(r'class="caption">(\w+)<', pairs) == ["first", "second", "first", "third"]
    assert "equal files" in pairs
    assert "3 of 64 bits differ" in pairs
    assert "1 equal, 1 look alike; 2 of 2 shown" in pairs


def test_a_pair_of_unknown_samples_is_listed_without_images(tmp_path, written_dataset):
    page = html(written_dataset(tmp_path, [[sample("a")]], pairs=[("gone", "a", 2)]))
    assert "gone" in page[page.index('<section id="duplicates">') :]


def test_of_a_large_dataset_a_few_shards_are_read_and_every_bucket_is_shown(tmp_path, monkeypatch, written_dataset):
    shards = [[sample(f"k{n}-{m}") for m in range(4)] for n in range(12)]
    shards[7].append(sample("rare", bucket_width=96, resize_width=96))
    prepared = written_dataset(tmp_path, shards, pairs=[("k11-0", "k10-0", 1), ("k0-1", "k0-0", 2)])
    monkeypatch.setattr(prepared_page, "_READ_BYTES", prepared.manifest.shards[0].bytes + 1)
    page = html(prepared)
    assert set(prepared._members) == {"00000", "00007"}
    assert shown_keys(page) == [*(f"k0-{m}" for m in range(4)), *(f"k7-{m}" for m in range(4)), "rare"]
    assert "Picked from 2 of 12 shards" in page
    assert page.count("Not drawn") == 2
    assert "2 of 64 bits differ" in page


def test_captions_are_binned_in_round_steps():
    assert prepared_summary.length_bins(np.array([3, 9, 10, 11, 12, 14], np.int32)) == [
        (low, low + 1, number) for low, number in enumerate([0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1])
    ]
    long = prepared_summary.length_bins(np.array([40] * 99 + [60_000], np.int32))
    assert long[-1] == (120, None, 1)
    assert sum(number for *_, number in long) == 100


def test_a_changed_byte_of_a_shard_is_found(tmp_path, written_dataset):
    written_dataset(tmp_path, [[sample("a")]])
    tar = tmp_path / "shards" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DatasetError, match=r"00000\.tar is damaged.*ftk prepare"):
        command.inspect(tmp_path, html=True)
    assert not (tmp_path / "inspect.html").exists()


@pytest.mark.parametrize("name", ["shards/00000.parquet", "duplicates.parquet"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_table_is_named(tmp_path, name, how, written_dataset):
    written_dataset(tmp_path, [[sample("a")]])
    path = tmp_path / name
    path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=f"{name} is damaged.*ftk prepare"):
        command.inspect(tmp_path)


def test_a_workspace_shows_its_prepared_dataset(tmp_path, capsys, written_dataset):
    written_dataset(tmp_path / "prepared", [[sample("a")]])
    command.inspect(tmp_path, html=True)
    assert capsys.readouterr().out.strip() == str(tmp_path / "prepared" / "inspect.html")
    assert "1 of 1 shown" in (tmp_path / "prepared" / "inspect.html").read_text()


def test_folders_that_hold_no_dataset_are_named_with_what_they_hold(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere does not exist"):
        command.inspect(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"it holds nothing, and no dataset\.json"):
        command.inspect(tmp_path)
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ConfigError, match=r"run\.yaml is a file"):
        command.inspect(tmp_path / "run.yaml")
    (tmp_path / "cache.json").touch()
    (tmp_path / "shards").mkdir()
    with pytest.raises(CacheError, match=r"cache\.json is damaged"):
        command.inspect(tmp_path)
    (tmp_path / "prepared" / "shards").mkdir(parents=True)
    (tmp_path / "cache.json").unlink()
    (tmp_path / "shards").rmdir()
    with pytest.raises(DatasetError, match=r"prepared has shards but no dataset\.json: prepare has not ended"):
        command.inspect(tmp_path)


def test_out_is_a_file_and_needs_html(tmp_path, written_dataset):
    written_dataset(tmp_path, [[sample("a")]])
    with pytest.raises(ConfigError, match="Add --html"):
        command.inspect(tmp_path, out=tmp_path / "x.html")
    with pytest.raises(ConfigError, match="is a folder"):
        command.inspect(tmp_path, html=True, out=tmp_path)
    command.inspect(tmp_path, html=True, out=tmp_path / "new" / "x.html")
    assert "1 of 1 shown" in (tmp_path / "new" / "x.html").read_text()
    assert not (tmp_path / "inspect.html").exists()


def test_the_terminal_shows_names_as_they_are(tmp_path, capsys, written_dataset):
    rows = [sample("a", source="[red]dogs"), sample("b", source="x\x1b[31my")]
    rejects = [reject("[bold]a.png", detail="two\nlines\x07")]
    written_dataset(tmp_path, [rows], rejects)
    command.inspect(tmp_path)
    shown = capsys.readouterr().out
    assert "[red]dogs" in shown
    assert "[bold]a.png: two lines�" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
