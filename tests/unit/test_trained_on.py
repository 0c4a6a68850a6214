"""What has changed in the samples, in words. `plain` counts it by sets of plain rows."""

import random
from types import SimpleNamespace

import pyarrow as pa
import pytest

from ftk.cache import view
from ftk.train import trained_on
from ftk.train.trained_on import TrainedOn


def row(number, **changes):
    """A sample of its own image, unless it is changed."""
    return {
        "key": f"picture-{number}-{number:012x}", "latents": f"i{number}", "controls": [], "mask": "",
        "texts": [f"t{number}", "both"], "text_lengths": [3, 4], "width": 640, "height": 480, "bucket_width": 64,
        "bucket_height": 48, "resize_width": 64, "resize_height": 48, "crop_x": 0, "crop_y": 0, "flipped": False,
        "repeats": 1, "role": "instance", **changes,
    }  # fmt: skip


def of(rows, chunks=1, **repeats):
    size = -(-len(rows) // chunks)
    parts = [pa.Table.from_pylist(rows[start : start + size], schema=view.SAMPLE_SCHEMA) for start in range(0, len(rows), size)]
    recipe = {"sources": {name: {"repeats": number} for name, number in repeats.items()}}
    return TrainedOn.of(SimpleNamespace(table=pa.concat_tables(parts), manifest=SimpleNamespace(prepared_recipe=recipe)))


BEFORE = [row(number) for number in range(6)]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (BEFORE, []),
        (BEFORE[::-1], []),
        ([*BEFORE, row(7), row(8), row(1000)], ["3 images added"]),
        (BEFORE[1:], ["1 image removed"]),
        ([*BEFORE[:5], row(5, texts=["other", "both"])], ["1 caption changed"]),
        ([*BEFORE[:4], row(4, texts=["t4"]), row(5, texts=["both", "t5"])], ["2 captions changed"]),
        ([*BEFORE[:5], row(5, latents="i0")], ["1 image changed"]),
        ([row(0, mask="m"), *BEFORE[1:5], row(5, mask="m")], ["2 masks changed"]),
        ([*BEFORE[:5], row(5, controls=["c", "d"])], ["control images of 1 image changed"]),
        ([*BEFORE[:5], row(5, role="class")], ["1 role changed"]),
        ([*BEFORE[:5], row(5, repeats=2)], ["1 repeat count changed"]),
        ([*BEFORE[2:4], row(4, texts=["new"]), row(5, mask="m"), row(9)],
         ["1 image added", "2 images removed", "1 caption changed", "1 mask changed"]),
    ],
)  # fmt: skip
def test_changes_are_told_in_words_with_counts(tmp_path, after, words):
    before = of(BEFORE, chunks=2)
    before.commit(tmp_path)
    now = of(after, chunks=3)
    assert now.changes(before.identity, tmp_path) == words
    assert (now.identity == before.identity) == (not words)


def test_sizes_crops_and_mirror_images_are_of_one_image(tmp_path):
    def variants(number, **changes):
        return [
            row(number, key=f"{name}-{number}{flipped:d}{edge:010x}", bucket_width=edge, flipped=flipped, **changes)
            for name in ("picture",)
            for edge in (64, 128)
            for flipped in (False, True)
        ]

    before = of([*variants(1), *variants(2), *variants(3)])
    before.commit(tmp_path)
    # Images 2 and 3 are called alike, as files of two folders may be.
    after = of([*variants(1), *variants(2, texts=["x"]), *variants(3, texts=["y"]), *variants(4)])
    assert after.changes(before.identity, tmp_path) == ["1 image added", "2 captions changed"]


def test_repeats_are_told_by_source(tmp_path):
    before = of(BEFORE, dog=1, scenes=3)
    before.commit(tmp_path)
    now = of([row(number, repeats=4) for number in range(6)], dog=4, scenes=3)
    assert now.changes(before.identity, tmp_path) == ["repeats of source dog changed: 1, now 4"]


@pytest.mark.parametrize("seed", range(20))
def test_random_changes_are_counted_as_sets_count_them(tmp_path, seed):
    draw = random.Random(seed)
    before = {number: row(number) for number in range(40)}
    after = {number: row(number) for number in draw.sample(range(60), 40)}
    for number in draw.sample(sorted(after), 10):
        after[number]["texts"] = [f"changed {number}"]
    plain = {
        "image added": len(after.keys() - before.keys()),
        "image removed": len(before.keys() - after.keys()),
        "caption changed": sum(after[number]["texts"] != before[number]["texts"] for number in after.keys() & before.keys()),
    }
    noted = of(list(before.values()))
    noted.commit(tmp_path)
    rows = list(after.values())
    draw.shuffle(rows)
    told = of(rows).changes(noted.identity, tmp_path)
    counts = {" ".join(words.split()[1:]).replace("images", "image").replace("captions", "caption"): int(words.split()[0])
              for words in told}  # fmt: skip
    assert counts == {what: count for what, count in plain.items() if count}


@pytest.mark.parametrize("how", ["too many", "damaged", "of another checkpoint"])
def test_without_the_rows_changes_are_found_and_not_counted(tmp_path, monkeypatch, how):
    if how == "too many":
        monkeypatch.setattr(trained_on, "MOST_ROWS", 5)
    before = of(BEFORE)
    before.commit(tmp_path)
    assert (tmp_path / trained_on.FILE).exists() == (how != "too many")
    if how == "damaged":
        (tmp_path / trained_on.FILE).write_bytes(b"PAR1")
    elif how == "of another checkpoint":
        of(BEFORE[1:]).commit(tmp_path)
    assert of(BEFORE).changes(before.identity, tmp_path) == []
    captions = [*BEFORE[:5], row(5, texts=["other"])]
    assert of(captions).changes(before.identity, tmp_path) == ["some captions changed"]
    assert of([*BEFORE, row(6)]).changes(before.identity, tmp_path) == ["6 samples, now 7"]
    assert of([*BEFORE[:5], row(6)]).changes(before.identity, tmp_path) == ["some images are others"]


def test_a_checkpoint_that_knows_nothing_of_its_samples_is_gone_on_from(tmp_path):
    assert of(BEFORE).changes({}, tmp_path) == []
