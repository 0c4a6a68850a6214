"""Control images that `ftk prepare` makes: the command, its report, and the page that shows them."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import measured, needs_browser
from PIL import Image

from ftk.pipeline.dataset import PreparedDataset

CONTROLS = [{"make": "canny", "low": 40}, {"make": "holes"}, {"make": "blocks", "size": 16}]


@pytest.fixture
def prepare(ftk: Callable[..., Any], tmp_path: Path, pictures: Path) -> Callable[..., Any]:
    """Prepare a folder with the given settings of its source; the command's result."""
    if not (tmp_path / "photos").exists():
        shutil.copytree(pictures, tmp_path / "photos")

    def call(source: dict[str, Any], *options: str, work: str = "work", **data: Any) -> Any:
        return _prepared(ftk, tmp_path, {"path": str(tmp_path / "photos"), **source}, *options, work=work, **data)

    return call


def _prepared(ftk: Callable[..., Any], folder: Path, source: dict[str, Any], *options: str, work: str, **data: Any) -> Any:
    run = {
        "run": "r", "workspace": str(folder / work), "model": {"family": "qwen-image", "path": "none"},
        "data": {"sources": [source], "resolutions": [64], "workers": 1, **data},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return ftk("prepare", folder / "run.yaml", "--json", *options)


def _shards(work: Path) -> dict[str, bytes]:
    files = sorted((work / "prepared/shards").iterdir())
    return {path.name: path.read_bytes() for path in files if path.suffix in (".tar", ".parquet")}


def test_made_controls_have_the_same_bytes_whatever_the_workers_and_parts_and_are_made_once(prepare, tmp_path):
    settings = {"flip": True, "crop": "random", "crops": 2, "shard_samples": 5}
    planned = json.loads(prepare({"controls": CONTROLS}, "--dry-run", **settings).out)
    first = json.loads(prepare({"controls": CONTROLS}, **settings).out)
    number = first["num_samples"]
    assert first["controls"] == planned["controls"] == {"blocks": number, "canny": number, "holes": number}
    without = json.loads(prepare({}, "--dry-run", **settings).out)
    assert without["controls"] == {}
    assert planned["estimated_bytes"] > 2 * without["estimated_bytes"]
    parts = [
        json.loads(prepare({"controls": CONTROLS}, "--part", part, work="two", **{**settings, "workers": 2}).out)
        for part in ("1/2", "2/2")
    ]
    assert 0 < parts[0]["controls"]["canny"] == parts[0]["num_samples"] < number
    assert parts[1]["controls"] == first["controls"]
    assert _shards(tmp_path / "work") == _shards(tmp_path / "two")
    spelt_out = [{"make": "canny", "low": 40, "high": 200}, {"make": "holes", "seed": 0}, CONTROLS[2]]
    again = json.loads(prepare({"controls": spelt_out}, **settings).out)
    assert again["num_shards_reused"] == again["num_shards"] == 3


def test_a_dataset_is_the_same_whether_its_controls_were_made_or_given(prepare, tmp_path):
    shutil.rmtree(tmp_path / "photos")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    prepare({"controls": CONTROLS, "caption": "a photo"}, work="made")
    made = PreparedDataset.open(tmp_path / "made/prepared")
    folders = [tmp_path / f"given{number}" for number in range(len(CONTROLS))]
    for row in made.rows():
        for folder, data in zip(folders, made.control_bytes(row), strict=True):
            folder.mkdir(exist_ok=True)
            (folder / f"{row.key[0]}.png").write_bytes(data)
    prepare({"controls": list(map(str, folders)), "caption": "a photo"}, work="given")
    given = PreparedDataset.open(tmp_path / "given/prepared")
    assert made.manifest.num_samples == 3
    for one, other in zip(made.rows(), given.rows(), strict=True):
        assert replace(one, control_ids=[]) == replace(other, control_ids=[])
        assert len(set(one.control_ids)) == len(set(other.control_ids)) == one.num_controls == 3
        assert made.image_bytes(one) == given.image_bytes(other)
        assert made.control_bytes(one) == given.control_bytes(other)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"make": "kanny"}, "controls.0: there is no kind 'kanny'. Did you mean `canny`?"),
        ({"make": "canny", "hgih": 5}, "`hgih` is not a setting. Did you mean `high`?"),
        ({"make": "no_such_module:depth"}, "no_such_module cannot be imported"),
    ],
)
def test_a_mistake_in_what_is_made_ends_with_code_2_and_nothing_written(prepare, tmp_path, entry, message):
    for options in ((), ("--dry-run",)):
        result = prepare({"controls": [entry]}, *options)
        assert result.code == 2
        assert message in " ".join(result.err.split())
    assert not (tmp_path / "work").exists()


def test_an_image_is_rejected_where_a_function_of_ones_own_fails(prepare, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/my_wide_controls.py").write_text(
        "def make(image, settings):\n"
        "    print('not for the report')\n"
        "    if image.shape[1] > image.shape[0]:\n"
        "        raise ValueError(settings['why'])\n"
        "    return image[:, :, 0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = {"controls": [{"make": "my_wide_controls:make", "why": "too wide"}]}
    report = json.loads(prepare(source, max_reject_fraction=0.9).out)
    assert 0 < report["rejects_by_reason"]["control_not_made"] < report["num_inputs"]
    assert report["controls"] == {"my_wide_controls:make": report["num_samples"]}
    assert {row["detail"] for row in report["rejects"]} == {"my_wide_controls:make: ValueError: too wide"}
    dataset = PreparedDataset.open(tmp_path / "work/prepared")
    row = dataset.rows()[0]
    image, control = (
        np.asarray(Image.open(io.BytesIO(data))) for data in (dataset.image_bytes(row), *dataset.control_bytes(row))
    )
    assert (control == image[:, :, :1]).all()


@pytest.fixture(scope="module")
def inspected(ftk: Callable[..., Any], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a dataset with masks, given and made controls, and its page; read only."""
    folder = tmp_path_factory.mktemp("inspected")
    shutil.copytree(pictures, folder / "depth", ignore=shutil.ignore_patterns("*.txt"))
    depth = str(folder / "depth")
    source = {"path": str(pictures), "masks": depth, "controls": [depth, *CONTROLS]}
    result = _prepared(ftk, folder, source, work="work")
    assert result.code == ftk("inspect", folder / "work", "--html").code == 0
    return folder / "work"


def test_the_page_shows_the_controls_beside_their_image_with_their_kind(inspected, ftk):
    summary = json.loads(ftk("inspect", inspected, "--json").out)
    number = summary["num_samples"]
    assert summary["controls"] == {"blocks": number, "canny": number, "given": number, "holes": number}
    assert f"canny: {number}, given: {number}" in " ".join(ftk("inspect", inspected).out.split())
    page = (inspected / "prepared/inspect.html").read_text()
    for label in ("given", "canny, low 40", "holes", "blocks, size 16"):
        assert page.count(f"<figcaption>{label}</figcaption>") == number
    assert str(inspected.parent) not in page.replace(str(inspected), "")


@needs_browser
def test_the_page_with_controls_fits_a_small_window(inspected, tmp_path):
    seen = measured(inspected / "prepared/inspect.html", tmp_path, 400)
    number = PreparedDataset.open(inspected / "prepared").manifest.num_samples
    assert seen["images"] == seen["decoded"] >= number * 5
    assert not seen["overflow"]
