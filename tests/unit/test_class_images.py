"""Class images: which settings are refused, what counts as there, what is missing, and what the record says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftk.configs import load
from ftk.configs.schema import RunConfig, SourceConfig
from ftk.deliver import draw_class_images as drawing
from ftk.errors import ConfigError, SourceError
from ftk.pipeline import class_images, dataset, stage
from ftk.pipeline.class_images import ClassImages
from ftk.pipeline.sources import base as sources
from ftk.run import Run, resolve

REPOSITORY = Path(__file__).parents[2]
GENERATE = {"prompt": "a photo of a dog", "count": 6}
MODEL = {"family": "stable-diffusion", "path": "models/base"}


def _config(folder: Path, source: dict[str, Any] | None = None, **generate: Any) -> RunConfig:
    tree = {
        "run": "test",
        "workspace": str(folder.parent / "work"),
        "model": MODEL,
        "data": {
            "sources": [{"path": str(folder), "role": "class", "generate": {**GENERATE, **generate}, **(source or {})}],
            "resolutions": [100],
        },
    }
    return load.validate(RunConfig, tree, "run.yaml")


def _run(folder: Path, **generate: Any) -> Run:
    return resolve(_config(folder, **generate))


def _put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never decoded here")


def _found(folder: Path, **generate: Any) -> ClassImages:
    (one,) = class_images.wanted(_run(folder, **generate))
    return one


def _record(folder: Path, **changes: Any) -> None:
    config = _config(folder)
    one = _found(folder)
    record = {"schema_version": 1, "generate": one.settings, "model": config.model.model_dump(), "weights": {"unet": "abc"}}
    path = folder / "generated" / "generated.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, **changes}))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"role": "instance"}, r"`data\.sources\.0`: `generate` draws class images: it needs `role: class`"),
        ({"path": "s3://bucket/dogs"}, "a folder of this machine"),
        ({"path": "dogs.jsonl"}, "a folder of this machine"),
        ({"format": "hub"}, "a folder of this machine"),
        ({"captions_from": "name"}, "leave `captions_from` out"),
        ({"masks": "masks"}, "leave `masks`, `controls` and `references` out"),
        ({"controls": ["depth"]}, "leave `masks`, `controls` and `references` out"),
        ({"generate": {"promt": "a dog"}}, r"`data\.sources\.0\.generate\.promt` is not a setting\. Did you mean `prompt`"),
        ({"generate": {}}, r"`data\.sources\.0\.generate\.prompt` is missing"),
        ({"generate": {**GENERATE, "count": 0}}, r"`data\.sources\.0\.generate\.count`"),
        ({"generate": {**GENERATE, "prompt": "half \ud83d"}}, r"`data\.sources\.0\.generate\.prompt`"),
        ({"generate": {**GENERATE, "negative_prompt": "half \ud83d"}}, "half of a surrogate pair"),
        ({"generate": {**GENERATE, "guidance_scale": 1, "negative_prompt": "x"}}, "without `guidance_scale above 1`"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_the_file_is_read(tmp_path: Path, source: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _config(tmp_path / "dogs", source)


def test_the_kind_of_source_keeps_the_section(tmp_path: Path) -> None:
    (source,) = _config(tmp_path / "dogs", {"caption_lines": True}).data.sources
    kind, settings = sources.parse(source)
    assert kind is sources.get("folder")
    assert settings.generate == source.generate


@pytest.mark.parametrize(
    ("generate", "told"),
    [
        ({"prompt": " "}, "`generate.prompt` is empty"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"width": 96}, "96 x 64 px; stable-diffusion needs multiples of 64 px"),
    ],
)
def test_a_prompt_or_size_that_cannot_be_drawn_is_refused(tmp_path: Path, generate: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _found(tmp_path / "dogs", **generate)


def test_the_size_is_the_first_resolution_that_the_family_can_draw(tmp_path: Path) -> None:
    assert _found(tmp_path / "dogs").size == (64, 64)
    assert _found(tmp_path / "dogs", height=192).size == (64, 192)


def test_all_images_of_the_folder_count_and_drawn_ones_fill_the_gaps(tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    assert (_found(folder).num_missing, _found(folder).missing) == (6, [0, 1, 2, 3, 4, 5])
    _put(folder, "mine.jpg", "mine.txt", "more/00000.webp", ".hidden.png", "generated/notes.md")
    assert (_found(folder).num_found, _found(folder).missing) == (2, [0, 1, 2, 3])
    _put(folder, "generated/00001.png", "generated/00001.txt", "generated/00003.JPG", "generated/more/00000.png")
    assert (_found(folder).num_found, _found(folder).missing) == (5, [0])
    assert _found(folder, count=8).missing == [0, 2, 4]
    assert (_found(folder, count=3).num_missing, _found(folder, count=3).missing) == (0, [])


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "dogs").write_text("no folder")
    with pytest.raises(SourceError, match=r"dogs, where class images are to lie, cannot be listed: Not a directory"):
        _found(tmp_path / "dogs")


def test_missing_images_are_counted_with_the_command_that_draws_them(tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    _put(folder, "mine.jpg")
    with pytest.raises(SourceError, match="holds 1 of the 6 class images") as caught:
        stage.run(_run(folder))
    assert "`ftk prepare RUN.yaml --make-class-images` draws the other 5" in str(caught.value)
    assert not (tmp_path / "work").exists()
    assert stage.dry_run(_run(folder))["num_class_images_to_draw"] == {"dogs": 5}
    assert stage.dry_run(_run(tmp_path / "none"))["num_class_images_to_draw"] == {"none": 6}


def test_what_else_is_wrong_is_said_before_anything_is_drawn(tmp_path: Path) -> None:
    config = _config(tmp_path / "dogs")
    both = config.data.model_copy(update={"sources": (SourceConfig(path=str(tmp_path / "photos")), *config.data.sources)})
    with pytest.raises(SourceError, match="photos does not exist"):
        stage.check(resolve(config.model_copy(update={"data": both})))
    assert [one.num_missing for one in stage.check(resolve(config))] == [6]


@pytest.mark.parametrize(
    ("generate", "told"),
    [
        ({"prompt": "a photo of a cat"}, "generate.prompt: expected 'a photo of a cat', found 'a photo of a dog'"),
        ({"negative_prompt": ""}, "generate.negative_prompt: expected '', found ' '"),
        ({"seed": 3}, "generate.seed: expected 3, found 0"),
        ({"width": 128}, "generate.width: expected 128, found 64"),
        ({"num_inference_steps": 31}, "generate.num_inference_steps: expected 31, found 30"),
        ({"guidance_scale": 5}, "generate.guidance_scale: expected 5.0, found 4.0"),
        ({"dtype": "float32"}, "generate.dtype: expected 'float32', found 'bfloat16'"),
    ],
)
def test_images_drawn_with_other_settings_are_refused_with_a_table(tmp_path: Path, generate: dict[str, Any], told: str) -> None:
    folder = tmp_path / "dogs"
    _put(folder, *(f"generated/{index:05d}.png" for index in range(6)))
    _record(folder)
    for prepare in (stage.run, stage.dry_run):
        with pytest.raises(SourceError) as caught:
            prepare(_run(folder, **generate))
        lines = str(caught.value).splitlines()
        assert lines[1:-1] == [f"  {told}"]
        assert f"delete {folder}/generated" in lines[-1]
        assert "another place" not in lines[-1]


def test_what_does_not_shape_the_images_may_change(tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    _put(folder, *(f"generated/{index:05d}.png" for index in range(6)))
    _record(folder)
    run = _run(folder, count=5, batch_size=4, device="cpu")
    class_images.refuse_changes(class_images.wanted(run), run.config.model)


def test_a_model_of_another_name_is_refused_and_told_how_it_may_be_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    _put(folder, "generated/00000.png")
    _record(folder, model={**MODEL, "revision": None, "path": "elsewhere/base"})
    run = _run(folder)
    with pytest.raises(SourceError, match=r"model\.path: expected 'models/base', found 'elsewhere/base'") as caught:
        class_images.refuse_changes(class_images.wanted(run), run.config.model)
    assert "If it is the same model in another place" in str(caught.value)
    with pytest.raises(SourceError, match=r"weights\.unet: expected 'xyz', found 'abc'"):
        _found(folder).refuse_changes({"weights": {"unet": "xyz"}})


def test_a_record_without_images_counts_for_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "dogs"
    _put(folder, "mine.png", "generated/00000.txt")
    _record(folder, generate={"prompt": "a cat"})
    assert _found(folder).record is None
    _put(folder, "generated/00000.png")
    assert _found(folder).record is not None


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"schema_version": 1}', '{"schema_version": 9}', "\xff"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "dogs"
    _put(folder, "generated/00000.png")
    (folder / "generated" / "generated.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=r"generated\.json (is damaged|has schema version).* Delete \S+/generated:"):
        assert _found(folder).record


def test_batches_are_whole_whatever_is_missing_of_them() -> None:
    assert list(drawing._batches([1, 2, 7, 8], 3)) == [(range(3), {1, 2}), (range(6, 9), {7, 8})]
    assert list(drawing._batches([0, 2], 1)) == [(range(1), {0}), (range(2, 3), {2})]


def test_every_image_of_every_seed_has_noise_of_its_own() -> None:
    seeds = {drawing._seed(seed, index) for seed in range(20) for index in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_to_be_drawn_is_no_part_of_the_prepared_dataset(tmp_path: Path) -> None:
    assert dataset.recipe(_config(tmp_path / "dogs")) == dataset.recipe(_config(tmp_path / "dogs", prompt="a cat"))


def test_the_run_file_and_the_recipe_of_the_guide_are_valid() -> None:
    guide = (REPOSITORY / "docs" / "dreambooth.md").read_text()
    _, _, rest = guide.partition("<!-- run file -->\n```yaml\n")
    shown = load.validate(RunConfig, yaml.safe_load(rest.partition("```")[0]), "docs/dreambooth.md")
    recipe = load.load(load.RECIPES / "dreambooth.yaml")
    assert "--recipe dreambooth" in guide
    for config in (shown, recipe):
        photos, classes = config.data.sources
        assert (photos.role, classes.role) == ("instance", "class")
        assert classes.generate is not None
        assert classes.generate.count == 200
        assert (config.train.class_ratio, config.train.loss.prior_weight) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("resolutions", "size"), [([100], (64, 64)), (["512x320", 64], (512, 320)), (["native"], (512, 512))], ids=str
)
def test_class_images_are_drawn_at_the_first_size_of_their_source(
    tmp_path: Path, resolutions: list[Any], size: tuple[int, int]
) -> None:
    folder = tmp_path / "dogs"
    own = resolve(_config(folder, {"resolutions": resolutions}))
    (found,) = class_images.wanted(own)
    assert found.size == size
