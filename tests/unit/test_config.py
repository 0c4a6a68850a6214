"""Run files: every mistake is found before anything runs, and named with its place and its remedy."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ftk.configs import load
from ftk.configs.schema import DataConfig, MethodConfig, RunConfig, SourceConfig
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.pipeline.sources import base as sources
from ftk.run import paths

RUN: dict[str, Any] = {
    "run": "test",
    "model": {"family": "qwen-image", "path": "model"},
    "data": {"sources": [{"path": "photos"}, {"path": "others", "repeats": 2}]},
    "method": {"name": "lora"},
}


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _load(tmp_path: Path, *overrides: str, **sections: Any) -> RunConfig:
    return load.load(_write(tmp_path, yaml.safe_dump({**copy.deepcopy(RUN), **sections})), overrides)


def _message(tmp_path: Path, *overrides: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, *overrides, **sections)
    return str(caught.value)


def _text_message(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load.load(_write(tmp_path, text))
    return str(caught.value)


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert (config.workspace, config.method.name, config.data.resolutions, config.train.learning_rate) == (
        "work", "lora", (1024,), 1e-4,
    )  # fmt: skip
    assert [source.repeats for source in config.data.sources] == [1, 2]


@pytest.mark.parametrize("recipe", sorted(load.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_so_is_its_method(recipe: Path) -> None:
    config = load.load(recipe)
    method, settings = methods.parse(config.method)
    assert method.name == config.method.name
    assert isinstance(settings, method.Config)


def test_there_are_recipes() -> None:
    assert {path.stem for path in load.RECIPES.glob("*.yaml")} >= {"demo", "qwen-image-lora"}


def test_a_typo_names_the_nearest_key(tmp_path: Path) -> None:
    message = _message(tmp_path, train={"learning_rat": 1e-3})
    assert "`train.learning_rat` is not a setting. Did you mean `learning_rate`?" in message
    assert "run.yaml" in message


def test_a_typo_at_the_top_names_the_nearest_section(tmp_path: Path) -> None:
    assert "`trian` is not a setting. Did you mean `train`?" in _message(tmp_path, trian={"steps": 1})


def test_a_typo_two_sections_deep_names_the_nearest_key(tmp_path: Path) -> None:
    message = _message(tmp_path, train={"schedule": {"warmpu": 5}})
    assert "`train.schedule.warmpu`" in message
    assert "Did you mean `warmup`?" in message


def test_a_typo_in_the_list_of_sources_names_its_position_and_the_nearest_key(tmp_path: Path) -> None:
    config = _load(tmp_path, data={"sources": [{"path": "photos"}, {"path": "others", "repeat": 2}]})
    with pytest.raises(ConfigError, match=r"`data\.sources\.1\.repeat` is not a setting\. Did you mean `repeats`\?"):
        sources.parse(config.data.sources[1], "data.sources.1")


def test_a_key_like_no_other_lists_the_valid_ones(tmp_path: Path) -> None:
    message = _message(tmp_path, sample={"zzzzzzz": 1})
    assert "Did you mean" not in message
    assert "Valid here: prompts, negative_prompt, every" in message


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    message = _message(tmp_path, train={"steps": 0, "stepps": 3}, cache={"image_batch": "many"})
    assert "`train.steps`" in message
    assert "(found 0)" in message
    assert "`train.stepps`" in message
    assert "`cache.image_batch`" in message


def test_the_method_is_lora_when_none_is_named(tmp_path: Path) -> None:
    run = {key: value for key, value in RUN.items() if key != "method"}
    assert load.load(_write(tmp_path, yaml.safe_dump(run))).method.name == "lora"


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "`model.path` is missing" in _message(tmp_path, model={"family": "qwen-image"})


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "with space", "x" * 101])
def test_a_run_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    assert "`run`" in _message(tmp_path, run=name)


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    message = _message(tmp_path, data={"sources": [{"path": "a/photos"}, {"path": "b/photos"}]})
    assert "two sources are called photos" in message
    config = _load(tmp_path, data={"sources": [{"path": "a/photos"}, {"path": "b/photos", "name": "second"}]})
    assert [source.source_name for source in config.data.sources] == ["photos", "second"]


def test_a_resolution_given_twice_is_refused(tmp_path: Path) -> None:
    assert "same edge twice" in _message(tmp_path, data={**RUN["data"], "resolutions": [512, 512]})


def test_a_run_of_epochs_is_written_out_so_that_it_can_be_read_again(tmp_path: Path) -> None:
    config = _load(tmp_path, train={"epochs": 2})
    again = yaml.safe_load(load.resolved_yaml(config))
    assert again["train"]["epochs"] == 2
    assert "steps" not in again["train"]
    assert RunConfig.model_validate(again) == config
    assert _load(tmp_path).train.steps == _load(tmp_path, train={"steps": None}).train.steps == 1000


def test_a_micro_batch_that_is_larger_than_a_step_is_refused(tmp_path: Path) -> None:
    message = _message(tmp_path, train={"global_batch_size": 3, "micro_batch_size": 4})
    assert "micro_batch_size 4 is larger than global_batch_size 3" in message


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"schedule": {"minimum": 0.1}}, "`minimum` has no effect without `a schedule that falls; constant does not`"),
        ({"schedule": {"steps": 5}}, "`steps` has no effect without `a schedule that has an end; constant has none`"),
        ({"schedule": {"name": "cosine", "steps": 5, "warmup": 5}}, "`warmup` 5 takes all of the schedule's `steps`, 5"),
        ({"schedule": {"name": "cosine", "warmup": 1.0}}, "less than 1"),
        ({"schedule": {"name": "cosine", "warmup": 2, "warmup_steps": 2}}, "`warmup_steps` is another name of `warmup`"),
        ({"schedule": {"name": "cosine", "minimum": 1}}, "less than 1"),
        ({"sigma": {"logit_mean": 1.0}}, "`logit_mean` has no effect without `sampling: logit_normal`"),
        ({"sigma": {"shift": -1.0}}, "a shift is a number above 0"),
        ({"sigma": {"minimum": 0.5, "maximum": 0.4}}, "`minimum` 0.5 is not below `maximum` 0.4"),
        ({"loss": {"huber_delta": 1.0}}, "`huber_delta` has no effect without `kind: huber`"),
        ({"loss": {"kind": "l1", "huber_schedule": "snr"}}, "`huber_schedule` has no effect without `kind: huber`"),
        ({"noise": {"pyramid_discount": 0.8}}, "`pyramid_discount` has no effect without `pyramid_levels`"),
        ({"noise": {"pyramid_levels": 4, "offset": 0.1}}, "both add coarse noise"),
        ({"schedule": {"name": "cosine", "power": 2}}, "`power` has no effect without `name: polynomial`"),
        ({"schedule": {"name": "piecewise_constant", "rules": "1-2"}}, "`rules` is FACTOR:STEP"),
        ({"schedule": "cosin"}, "'cosine'"),
        ({"validation": {"patience": 3}}, "`patience` has no effect without `share`"),
        ({"optimizer": {"groups": [{"match": "("}]}}, "is not a regular expression"),
        ({"memory": {"checkpointing": "some"}}, "`train.memory.checkpointing"),
        ({"ema_decay": 1.0}, "`train.ema_decay`"),
    ],
)
def test_training_settings_that_cannot_be_meant_are_refused(tmp_path: Path, section: dict[str, Any], told: str) -> None:
    assert told in _message(tmp_path, train=section)


def test_a_name_will_do_for_an_optimizer_and_a_schedule(tmp_path: Path) -> None:
    config = _load(tmp_path, train={"optimizer": "lion", "schedule": "cosine"}).train
    assert (config.optimizer.name, config.schedule.name) == ("lion", "cosine")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=500", lambda config: config.train.steps == 500),
        ("train.learning_rate=3e-4", lambda config: config.train.learning_rate == 3e-4),
        ("train.optimizer.weight_decay=0", lambda config: config.train.optimizer.settings == {"weight_decay": 0}),
        ("data.sources.1.repeats=7", lambda config: [s.repeats for s in config.data.sources] == [1, 7]),
        ("data.resolutions=[512, 768]", lambda config: config.data.resolutions == (512, 768)),
        ("sample.prompts=[a=b]", lambda config: config.sample.prompts == ("a=b",)),
        ("method.rank=8", lambda config: config.method.settings == {"rank": 8}),
        ("train.max_grad_norm=null", lambda config: config.train.max_grad_norm is None),
    ],
)
def test_set_overrides_one_setting(tmp_path: Path, override: str, read: Any) -> None:
    assert not read(_load(tmp_path))
    assert read(_load(tmp_path, override))


def test_later_overrides_win_and_the_workspace_option_wins_over_all(tmp_path: Path) -> None:
    assert _load(tmp_path, "train.steps=1", "train.steps=2").train.steps == 2
    path = _write(tmp_path, yaml.safe_dump(RUN))
    assert load.load(path, ["workspace=one"], workspace="two").workspace == "two"


def test_set_reaches_into_an_empty_section_and_an_empty_entry(tmp_path: Path) -> None:
    assert _load(tmp_path, "train.steps=5", train=None).train.steps == 5
    config = _load(tmp_path, "data.sources.0.path=photos", data={"sources": [None]})
    assert config.data.sources[0].path == "photos"


@pytest.mark.parametrize(("written", "value"), [("1e-4", 1e-4), ("5E+2", 500.0), ("-1e3", -1000.0), ("2.5e-3", 0.0025)])
def test_exponents_are_read_as_numbers(written: str, value: float) -> None:
    parsed = load.parse_yaml(f"a: {written}", "here")["a"]
    assert isinstance(parsed, float)
    assert parsed == value


@pytest.mark.parametrize("text", ["1e", "e5", "1e-4x", "x1e4"])
def test_what_only_looks_like_an_exponent_stays_text(text: str) -> None:
    assert load.parse_yaml(f"a: {text}", "here") == {"a": text}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("data.sources.2.repeats=1", "'2' is not a position in a list of 2"),
        ("data.sources.first.repeats=1", "'first' is not a position"),
        ("data.sources.².repeats=1", "is not a position"),
        ("data.sources.-1=1", "'-1' is not a position"),
        ("run.name=x", "is a value, not a section"),
        ("run.name.deeper=x", "lies below a value"),
        ("train.steps=[1", "--set train.steps=[1 is not valid YAML"),
        ("train.stepps=1", "Did you mean `steps`?"),
    ],
)
def test_a_bad_override_is_explained(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in _message(tmp_path, override)


@pytest.mark.parametrize("text", ["run: a\nrun: b\n", "train: {steps: 1, steps: 2}\n"])
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    assert re.search(r"the key '(run|steps)' stands twice", _text_message(tmp_path, text))


def test_aliases_are_refused(tmp_path: Path) -> None:
    assert "aliases (*name) are not allowed" in _text_message(tmp_path, "a: &x [1]\nb: *x\n")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!custom x"])
def test_tags_that_would_run_code_are_refused(tmp_path: Path, tag: str) -> None:
    assert "could not determine a constructor" in _text_message(tmp_path, f"run: {tag}\n")


@pytest.mark.parametrize(
    "text",
    ["run: 2024-13-45", "run: [", "run: a: b", "? [a]\n: b", "run: \0", "run: !!int x", "run: !!bool x", "[" * 5000],
    ids=["date", "open", "colon", "key", "nul", "int", "bool", "deep"],
)
def test_text_that_is_no_yaml_is_a_config_error(tmp_path: Path, text: str) -> None:
    assert "is not valid YAML" in _text_message(tmp_path, text)


@pytest.mark.parametrize("text", ["", "[1, 2]", "just text", "5"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    assert "not the sections of a run file" in _text_message(tmp_path, text)


def test_a_missing_file_names_the_one_that_was_meant(tmp_path: Path) -> None:
    _write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"rum\.yaml does not exist\. Did you mean `.*run\.yaml`\?"):
        load.load(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load.load(tmp_path / "no" / "such.yaml")


def test_a_folder_and_a_binary_file_are_no_run_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load.load(tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="cannot be read"):
        load.load(tmp_path / "picture.yaml")


def test_a_huge_file_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with path.open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(ConfigError, match="2,097,152 bytes"):
        load.load(path)


def test_secrets_are_redacted_in_the_resolved_file(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        model={"family": "qwen-image", "path": "https://me:hunter2@example.org/model"},
        method={"name": "lora", "api_key": "abc", "hub_token": "xyz"},
        sample={"prompts": ["a sign that says hf_abcdefghijklmnop"]},
    )
    text = load.resolved_yaml(config)
    for secret in ("hunter2", "abc\n", "xyz", "hf_abcdefghijklmnop"):
        assert secret not in text
    assert "example.org/model" in text
    assert text.count("***") == 4


def test_secrets_are_redacted_in_an_error_message(tmp_path: Path) -> None:
    message = _message(tmp_path, train={"seed": "hf_abcdefghijklmnop"})
    assert "`train.seed`" in message
    assert "hf_abc" not in message


def test_the_resolved_file_loads_to_the_same_configuration(tmp_path: Path) -> None:
    config = _load(tmp_path, method={"name": "lora", "rank": 4}, sample={"prompts": ["größer"]})
    assert load.load(_write(tmp_path, load.resolved_yaml(config))) == config


def test_a_typo_under_method_names_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"`method\.rnak` is not a setting\. Did you mean `rank`\?"):
        methods.parse(MethodConfig(name="lora", rnak=8))


def test_a_bad_value_under_method_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"`method\.rank`.*\(found 0\)"):
        methods.parse(MethodConfig(name="lora", rank=0))


def test_an_unknown_method_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"no method 'lorra'.*lora"):
        methods.parse(MethodConfig(name="lorra"))


def test_the_workspace_holds_the_three_stages(tmp_path: Path) -> None:
    found = paths(load.load(_write(tmp_path, yaml.safe_dump(RUN)), workspace=str(tmp_path)))
    assert found.prepared == tmp_path / "prepared"
    assert found.cache == str(tmp_path / "cache")
    assert found.run == tmp_path / "runs" / "test"


def test_zero_workers_means_one_a_core() -> None:
    assert load.default_workers(3) == 3
    assert load.default_workers(0) >= 1


def test_a_misspelt_path_of_a_source_is_the_only_mistake_that_is_said(tmp_path: Path) -> None:
    message = _message(tmp_path, data={"sources": [{"pth": "photos"}]})
    assert "`pth` is not a setting. Did you mean `path`?" in message
    assert "at least 1 item" not in message


def test_no_sources_is_said(tmp_path: Path) -> None:
    assert "at least 1 item" in _message(tmp_path, data={"sources": []})


def test_one_value_for_a_list_asks_for_a_list(tmp_path: Path) -> None:
    assert "should be a list" in _message(tmp_path, data={"sources": [{"path": "photos"}], "resolutions": 512})


@pytest.mark.parametrize(
    "settings",
    [
        {"upscale_limit": 2.0},
        {"crops": 2},
        {"quality": 80, "image_format": "png"},
        {"captions": {"keep_tags": 2}},
        {"background": [0, 0, 300]},
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert _message(tmp_path, data={"sources": [{"path": "photos"}], **settings})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("photos/dog", "dog"),
        ("photos/dog.v2", "dog.v2"),
        ("photos/metadata.jsonl", "photos"),
        ("metadata.csv", "metadata"),
        ("*.jsonl", "images"),
        ("s3://bucket/laion/{00000..00010}.tar", "laion"),
        ("/", "images"),
    ],
)
def test_a_source_is_called_after_its_folder(path: str, name: str) -> None:
    assert SourceConfig(path=path).source_name == name


def test_pictures_at_the_start_need_prompts(tmp_path: Path) -> None:
    assert "`at_start` has no effect without `prompts`" in _message(tmp_path, sample={"at_start": True})
    assert _load(tmp_path, sample={"at_start": True, "prompts": ["a dog"]}).sample.draws_in_training
    assert not _load(tmp_path, sample={"prompts": ["a dog"]}).sample.draws_in_training


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[original, '1:1', '4:3', 16/9]", ("original", "1:1", "4:3", "16:9")),
        # Without quotes YAML reads numbers to base 60.
        ("[1:1, 4:3, 16:9, 9:16, 21:9]", ("1:1", "4:3", "16:9", "9:16", "21:9")),
    ],
)
def test_aspects_are_read_as_they_are_written(written: str, meant: tuple[str, ...]) -> None:
    tree = {"sources": [{"path": "a"}], "aspects": yaml.safe_load(written), "crops": 2, "max_aspect": 3}
    data = DataConfig.model_validate(tree)
    assert data.aspects == meant
    assert DataConfig.model_validate(yaml.safe_load(yaml.safe_dump(data.model_dump(mode="json")))) == data


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"aspects": ["orginal"]}, "Did you mean `original`"),
        ({"aspects": ["4:0"]}, "a ratio of width to height"),
        ({"aspects": ["wide"]}, "a ratio of width to height"),
        ({"aspects": [True]}, "a ratio of width to height"),
        ({"aspects": ["21:9"]}, "raise `max_aspect`"),
        ({"aspects": ["9:21"]}, "raise `max_aspect`"),
        ({"aspects": ["1:1"], "crops": 2}, "several `aspects`"),
        ({"sources": [{"path": "a", "aspects": ["3:1"]}]}, "raise `max_aspect`"),
    ],
)
def test_aspects_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        DataConfig.model_validate({"sources": [{"path": "a"}], **settings})


def test_a_source_may_have_aspects_of_its_own() -> None:
    tree = {"sources": [{"path": "a", "aspects": ["1:1", "4:3"], "crops": 2}, {"path": "b"}]}
    data = DataConfig.model_validate(tree)
    assert [data.of(source).aspects for source in data.sources] == [("1:1", "4:3"), ()]
