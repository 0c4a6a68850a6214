"""Settings of one source: they replace those of `data`, are validated together with them, and touch no other source."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ftk.configs import load
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError
from ftk.pipeline import dataset, source_units, stage
from ftk.pipeline.shard_writer import PrepareJob
from ftk.run import Run, resolve

NO_TAGS = {"tag_shuffles": 0, "tag_separator": ",", "keep_tags": 1, "long_chars": 7}
TAGS = {"tag_shuffles": 3, "keep_tags": 2, "long_chars": 7}


def _run(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **data: Any) -> Run:
    sources = [{"path": "a", **(first or {})}, {"path": "b", **(second or {})}]
    tree = {"run": "test", "model": {"family": "qwen-image", "path": "nowhere"}, "data": {"sources": sources, **data}}
    return resolve(load.validate(RunConfig, tree, "run.yaml"))


def _settings(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **data: Any) -> tuple[Any, Any]:
    config = _run(first, second, **data).config.data
    one, two = (config.of(source) for source in config.sources)
    return one, two


def test_a_source_says_for_itself_what_it_says_and_takes_the_rest_from_data() -> None:
    one, two = _settings({"resolutions": ["512x288"], "flip": True}, {"crop": "random", "crops": 4}, resolutions=[256])
    assert (one.resolutions, one.flip, one.crop, one.crops) == (("512x288",), True, "center", 1)
    assert (two.resolutions, two.flip, two.crop, two.crops) == ((256,), False, "random", 4)


def test_without_settings_of_its_own_a_source_has_those_of_data() -> None:
    config = _run(flip=True, resolutions=[512], captions=TAGS).config.data
    assert all(config.of(source) is config for source in config.sources)


def test_settings_of_captions_are_replaced_one_by_one() -> None:
    one, two = _settings({"captions": {"keep_tags": 5}}, captions=TAGS)
    assert one.captions.model_dump() == {"tag_separator": ",", **TAGS, "keep_tags": 5}
    assert two.captions.model_dump() == {"tag_separator": ",", **TAGS}


def test_captions_that_name_columns_leave_room_for_settings() -> None:
    run = _run({"path": "t.jsonl", "captions": ["alt"], "caption_settings": {"tag_shuffles": 2}})
    source = run.config.data.sources[0]
    assert source.settings == {"captions": ["alt"]}
    assert run.config.data.of(source).captions.tag_shuffles == 2
    with pytest.raises(ConfigError, match="write them once"):
        _run({"captions": {"keep_tags": 2}, "caption_settings": {"keep_tags": 2}})


@pytest.mark.parametrize(
    ("first", "data", "kept"),
    [
        ({"crop": "center"}, {"crop": "random", "crops": 4}, {"crops": 1}),
        ({"resolutions": ["512x288"]}, {"bucket_step": 64, "max_aspect": 3.0}, {"bucket_step": None, "max_aspect": 2.0}),
        ({"captions": {"tag_shuffles": 0}}, {"captions": TAGS}, {"captions": NO_TAGS}),
    ],
    ids=["crops", "steps", "captions"],
)  # fmt: skip
def test_common_settings_without_effect_beside_a_sources_own_are_left_out_for_it(
    first: dict[str, Any], data: dict[str, Any], kept: dict[str, Any]
) -> None:
    one, two = _settings(first, **data)
    assert one.model_dump(include=set(kept)) == kept
    assert all(getattr(two, name) == value for name, value in data.items() if name != "captions")


def test_a_common_setting_may_have_its_effect_in_one_source_alone() -> None:
    one, two = _settings({"crop": "random"}, crops=4)
    assert (one.crops, two.crops) == (4, 1)
    one, two = _settings({"captions": {"tag_shuffles": 1}}, captions={"keep_tags": 2})
    assert (one.captions.keep_tags, two.captions.keep_tags) == (2, 1)
    one, two = _settings({"resolutions": [512]}, resolutions=["512x288"], max_aspect=3.0)
    assert (one.max_aspect, two.max_aspect) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("first", "second", "data", "told"),
    [
        ({"crops": 4}, {}, {}, "source a: `crops: 4` needs `crop: random`"),
        ({}, {"crop": "focus", "crops": 2}, {"crop": "random"}, "source b: `crops: 2` needs `crop: random`"),
        ({"captions": {"keep_tags": 2}}, {}, {}, "source a: `keep_tags` has no effect without `tag_shuffles`"),
        ({"crop": "center"}, {"crop": "focus"}, {"crop": "random", "crops": 2}, "`crops` has no effect in any source"),
        ({"resolutions": ["512x288"]}, {"resolutions": ["native"]}, {"bucket_step": 64}, "`bucket_step` has no effect"),
        ({"captions": {"tag_shuffles": 0}}, {"captions": {"tag_shuffles": 0}}, {"captions": TAGS}, "`keep_tags` has no effect"),
        ({"flip": False}, {}, {"crops": 2}, "`crops` has no effect"),
        ({"resolutions": [512, 512]}, {}, {}, "names the same edge twice"),
        ({"resolutions": []}, {}, {}, "`data.sources.0.resolutions`"),
        ({"captions": {"keep_tag": 2}}, {}, {}, "Did you mean `keep_tags`?"),
        ({"captions": {"keep_tags": -1}}, {}, {}, "`data.sources.0.caption_settings.keep_tags`"),
        ({"crop": "middle"}, {}, {}, "`data.sources.0.crop`"),
        ({"crops": 65}, {}, {}, "`data.sources.0.crops`"),
        ({"flip": "maybe"}, {}, {}, "`data.sources.0.flip`"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_nothing_or_cannot_be_are_refused(
    first: dict[str, Any], second: dict[str, Any], data: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _run(first, second, **data)
    assert told in str(caught.value)


def test_a_common_setting_that_every_source_replaces_is_no_mistake() -> None:
    one, two = _settings(
        {"resolutions": [512], "flip": False}, {"resolutions": [64], "flip": False}, resolutions=[256], flip=True
    )
    assert (one.resolutions, two.resolutions, one.flip, two.flip) == ((512,), (64,), False, False)


def test_a_size_of_one_source_that_the_family_does_not_have_names_the_source() -> None:
    with pytest.raises(ConfigError, match=r"source b: resolutions: 1472x1140 .* nearest is 1472x1136"):
        stage.image_recipes(_run(None, {"resolutions": ["1472x1140"]}))


def test_a_resolved_run_file_has_the_same_settings() -> None:
    config = _run({"captions": {"keep_tags": 5}, "flip": False}, {"resolutions": ["native"]}, captions=TAGS, flip=True).config
    again = RunConfig.model_validate(yaml.safe_load(load.resolved_yaml(config)))
    for before, after in zip(config.data.sources, again.data.sources, strict=True):
        assert config.data.of(before) == again.data.of(after)


def test_the_first_common_resolution_comes_first_where_a_source_has_it() -> None:
    assert _run({"resolutions": [64]}, resolutions=[512, 256]).config.data.resolutions_in_use == (512, 256, 64)
    assert _run({"resolutions": [64]}, {"resolutions": ["native", 64]}).config.data.resolutions_in_use == (64, "native")


def _fingerprints(run: Run) -> list[str]:
    job = PrepareJob(directory=Path(), recipes=stage.image_recipes(run), data=run.config.data)
    units = [
        source_units.SourceUnit(number=number, source=source, partition=None, duplicates={})  # type: ignore[arg-type]
        for number, source in enumerate(run.config.data.sources)
    ]
    return [job.recipe_fingerprint(unit) for unit in units]


@pytest.mark.parametrize(
    "own",
    [
        {"resolutions": [256]},
        {"resolutions": ["native"]},
        {"flip": True},
        {"crop": "random"},
        {"captions": {"tag_shuffles": 1}},
    ],
    ids=str,
)
def test_a_sources_own_settings_change_its_fingerprint_and_no_other(own: dict[str, Any]) -> None:
    before, after = _fingerprints(_run()), _fingerprints(_run(own))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_the_same_settings_have_one_fingerprint_wherever_they_are_written() -> None:
    own = {"resolutions": [512, "512x288"], "flip": True, "crop": "random", "crops": 2}
    assert _fingerprints(_run(own, own)) == _fingerprints(_run(**own))


def test_a_run_file_without_such_settings_keeps_its_fingerprints_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    # Golden: of a version that knew neither sizes nor settings of sources. Other values make every prepared shard again.
    for name in ("PREPARED_SCHEMA", "IMAGES_VERSION", "CHECKS_VERSION", "CAPTIONS_VERSION"):
        monkeypatch.setattr(source_units, name, 1)
    run = _run({"repeats": 2, "trigger": "sks"}, resolutions=[512, 256], flip=True, captions={"tag_shuffles": 2})
    assert _fingerprints(run) == ["bcb52410093aacc490bf7bf1491a3384", "a6e99ed7735da97c397a27e5fbb7a11e"]
    recipe = dataset.recipe(run.config)
    assert recipe["resolutions"] == [512, 256]
    assert set(recipe["sources"]["a"]) == {"repeats", "role", "caption", "trigger", "prefix", "suffix"}


def test_the_recipe_says_what_a_source_has_of_its_own() -> None:
    own = {"resolutions": ["native"], "flip": False, "captions": {"keep_tags": 5}}
    recipe = dataset.recipe(_run(own, captions=TAGS, flip=True).config)
    assert dataset.own_settings(recipe["sources"]["a"]) == "resolutions native, flip no, captions.keep_tags 5"
    assert dataset.own_settings(recipe["sources"]["b"]) == ""
