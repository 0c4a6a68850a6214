"""Control images that are made from the images themselves: what each kind draws, and where they go."""

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from ftk.configs import load
from ftk.configs.schema import RunConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError
from ftk.pipeline import dataset, images, prompt_images, source_units, stage
from ftk.pipeline.conditions import base as conditions
from ftk.pipeline.images import ImageProblem, PreparedImage, prepare_image
from ftk.pipeline.reachability import Reachability
from ftk.pipeline.shard_writer import PrepareJob, worked
from ftk.run import Run, resolve

Function = Callable[..., str]


def _photo(width: int = 96, height: int = 80, seed: int = 0) -> Image.Image:
    """Shapes with edges of all directions on a soft background, and some noise."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(60, 180, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None] * [1, 0, -1]
    image = Image.fromarray((ramp + random.normal(0, 3, (height, width, 3))).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), (220, 30, 40))
    draw.polygon([(width // 2, height - 4), (width - 4, height - 8), (width * 3 // 4, height // 3)], (20, 200, 90))
    return image


def _make(entry: dict[str, Any], image: Image.Image | np.ndarray, key: str = "key") -> np.ndarray:
    return conditions.parse(entry, "controls.0").of(np.asarray(image), key)


def _file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Function]:
    """Write a module of the user's with a function `make`; gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    written: list[str] = []

    def write(body: str, name: str = f"user_controls_{tmp_path.name}") -> str:
        name = "".join(letter if letter.isalnum() else "_" for letter in name)
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / f"{name}.py").write_text(f"import numpy as np\ndef make(image, settings):\n    {body}\n")
        written.append(name)
        return f"{name}:make"

    yield write
    for name in written:
        sys.modules.pop(name, None)


# --- What each kind draws ---


@pytest.mark.parametrize("kind", conditions.available())
@pytest.mark.parametrize("size", [(96, 80), (16, 16), (1, 3), (61, 130)])
def test_each_kind_gives_an_rgb_image_of_the_same_size_and_leaves_the_photo_as_it_is(kind: str, size: tuple[int, int]) -> None:
    photo = np.asarray(_photo(96, 160).resize(size)).copy()
    before = photo.copy()
    control = _make({"make": kind}, photo)
    assert (control.shape, control.dtype) == (photo.shape, np.uint8)
    assert (photo == before).all()
    assert (control == _make({"make": kind}, photo)).all()


@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60), (0, 0)])
def test_canny_edges_are_opencvs_white_on_black(low: int, high: int) -> None:
    photo = _photo()
    control = _make({"make": "canny", "low": low, "high": high}, photo)
    expected = cv2.Canny(np.asarray(photo), low, high)
    assert set(np.unique(expected)) == {0, 255}
    assert (control == expected[:, :, None]).all()


def test_soft_edges_are_the_strength_of_scharrs_gradient() -> None:
    photo = np.asarray(_photo())
    border = cv2.BORDER_REPLICATE
    for sigma, gain in ((1.0, 4.0), (0.0, 1.0), (2.5, 2.0)):
        blurred = cv2.GaussianBlur(photo.astype(float), (0, 0), sigma, borderType=border) if sigma else photo.astype(float)
        across, down = (cv2.Scharr(blurred, cv2.CV_64F, *way, scale=1 / 16, borderType=border) for way in ((1, 0), (0, 1)))
        expected = (gain * np.hypot(across, down).max(axis=2)).clip(0, 255)
        control = _make({"make": "soft-edges", "sigma": sigma, "gain": gain}, photo)
        assert np.abs(control.astype(float) - expected[:, :, None]).max() <= 0.7
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:] = 255
    assert _make({"make": "soft-edges", "sigma": 0, "gain": 1}, step)[4, :, 0].tolist() == [0, 0, 0, 255, 255, 0, 0, 0]


def test_grayscale_is_the_luma() -> None:
    photo = _photo()
    control = _make({"make": "grayscale"}, photo).astype(int)
    assert np.abs(control - cv2.cvtColor(np.asarray(photo), cv2.COLOR_RGB2GRAY)[:, :, None]).max() <= 1


def test_low_resolution_keeps_what_is_coarse_and_loses_what_is_fine() -> None:
    coarse = np.sin(np.linspace(0, 4 * np.pi, 128, endpoint=False))
    fine = np.sin(np.linspace(0, 80 * np.pi, 128, endpoint=False))
    waves = np.stack([coarse[None, :].repeat(128, 0), fine[None, :].repeat(128, 0), fine[:, None].repeat(128, 1)], axis=2)
    photo = (127.5 + 100 * waves).round().astype(np.uint8)
    control = _make({"make": "low-resolution", "factor": 4}, photo).astype(float) - photo.mean(axis=(0, 1))
    assert np.abs(control[8:-8, 8:-8, 0] - 100 * waves[8:-8, 8:-8, 0]).max() < 8
    assert np.abs(control[8:-8, 8:-8, 1:]).max() < 8


def test_blocks_are_the_means_of_their_pixels() -> None:
    photo = np.asarray(_photo(96, 64))
    control = _make({"make": "blocks", "size": 16}, photo)
    means = photo.reshape(4, 16, 6, 16, 3).mean(axis=(1, 3))
    assert np.abs(control.reshape(4, 16, 6, 16, 3) - means[:, None, :, None]).max() <= 0.5
    # Where no whole number of blocks fits, they are a little larger or smaller.
    uneven = _make({"make": "blocks", "size": 16}, photo[:, :89])
    assert np.diff(np.flatnonzero(np.abs(np.diff(uneven.astype(int), axis=1)).any(axis=(0, 2)))).tolist() == [15, 15, 15, 15]


def test_blocks_of_few_colours_have_no_more_of_them() -> None:
    photo = _photo()
    many, few = (_make({"make": "blocks", "size": 8, "colours": number}, photo).reshape(-1, 3) for number in (256, 5))
    assert (many == _make({"make": "blocks", "size": 8}, photo).reshape(-1, 3)).all()
    assert 2 < len(np.unique(few, axis=0)) <= 5
    assert np.abs(few.astype(int) - many).mean() < 25


@pytest.mark.parametrize("share", [(0.2, 0.2), (0.05, 0.6), (0.9, 0.95)])
def test_holes_cover_the_share_that_is_asked_for(share: tuple[float, float]) -> None:
    photo = np.full((72, 96, 3), 200, np.uint8)
    covered = [(_make({"make": "holes", "share": share}, photo, f"image {n}") == 0).all(axis=2).mean() for n in range(20)]
    assert share[0] - 1e-3 <= min(covered)
    assert max(covered) <= share[1] + 1e-3
    assert (np.ptp(covered) > 0.2) == (share == (0.05, 0.6))


def test_the_mask_of_holes_is_white_where_the_image_has_them() -> None:
    photo = np.asarray(_photo())
    holes = _make({"make": "holes", "seed": 4, "fill": "gray"}, photo)
    mask = _make({"make": "holes", "seed": 4, "output": "mask"}, photo)
    assert set(np.unique(mask)) == {0, 255}
    assert (holes == np.where(mask == 255, 127, photo)).all()
    others = [({"seed": 5}, "key"), ({"seed": 4}, "another image")]
    assert all((_make({"make": "holes", "output": "mask", **more}, photo, key) != mask).any() for more, key in others)


def test_holes_stay_where_they_are_from_version_to_version() -> None:
    mask = _make({"make": "holes", "output": "mask"}, np.zeros((10, 40, 3), np.uint8))[:, :, 0]
    assert ["".join(".#"[int(value > 0)] for value in row) for row in mask] == [
        ".#..........................############",
        "#.........##############################",
        "#.........####################..........",
        "#.........###################...########",
        "#.##........#############.......########",
        "##.........###..###.............########",
        "...........#....#..#............########",
        "..........#.....##..............########",
        "..................#.....................",
        "........................................",
    ]


# --- A function of the user's own ---


def test_a_function_of_ones_own_gets_the_image_and_its_settings(function: Function) -> None:
    photo = _photo()
    invert = function("image[:] = settings['white'] - image; print('noise'); return image")
    assert (_make({"make": invert, "white": 255}, photo) == 255 - np.asarray(photo)).all()


def test_a_function_may_give_a_gray_image_or_a_pillow_image(function: Function, capsys: pytest.CaptureFixture[str]) -> None:
    photo = _photo()
    for number, expression in enumerate(("image[:, :, 0]", "image[:, :, :1]", "Image.fromarray(image[:, :, 0])")):
        name = function(f"from PIL import Image; print('noise'); return {expression}", f"gray{number}")
        assert (_make({"make": name}, photo) == np.asarray(photo)[:, :, :1]).all()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("raise KeyError('no such thing')", "make: KeyError: 'no such thing'"),
        ("return image[:10]", "gave an array of (10, 64, 3) and uint8, not of (64, 64, 3) and uint8"),
        ("return image / 255", "and float64, not of (64, 64, 3) and uint8"),
        ("return None", "gave an array of () and object"),
        ("return image[:, :, [0, 1, 2, 2]]", "gave an array of (64, 64, 4)"),
    ],
    ids=["raises", "cropped", "floats", "none", "rgba"],
)
def test_an_image_is_rejected_where_the_function_fails(function: Function, body: str, detail: str) -> None:
    problem = _prepared(_photo(64, 64), [{"make": function(body)}])
    assert isinstance(problem, ImageProblem)
    assert problem.reason == RejectReason.CONTROL_NOT_MADE
    assert detail in problem.detail


@pytest.mark.parametrize(
    ("make", "match"),
    [
        ("ftk_has_no_such_module:depth", "ftk_has_no_such_module cannot be imported (ModuleNotFoundError"),
        ("json:dumbs", "json has no function dumbs. Did you mean `dumps`?"),
        ("json:decoder", "decoder is not a function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused_before_anything_is_done(make: str, match: str) -> None:
    with pytest.raises(ConfigError) as error:
        stage.image_recipes(_run("photos", [{"make": make}]))
    assert match in str(error.value)


def test_a_module_that_fails_while_it_is_imported_is_refused(function: Function, tmp_path: Path) -> None:
    name = function("return image", "broken")
    (tmp_path / "modules/broken.py").write_text("raise RuntimeError('no licence')")
    with pytest.raises(ConfigError, match=r"broken cannot be imported \(RuntimeError: no licence\)"):
        stage.image_recipes(_run("photos", [{"make": name}]))


def test_canny_without_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r'pip install "ftk\[canny\]"'):
        stage.image_recipes(_run("photos", [{"make": "canny"}]))
    stage.image_recipes(_run("photos", [{"make": "soft-edges"}]))


# --- What may be written ---


def _run(path: str | Path, controls: Any, data: dict[str, Any] | None = None, **source: Any) -> Run:
    tree = {
        "run": "test", "model": {"family": "qwen-image", "path": "nowhere"},
        "data": {
            "sources": [{"path": str(path), "name": "photos", "caption": "a photo", "controls": controls, **source}],
            "resolutions": [64], "max_aspect": 1.0, **(data or {}),
        },
    }  # fmt: skip
    return resolve(load.validate(RunConfig, tree, "run.yaml"))


@pytest.mark.parametrize(
    ("controls", "match"),
    [
        ([{"make": "cany"}], "controls.0: there is no kind 'cany'. Did you mean `canny`? Valid: blocks, canny,"),
        (["pose", {"make": "base"}], "controls.1: there is no kind 'base'"),
        ([{"mkae": "canny"}], "controls.0: an entry with settings says what to make, for example {make: canny}. Did you mean"),
        ([{"make": None}], "says what to make"),
        (
            [{"make": "canny", "lwo": 3}],
            "controls.0 (canny): `lwo` is not a setting. Did you mean `low`? Valid here: low, high",
        ),
        ([{"make": "canny", "low": 300}], "`low` 300 lies above `high` 200"),
        ([{"make": "canny", "low": -1}], "greater than or equal to 0"),
        ([{"make": "grayscale", "gamma": 2}], "`gamma` is not a setting"),
        ([{"make": "low-resolution", "factor": 1}], "greater than 1"),
        ([{"make": "blocks", "colors": 4}], "Did you mean `colours`?"),
        ([{"make": "holes", "share": [0.5, 0.1]}], "`share`: write two numbers above 0 and below 1, the least first"),
        ([{"make": "holes", "share": [0.0, 0.5]}], "`share`"),
        ([{"make": "holes", "output": "mask", "fill": "white"}], "`fill` has no effect without `output: image`"),
        ([{"make": "my controls:depth"}], "is not the name of a function: write module:function"),
        ([{"make": "json:dumps", "from": "a.png"}], "controls.0: `from` is for sample.prompts"),
        ({"make": "canny"}, "`controls` is a list: write [{make: canny}]"),
    ],
)
def test_mistakes_in_what_is_made_are_named(controls: Any, match: str) -> None:
    with pytest.raises(ConfigError) as error:
        stage.image_recipes(_run("photos", controls))
    assert match in str(error.value)


def test_references_are_not_made_from_the_image() -> None:
    with pytest.raises(ConfigError, match="`references` are given"):
        _run("photos", [], references=[{"make": "low-resolution"}])


def test_a_source_that_only_makes_its_controls_lacks_none() -> None:
    run = _run("photos", [{"make": "canny"}], optional=True)
    with pytest.raises(ConfigError, match="`optional` has no effect"):
        stage.check(run)


def test_class_images_that_are_drawn_can_have_made_controls() -> None:
    generate = {"prompt": "a dog", "count": 2}
    source = _run("dogs", [{"make": "canny"}], role="class", generate=generate).config.data.sources[0]
    assert source.generate is not None
    with pytest.raises(ConfigError, match="`generate` draws no masks"):
        _run("dogs", ["pose", {"make": "canny"}], role="class", generate=generate)


# --- Fingerprints ---


def _fingerprint(run: Run) -> str:
    job = PrepareJob(directory=Path("none"), recipes=stage.image_recipes(run), data=run.config.data)
    unit = source_units.SourceUnit(
        number=0,
        source=run.config.data.sources[0],
        partition=source_units.Partition(payload=(), signature="signature", num_records=0),
        duplicates={},
    )
    return job.recipe_fingerprint(unit)


def test_shards_are_made_again_when_what_is_made_changes_and_not_when_it_is_written_otherwise() -> None:
    entries: list[list[Any]] = [
        [], [{"make": "canny"}], [{"make": "canny", "low": 99}], [{"make": "grayscale"}], ["pose", {"make": "canny"}],
        [{"make": "canny"}, {"make": "grayscale"}], [{"make": "grayscale"}, {"make": "canny"}],
    ]  # fmt: skip
    runs = [_run("photos", controls) for controls in entries]
    assert len({_fingerprint(run) for run in runs}) == len(entries)
    spelt_out = _run("photos", [{"make": "canny", "high": 200.0, "low": 100}])
    assert _fingerprint(spelt_out) == _fingerprint(runs[1])
    assert dataset.recipe(spelt_out.config) == dataset.recipe(runs[1].config)
    assert dataset.recipe(runs[4].config)["sources"]["photos"]["controls"] == ["a place", {"make": "canny"}]


def test_shards_are_made_again_when_the_file_of_the_function_changes(function: Function, tmp_path: Path) -> None:
    name = function("return image", "changing")
    run = _run("photos", [{"make": name}])
    before = _fingerprint(run)
    assert _fingerprint(run) == before
    assert _fingerprint(_run("photos", [{"make": name, "version": 2}])) != before
    (tmp_path / "modules/changing.py").write_text("def make(image, settings):\n    return 255 - image\n")
    assert _fingerprint(run) != before


# --- For sample images ---


def test_a_prompts_control_image_is_made_of_its_file_as_it_is_shown(tmp_path: Path, function: Function) -> None:
    _photo(200, 90).save(tmp_path / "photo.png")
    entry = {"make": "canny", "from": str(tmp_path / "photo.png")}
    plain = prompt_images.find(str(tmp_path / "photo.png"), (64, 48), "controls.0")
    made = prompt_images.find_control(entry, (64, 48), "controls.0")
    shown, edges = (np.asarray(prompt_images.load(each.path, each.width, each.height, each.made)) for each in (plain, made))
    assert (edges == cv2.Canny(shown, 100, 200)[:, :, None]).all()
    others = [{**entry, "low": 50}, {**entry, "make": "grayscale"}, {**entry, "make": function("return image")}]
    assert len({plain.id, made.id, *(prompt_images.find_control(each, (64, 48), "").id for each in others)}) == 5
    assert prompt_images.find_control(str(tmp_path / "photo.png"), (64, 48), "controls.0") == plain


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"make": "canny"}, r"controls.0: say which image it is made from: \{make: canny, from: FILE\}"),
        ({"make": "canny", "form": "a.png"}, "Did you mean `from`"),
        ({"make": "canny", "from": "gone.png"}, "controls.0.from: gone.png cannot be read as an image"),
        ({"make": "cany", "from": "photo.png"}, "controls.0: there is no kind 'cany'. Did you mean `canny`"),
        ({"from": "photo.png"}, "controls.0: an entry with settings says what to make"),
        ({"make": "no_such_module_of_mine:depth", "from": "photo.png"}, "no_such_module_of_mine cannot be imported"),
    ],
)
def test_mistakes_in_a_prompts_made_control_are_named(
    entry: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _photo().save("photo.png")
    with pytest.raises(ConfigError, match=match):
        prompt_images.find_control(entry, (64, 64), "sample.prompts.0.controls.0")


def test_a_prompt_whose_function_fails_says_so(tmp_path: Path, function: Function) -> None:
    _photo().save(tmp_path / "photo.png")
    entry = {"make": function("raise ValueError('no pose here')"), "from": str(tmp_path / "photo.png")}
    made = prompt_images.find_control(entry, (64, 64), "controls.0")
    with pytest.raises(ConfigError, match=r"photo\.png: .*make: ValueError: no pose here"):
        prompt_images.load(made.path, made.width, made.height, made.made)


# --- Where they go ---


class _Here:
    """Works where it is asked to, in place of a pool of processes."""

    def map(self, function: Any, tasks: Any, size: Any) -> Any:
        return map(function, tasks)


def _results(run: Run) -> dict[str, PreparedImage | Reject | ImageProblem]:
    """What becomes of each input of the run's one source, by its name."""
    job = PrepareJob(directory=Path("none"), recipes=stage.image_recipes(run), data=run.config.data)
    source, results = run.config.data.sources[0], {}
    for unit in source_units.units(run.config.data, {}):
        made = worked(source_units.records(unit), job, source, prepare_image, _Here(), Reachability(1.0))  # type: ignore[arg-type]
        for item, result in made:
            results[item.path if isinstance(item, Reject) else item.identity] = item if isinstance(item, Reject) else result  # type: ignore[union-attr]
    return results


def _prepared(image: Image.Image | bytes, controls: list[Any], **settings: Any) -> PreparedImage | ImageProblem:
    data = image if isinstance(image, bytes) else _file(image)
    recipe = stage.image_recipes(_run("photos", controls, settings))["photos"]
    return prepare_image(
        images.ImageTask(image=images.Blob(location="image", data=data), mask=None, controls=(), recipe=recipe)
    )


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("JPEG", {"quality": 60}, {"flip": True}),
        ("PNG", {}, {"crop": "random", "crops": 3, "flip": True}),
        ("PNG", {}, {"image_format": "jpeg", "quality": 40}),
        ("WEBP", {"quality": 30}, {"image_format": "webp", "quality": 50, "aspects": ["1:1", "original"], "crops": 2}),
        ("JPEG", {"quality": 30}, {"resolutions": ["96x80"]}),
    ],
    ids=["mirrored", "crops", "to JPEG", "aspects", "copied"],
)
def test_edges_are_those_of_each_sample_as_it_is_stored(kind: str, options: Any, settings: dict[str, Any]) -> None:
    if "resolutions" in settings:
        settings = {**settings, "max_aspect": 2.0}
    prepared = _prepared(_file(_photo(), kind, **options), [{"make": "canny"}, {"make": "blocks", "size": 16}], **settings)
    assert isinstance(prepared, PreparedImage)
    assert len(prepared.variants) > 1 or settings.keys() & {"resolutions", "image_format"}
    assert all(variant.copied for variant in prepared.variants) == (settings.get("resolutions") is not None)
    for variant in prepared.variants:
        stored = np.asarray(Image.open(io.BytesIO(variant.data)).convert("RGB"))
        edges, blocks = map(_pixels, variant.controls)
        assert (edges == cv2.Canny(stored, 100, 200)[:, :, None]).all()
        assert blocks.shape == stored.shape
    ids = [each for variant in prepared.variants for each in variant.control_ids]
    assert len(set(ids)) == len({variant.image_id for variant in prepared.variants}) * 2


def test_holes_differ_between_an_image_and_its_mirror_image_and_are_the_same_every_time() -> None:
    controls = [{"make": "holes", "output": "mask"}]
    first, again = (_prepared(_photo(), controls, flip=True) for _ in range(2))
    assert first == again
    assert isinstance(first, PreparedImage)
    upright, mirrored = (_pixels(variant.controls[0]) for variant in first.variants)
    assert (upright != mirrored).any()
    assert (upright != mirrored[:, ::-1]).any()


def _given(folder: Path) -> tuple[bytes, bytes]:
    photo, pose = _file(_photo(80, 80, seed=1)), _file(_photo(80, 80, seed=2))
    for name, data in (("photos/a.png", photo), ("poses/a.png", pose)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return photo, pose


def _as_folder(folder: Path) -> dict[str, Any]:
    return {"path": folder / "photos", "pose": str(folder / "poses")}


def _as_table(folder: Path) -> dict[str, Any]:
    (folder / "t.jsonl").write_text(json.dumps({"file_name": "photos/a.png", "pose": "poses/a.png"}))
    return {"path": folder / "t.jsonl"}


def _as_parquet(folder: Path) -> dict[str, Any]:
    photo, pose = _given(folder)
    pq.write_table(pa.table({"image": [photo], "pose": [pose]}), folder / "t.parquet")
    return {"path": folder / "t.parquet"}


def _as_hub(folder: Path) -> dict[str, Any]:
    (folder / "hub").mkdir()
    (folder / "t.parquet").rename(folder / "hub" / "train.parquet") if _as_parquet(folder) else None
    return {"path": folder / "hub", "format": "hub", "image": "image"}


def _as_tar(folder: Path) -> dict[str, Any]:
    from ftk.pipeline.dataset import tar_writer

    photo, pose = _given(folder)
    with (folder / "t.tar").open("wb") as file, tar_writer(file) as tar:
        tar.write({"__key__": "a", "png": photo, "pose": pose})
    return {"path": folder / "t.tar"}


def _as_zip(folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(folder / "t.zip", "w") as archive:
        for name, path in (("a.png", "photos/a.png"), ("p.png", "poses/a.png")):
            archive.write(folder / path, name)
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "a.png", "pose": "p.png"}))
    return {"path": folder / "t.zip"}


@pytest.mark.parametrize("source", [_as_folder, _as_table, _as_parquet, _as_hub, _as_tar, _as_zip])
def test_every_kind_of_source_has_given_and_made_controls_in_the_order_of_its_list(
    source: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    _given(tmp_path)
    settings = source(tmp_path)
    pose = settings.pop("pose", "pose")
    edges, gray = {"make": "canny"}, {"make": "grayscale"}

    def controls(*entries: Any) -> list[bytes]:
        (result,) = _results(_run(controls=list(entries), **settings)).values()
        assert isinstance(result, PreparedImage), result
        assert len(result.variants[0].control_ids) == len(result.variants[0].controls) == len(entries)
        return list(result.variants[0].controls)

    (given,), (canny, luma) = controls(pose), controls(edges, gray)
    assert len({given, canny, luma}) == 3
    assert controls(pose, edges) == [given, canny]
    assert controls(edges, pose, gray) == [canny, given, luma]


def test_a_made_control_keeps_its_place_where_images_have_none_or_several_before_it(tmp_path: Path) -> None:
    _given(tmp_path)
    rows = [
        {"file_name": "photos/a.png", "pose": ["poses/a.png", "photos/a.png"], "depth": "poses/a.png"},
        {"file_name": "photos/a.png", "pose": None, "depth": ["photos/a.png"]},
        {"file_name": "photos/a.png", "pose": None, "depth": None},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def controls(entries: list[Any], **source: Any) -> list[tuple[bytes, ...]]:
        results = _results(_run(tmp_path / "t.jsonl", entries, optional=True, **source)).values()
        return [result.variants[0].controls for result in results if isinstance(result, PreparedImage)]

    given = controls(["pose", "depth"])
    canny, gray = controls(["pose", {"make": "canny"}, {"make": "grayscale"}])[2]
    mixed = controls([{"make": "canny"}, "pose", {"make": "grayscale"}, "depth"])
    assert [len(each) for each in given] == [3, 1, 0]
    assert mixed == [
        (canny, *given[0][:2], gray, given[0][2]),
        (canny, gray, given[1][0]),
        (canny, gray),
    ]  # fmt: skip


def test_a_missing_control_is_called_by_its_place_in_the_list(tmp_path: Path) -> None:
    _given(tmp_path)
    (tmp_path / "none").mkdir()
    controls = [{"make": "canny"}, str(tmp_path / "poses"), str(tmp_path / "none")]
    (reject,) = _results(_run(tmp_path / "photos", controls)).values()
    assert isinstance(reject, Reject)
    assert reject.reason == RejectReason.CONTROL_MISSING
    assert "`controls.2`" in reject.detail


def test_made_controls_are_those_that_would_have_been_given_as_files(tmp_path: Path) -> None:
    kinds = [{"make": kind} for kind in conditions.available()]
    folders = [tmp_path / kind["make"] for kind in kinds]
    photos = {f"{number}.png": _photo(64, 64, number) for number in range(2)}
    (tmp_path / "photos").mkdir()
    for name, photo in photos.items():
        photo.save(tmp_path / "photos" / name)
    made = _results(_run(tmp_path / "photos", kinds))
    for name, result in made.items():
        assert isinstance(result, PreparedImage)
        for folder, control in zip(folders, result.variants[0].controls, strict=True):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(control)
    given = _results(_run(tmp_path / "photos", list(map(str, folders))))
    for name, result in given.items():
        assert isinstance(result, PreparedImage)
        expected = made[name]
        assert isinstance(expected, PreparedImage)
        names = [replace(variant, control_ids=()) for variant in result.variants]
        assert names == [replace(variant, control_ids=()) for variant in expected.variants]
        assert len(result.variants[0].control_ids) == len(kinds)
