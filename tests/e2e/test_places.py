"""Where sources, masks, control images and roots lie is no part of a dataset or a cache: what is moved stays the same."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from ftk import contracts, storage
from ftk.cache import view
from ftk.pipeline.sources import base as sources

PLACES = {
    "folder": {"masks", "controls", "references"},
    "table": {"root"},
    "webdataset": set(),
    "hub": {"data_files"},
    "zip": set(),
}
"""By kind of source, which of its settings name places. A new kind of source must say so here."""


def _png(seed: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 20 + seed).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _folder(top: Path) -> dict:
    for number, name in enumerate("abcd"):
        _write(top / f"photos/{name}.png", _png(number))
        (top / f"photos/{name}.txt").write_text(f"photo {name}")
        for place in ("masks", "edges", "depth"):
            _write(top / f"{place}/{name}.png", _png(number, "L"))
    # One of each reject that says something of a mask or control image.
    for name, missing in (("no-mask", "masks"), ("no-control", "depth"), ("broken", "")):
        _write(top / f"photos/{name}.png", _png(9))
        (top / f"photos/{name}.txt").write_text(name)
        for place in {"masks", "edges", "depth"} - {missing}:
            _write(top / f"{place}/{name}.png", b"no image" if place == "masks" and not missing else _png(9, "L"))
    return {"path": top / "photos", "masks": top / "masks", "controls": [top / "edges", top / "depth"]}


def _table(top: Path) -> dict:
    rows = [{"file_name": f"{name}.png", "text": name, "mask": f"{name}-mask.png"} for name in "abcd"]
    for number, row in enumerate(rows):
        _write(top / "files" / row["file_name"], _png(number))
        _write(top / "files" / row["mask"], _png(number, "L"))
    rows += [{"file_name": "none.png", "text": "none", "mask": "none.png"}]
    rows += [{"file_name": "a.png", "text": "none", "mask": "none.png"}]
    (top / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": top / "rows.jsonl", "root": top / "files", "mask": "mask"}


def _webdataset(top: Path) -> dict:
    top.mkdir(exist_ok=True)
    with tarfile.open(top / "some.tar", "w") as tar:
        for name in "abcd":
            members = {"png": _png(1), "txt": name.encode(), "mask.png": _png(2, "L"), "edges.png": _png(3)}
            if name == "d":
                members["mask.png"] = b"no image"
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"path": top / "some.tar", "mask": "mask.png", "controls": ["edges.png"]}


def _hub(top: Path) -> dict:
    pytest.importorskip("datasets")
    (top / "dataset").mkdir(parents=True)
    images, masks = [_png(number) for number in range(3)], [_png(5, "L"), _png(6, "L"), b"no image"]
    table = pa.table({"image": images, "text": ["one", "two", "three"], "mask": masks})
    pq.write_table(table, top / "elsewhere.parquet")
    pq.write_table(table, top / "dataset/unused.parquet")
    files = {"train": str(top / "elsewhere.parquet")}
    return {"path": top / "dataset", "format": "hub", "data_files": files, "image": "image", "mask": "mask"}


KINDS = {"folder": _folder, "table": _table, "webdataset": _webdataset, "hub": _hub}


def _moved(settings: dict, old: Path, new: Path) -> dict:
    return yaml.safe_load(yaml.safe_dump(settings).replace(str(old), str(new)))


def _plain(settings: dict) -> dict:
    return yaml.safe_load(json.dumps({"name": "images", **settings}, default=str))


def _content(path: Path) -> str:
    """What a file says, also inside of compressed tables."""
    told = path.read_bytes().decode("latin-1")
    return told + repr(storage.read_table(path).to_pylist()) + repr(pq.read_schema(path)) if path.suffix == ".parquet" else told


def _json(result) -> dict:
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_moved_is_the_same_dataset_and_cache(kind, ftk, workspace, tmp_path):
    old, new = tmp_path / "old-place", tmp_path / "new-place"
    settings = _plain(KINDS[kind](old))
    data = {"sources": [settings], "max_reject_fraction": 1.0, "resolutions": [64], "workers": 1}
    run_file = workspace(data=data)
    before = _json(ftk("prepare", run_file, "--json"))
    assert _json(ftk("cache", run_file, "--json"))["num_latents_encoded"] > 0
    work = tmp_path / "work"
    written = [path for part in ("prepared", "cache") for path in (work / part).rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [path for path in written if str(tmp_path) in _content(path)] == []

    fingerprint = storage.read_json(work / "prepared/dataset.json")["fingerprint"]
    shutil.copytree(old, new)
    shutil.rmtree(old)
    moved = workspace_again(run_file, _moved(settings, old, new))
    assert ftk("train", moved, "--dry-run").code == 0
    unchanged = _json(ftk("cache", moved, "--json"))
    assert unchanged["num_latents_encoded"] == unchanged["num_texts_encoded"] == 0
    after = _json(ftk("prepare", moved, "--json"))
    assert after["num_shards_reused"] == before["num_shards"]
    assert {**after, "num_shards_reused": 0} == {**before, "num_shards_reused": 0}
    assert storage.read_json(work / "prepared/dataset.json")["fingerprint"] == fingerprint
    assert ftk("train", moved, "--set", "train.steps=1").code == 0


def workspace_again(run_file: Path, settings: dict) -> Path:
    tree = yaml.safe_load(run_file.read_text())
    tree["data"]["sources"] = [settings]
    moved = run_file.with_name("moved.yaml")
    moved.write_text(yaml.safe_dump(tree))
    return moved


@pytest.fixture
def masked(ftk, workspace, tmp_path):
    """A run file over a folder with masks and two folders of control images, prepared and cached."""
    settings = _plain(_folder(tmp_path / "top"))
    run_file = workspace(data={"sources": [settings], "max_reject_fraction": 1.0, "resolutions": [64], "workers": 1})
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    return run_file


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda source: source.pop("masks"), "data.sources.images.masks: expected nothing, found a place"),
        (lambda source: source.pop("controls"), "data.sources.images.controls: expected nothing, found ['a place', 'a place']"),
        (lambda source: source["controls"].pop(), "images.controls: expected ['a place'], found ['a place', 'a place']"),
    ],
)  # fmt: skip
def test_whether_there_are_masks_and_how_many_controls_still_counts(change, what, ftk, masked):
    tree = yaml.safe_load(masked.read_text())
    change(tree["data"]["sources"][0])
    masked.write_text(yaml.safe_dump(tree))
    for command, advice in (("cache", "Run `ftk prepare RUN.yaml`"), ("train", "Run `ftk prepare RUN.yaml`, then `ftk cache")):
        result = ftk(command, masked)
        assert result.code == 2
        assert what in result.err
        assert advice in result.err


def test_a_workspace_that_names_places_is_accepted_and_forgets_them(ftk, masked, tmp_path):
    """As versions before wrote it."""
    source = {"masks": str(tmp_path / "gone/m"), "controls": [str(tmp_path / "gone/c"), "relative"]}
    manifest = tmp_path / "work/prepared/dataset.json"
    prepared = storage.read_json(manifest)
    prepared["recipe"]["sources"]["images"] |= source
    storage.commit_json(manifest, prepared)
    cache = tmp_path / "work/cache"
    plain = storage.read_json(cache / view.MANIFEST)
    plain["prepared_recipe"]["sources"]["images"] |= source
    old = contracts.CacheManifest(**plain)
    storage.commit_json(cache / view.MANIFEST, {**plain, "digest": view._digest(old)})

    assert ftk("train", masked, "--dry-run").code == 0
    report = _json(ftk("cache", masked, "--json"))
    assert report["num_latents_encoded"] == report["num_texts_encoded"] == 0
    assert "gone" not in (cache / view.MANIFEST).read_text()
    assert _json(ftk("prepare", masked, "--json"))["num_shards_reused"] == 1
    assert "gone" not in manifest.read_text()


def test_every_kind_of_source_says_which_settings_are_places():
    found = {}
    for kind in sources.available():
        config = sources.SourceConfig(path="x", format=kind)
        found[kind] = set(sources.places(config))
    assert found == PLACES


@pytest.mark.parametrize("kind", PLACES)
def test_no_place_of_any_setting_stays(kind):
    config = sources.SourceConfig(path="x", format=kind)
    for name in PLACES[kind]:
        for place in ("/a/place-0", "s3://bucket/place-0", "~/place-0", "../place-0", "file:///place-0"):
            for value in (place, [place, place], {"train": place, "test": [place]}):
                kept = sources.without_places(config, {name: value, "image": place})
                assert kept["image"] == place
                assert "place-0" not in repr(kept[name])
                assert repr(kept[name]).count(sources.A_PLACE) == repr(value).count("place-0")
        assert sources.without_places(config, {name: None}) == {name: None}


def test_files_of_the_dataset_itself_are_no_places():
    config = sources.SourceConfig(path="x", format="hub")
    for value in ("a/*.parquet", ["a.parquet", "b/c.parquet"], {"train": "a.parquet"}):
        assert sources.without_places(config, {"data_files": value}) == {"data_files": value}
