"""Exact sizes and settings of one source, from the run file to what a cache is made of."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftk.pipeline.dataset import PreparedDataset
from ftk.train import sheet

SIZES = ["64x32", "32x64", "48x48"]
PHOTOS = {"wide": (300, 150), "tall": (130, 270), "square": (48, 48), "very-wide": (400, 100)}
NEAREST = {"wide": (64, 32), "tall": (32, 64), "square": (48, 48), "very-wide": (64, 32)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder for each of two sources, with photos of four shapes."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for number, (name, size) in enumerate(PHOTOS.items()):
            Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / folder / f"{name}.png")
            (tmp_path / folder / f"{name}.txt").write_text(f"photo {number}")
    return tmp_path


def _report(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    return json.loads(result.out)  # type: ignore[no-any-return]


def test_samples_have_exactly_the_sizes_that_were_named(ftk: Any, workspace: Any, photos: Path, tmp_path: Path) -> None:
    run_file = workspace(data={"sources": [{"path": str(photos / "one")}], "resolutions": SIZES})
    planned, made = _report(ftk("prepare", run_file, "--dry-run", "--json")), _report(ftk("prepare", run_file, "--json"))
    assert planned["buckets"] == made["buckets"] == {"32x64": 1, "48x48": 1, "64x32": 2}
    dataset = PreparedDataset.open(tmp_path / "work/prepared")
    rows = {row.key.rsplit("-", 1)[0]: row for row in dataset.rows()}
    assert {name: (row.bucket_width, row.bucket_height) for name, row in rows.items()} == NEAREST
    assert rows["square"].copied
    with tarfile.open(tmp_path / "work/prepared/shards/00000.tar") as tar:
        stored = {name.split(".")[0]: tar.extractfile(name) for name in tar.getnames() if name.endswith(".png")}
        assert {name.rsplit("-", 1)[0]: Image.open(file).size for name, file in stored.items()} == NEAREST
    buckets = _report(ftk("inspect", tmp_path / "work", "--json"))["buckets"]
    assert [(bucket["width"], bucket["height"]) for bucket in buckets] == [(32, 64), (48, 48), (64, 32)]


def test_a_run_trains_on_sizes_and_draws_the_first(ftk: Any, workspace: Any, photos: Path, tmp_path: Path) -> None:
    run_file = workspace(
        data={"sources": [{"path": str(photos / "one")}, {"path": str(photos / "two"), "flip": True}], "resolutions": SIZES},
        train={"steps": 2, "checkpoint_every": 2},
        sample={"every": 2},
    )
    report = _report(ftk("run", run_file, "--json"))
    assert report["prepare"]["buckets"] == {"32x64": 3, "48x48": 3, "64x32": 6}
    pictures = sheet.cells(tmp_path / "work/runs/test/samples/step-00000002.png")
    assert {picture.width / picture.height for picture, _ in pictures} == {64 / 32}


def test_other_settings_of_one_source_make_only_its_shards_again(
    ftk: Any, workspace: Any, photos: Path, tmp_path: Path
) -> None:
    own = {"path": str(photos / "two"), "resolutions": [32], "flip": True}
    run_file = workspace(data={"sources": [{"path": str(photos / "one")}, own], "resolutions": SIZES})
    assert _report(ftk("prepare", run_file, "--json"))["num_samples"] == 4 + 8
    before = PreparedDataset.open(tmp_path / "work/prepared").manifest
    changed = _report(ftk("prepare", run_file, "--json", "--set", "data.sources.1.flip=false"))
    assert (changed["num_samples"], changed["num_shards"], changed["num_shards_reused"]) == (4 + 4, 2, 1)
    after = PreparedDataset.open(tmp_path / "work/prepared").manifest
    assert before.shards[0] == after.shards[0]
    assert before.fingerprint != after.fingerprint
    told = ftk("cache", run_file)
    assert told.code == 2
    assert "data.sources.two.flip: expected True, found False" in told.err


def test_inspect_shows_what_a_source_says_for_itself(ftk: Any, workspace: Any, photos: Path, tmp_path: Path) -> None:
    own = {"path": str(photos / "two"), "resolutions": ["64x32"], "captions": {"long_chars": 4}}
    run_file = workspace(data={"sources": [{"path": str(photos / "one")}, own], "resolutions": [32]})
    assert _report(ftk("prepare", run_file, "--dry-run", "--json"))["source_settings"] == [
        "two: resolutions 64x32, captions.long_chars 4"
    ]
    assert _report(ftk("prepare", run_file, "--json"))["num_long_captions"] == 4
    sources = _report(ftk("inspect", tmp_path / "work", "--json"))["sources"]
    assert {source["name"]: source["settings"] for source in sources} == {
        "one": "", "two": "resolutions 64x32, captions.long_chars 4",
    }  # fmt: skip
    assert "its own settings" in ftk("inspect", tmp_path / "work").out
    page = tmp_path / "page.html"
    assert ftk("inspect", tmp_path / "work", "--html", "--out", page).code == 0
    assert "resolutions 64x32, captions.long_chars 4" in page.read_text()
    assert "64x32" in page.read_text()


@pytest.mark.parametrize("command", [("prepare",), ("prepare", "--dry-run"), ("run",), ("doctor",)], ids=" ".join)
def test_a_size_that_the_family_does_not_have_is_exit_2(ftk: Any, workspace: Any, command: tuple[str, ...]) -> None:
    told = ftk(*command, workspace(), "--set", "data.resolutions=[72x40]")
    assert told.code == 2
    assert "The nearest is 64x32" in told.err
