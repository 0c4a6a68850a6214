"""Where captions come from, as `ftk prepare` and `ftk inspect` tell it."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.fixture
def prepare(ftk: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Prepare sources with the given data settings; the report, or with `dry` the plan."""

    def call(sources: list[dict[str, Any]], *options: str, work: str = "work", **data: Any) -> dict[str, Any]:
        for source in sources:
            source["path"] = str(tmp_path / source["path"])
        run = {
            "run": "r", "workspace": str(tmp_path / work), "model": {"family": "qwen-image", "path": "none"},
            "data": {"sources": sources, "resolutions": [64], "workers": 1, **data},
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        result = ftk("prepare", tmp_path / "run.yaml", "--json", *options)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return call


def _photos(root: Path, files: dict[str, str | None]) -> None:
    """Images where the caption is None, else text files."""
    for number, (name, text) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            Image.new("RGB", (64, 64), (number * 20, 99, 200 - number * 20)).save(path, "PNG")
        else:
            path.write_text(text)


def _captions(work: Path) -> dict[str, list[str]]:
    from ftk.pipeline.dataset import PreparedDataset

    return {row.key.rpartition("-")[0]: row.captions for row in PreparedDataset.open(work / "prepared").rows()}


ODD = {
    "IMG_1.JPG": None, "img_1.txt": "one", "IMG_2.JPG": None, "IMG_2.JPG.txt": "two", f"x{NFC}.jpg": None,
    f"x{NFD}.txt": "three", "a.jpg": None, "a.tags": "four", "b.jpg": None, "b.txt": "five", "sub/notes.md": "six",
}  # fmt: skip
UNMATCHED = [("a.tags", "a.jpg"), ("sub/notes.md", "")]


def test_images_without_a_caption_and_captions_without_an_image_are_counted_and_named(prepare, ftk, tmp_path):
    _photos(tmp_path / "photos", ODD)
    sources = [{"path": "photos", "caption": "a photo"}]
    plan = prepare([dict(sources[0])], "--dry-run")
    report = prepare(sources, shard_samples=2)
    assert report["num_samples"] == 5
    assert _captions(tmp_path / "work")["a"] == ["a photo"]
    assert sorted(_captions(tmp_path / "work").values()) == [["a photo"], ["five"], ["one"], ["three"], ["two"]]
    inspected = json.loads(ftk("inspect", tmp_path / "work", "--json").out)
    for found in (plan, report, inspected):
        assert found["num_fallback_captions"] == 1
        assert found["num_unmatched_captions"] == 2
        assert [(one["path"], one["likely_image"]) for one in found["unmatched_captions"]] == UNMATCHED
    assert report["fallback_captions"] == inspected["fallback_captions"] == ["a.jpg"]
    shown = ftk("inspect", tmp_path / "work").out
    assert "a.tags, perhaps of a.jpg" in " ".join(shown.split())
    assert ftk("inspect", tmp_path / "work", "--html").code == 0
    page = (tmp_path / "work/prepared/inspect.html").read_text()
    assert "a.tags" in page
    assert "caption_suffix: .tags" in page


def test_parts_end_with_the_same_notes_on_captions(prepare, tmp_path):
    _photos(tmp_path / "photos", ODD)

    def source() -> list[dict[str, Any]]:
        return [{"path": "photos", "caption": "a photo"}]

    whole = prepare(source(), shard_samples=2)
    parts = [prepare(source(), "--part", f"{part}/3", work="parts", shard_samples=2) for part in (3, 1, 2)]
    assert [part["num_unmatched_captions"] for part in parts] == [2, 2, 2]
    assert (parts[-1]["num_shards_missing"], parts[-1]["fallback_captions"]) == (0, whole["fallback_captions"])
    manifests = [(tmp_path / work / "prepared/dataset.json").read_bytes() for work in ("work", "parts")]
    assert manifests[0] == manifests[1]


def test_a_caption_that_is_put_beside_its_image_makes_the_shard_again(prepare, tmp_path):
    _photos(tmp_path / "photos", ODD)
    prepare([{"path": "photos", "caption": "a photo"}])
    (tmp_path / "photos/a.txt").write_text("a photo")
    report = prepare([{"path": "photos", "caption": "a photo"}])
    assert (report["num_shards_reused"], report["num_fallback_captions"], report["num_unmatched_captions"]) == (0, 0, 1)
    # A text file of no image shapes no sample.
    (tmp_path / "photos/c.md").write_text("")
    report = prepare([{"path": "photos", "caption": "a photo"}])
    assert (report["num_shards_reused"], report["num_unmatched_captions"]) == (1, 2)


def test_images_of_all_kinds_of_sources_that_took_the_fallback_are_counted(prepare, tmp_path):
    _photos(tmp_path / "photos", {"a.jpg": None, "b.jpg": None})
    rows = [{"file_name": "photos/a.jpg", "text": "a cat"}, {"file_name": "photos/b.jpg", "text": None}]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare(
        [{"path": "table.jsonl", "caption": "a cat"}, {"path": "photos", "captions_from": "fixed", "caption": "x"}]
    )
    assert (report["num_fallback_captions"], report["fallback_captions"]) == (1, [f"{tmp_path.name}: photos/b.jpg"])


def test_without_any_caption_the_error_names_the_files_that_may_be_meant(ftk, prepare, tmp_path):
    _photos(tmp_path / "photos", {"a.jpg": None, "a.tags": "a cat"})
    run = {
        "run": "r", "workspace": str(tmp_path / "work"), "model": {"family": "qwen-image", "path": "none"},
        "data": {"sources": [{"path": str(tmp_path / "photos")}], "resolutions": [64]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    result = ftk("prepare", tmp_path / "run.yaml")
    assert result.code == 2
    assert "a.tags, perhaps of a.jpg: .tags files are not read: set `caption_suffix: .tags`" in result.err


def test_folders_of_sd_scripts_repeat_their_images(prepare, tmp_path):
    _photos(tmp_path / "img", {"10_sks dog/a.png": None, "2_dog/b.png": None, "2_dog/b.txt": "a dog"})
    hint = prepare([{"path": "img", "caption": "a photo"}])["hints"]
    assert len(hint) == 1
    assert "`layout: kohya`" in hint[0]
    report = prepare([{"path": "img", "layout": "kohya", "caption": "a photo", "repeats": 3}])
    assert (report["hints"], report["fallback_captions"]) == ([], ["10_sks dog/a.png"])
    from ftk.pipeline.dataset import PreparedDataset

    rows = PreparedDataset.open(tmp_path / "work/prepared").rows()
    assert [(row.repeats, row.captions) for row in rows] == [(30, ["sks dog"]), (6, ["a dog"])]


def test_captions_that_are_probably_not_meant_are_told_in_all_reports(prepare, ftk, tmp_path):
    texts = ["a dog (smile:1.2)", "a [name] on grass", "a cat on a mat", "two birds", "a horse at sea", "a {2$$a|b} fox", "x"]
    files = {f"{number}.png": None for number in range(len(texts))}
    _photos(tmp_path / "photos", files | {f"{number}.txt": text for number, text in enumerate(texts)})
    report = prepare([{"path": "photos"}])
    assert report["num_samples"] == len(texts)
    found = {finding["kind"]: (finding["num_samples"], finding["examples"][0][:2]) for finding in report["caption_findings"]}
    assert found == {"weights": (1, "0-"), "placeholders": (1, "1-"), "wildcards": (1, "5-"), "short": (1, "6-")}
    again = ftk("prepare", tmp_path / "run.yaml")
    assert again.code == 0
    assert "1 sample has captions with weights: " in " ".join(again.err.split())
    assert json.loads(ftk("inspect", tmp_path / "work", "--json").out)["caption_findings"] == report["caption_findings"]
    assert "(smile:1.2)" in " ".join(ftk("inspect", tmp_path / "work").out.split())
    assert ftk("inspect", tmp_path / "work", "--html").code == 0
    assert "(smile:1.2)" in (tmp_path / "work/prepared/inspect.html").read_text()


def test_wildcards_become_captions_and_a_bound_is_told(prepare, ftk, tmp_path):
    _photos(tmp_path / "photos", {"a.png": None, "a.txt": "a {red|blue} car", "b.png": None, "b.txt": "{a|b|c} {d|e|f}"})
    report = prepare([{"path": "photos"}], captions={"wildcards": 4})
    captions = _captions(tmp_path / "work")
    assert captions["a"] == ["a red car", "a blue car"]
    assert len(captions["b"]) == 4
    assert (report["num_cut_wildcards"], report["caption_findings"]) == (1, [])
    assert "1 with a caption of more variants" in " ".join(ftk("prepare", tmp_path / "run.yaml").err.split())
    prepare([{"path": "photos"}], captions={"wildcards": 0})
    assert _captions(tmp_path / "work")["a"] == ["a {red|blue} car"]
