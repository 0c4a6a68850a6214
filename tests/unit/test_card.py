"""Model cards and the metadata of delivered files: what is true, what the Hub takes, and nothing that is private."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ftk import storage
from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.deliver import card, metadata
from ftk.deliver.metadata import Subject
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.models import base as families
from ftk.run import resolve
from ftk.train import sheet
from ftk.train.hooks.recorder import ValidationLog

SECRET = "hf_abcdefgh12345678"
COUNTS = {
    "num_samples": 1200, "num_images": 1100, "num_class_samples": 200, "num_held_out": 10,
    "sources": [{"name": "dogs", "repeats": 4, "role": "instance"}, {"name": "others", "repeats": 1, "role": "class"}],
}  # fmt: skip
Make = Callable[..., Subject]


@pytest.fixture
def about(tiny_models: Callable[[str], Path], tmp_path: Path) -> Make:
    """The subject of a run of some settings, with a folder of its own that counts, measured and drew something."""

    def make(step: int = 250, family: str = "qwen-image", **sections: Any) -> Subject:
        tree = {
            "run": "my-dog",
            "workspace": str(tmp_path / "work"),
            "model": {"family": family, "path": str(tiny_models(family))},
            "data": {
                "sources": [
                    {"path": str(tmp_path / "dogs"), "trigger": "sks dog", "repeats": 4},
                    {"path": "b", "trigger": "xyz"},
                ],
                "resolutions": [512, 768],
            },
            "method": {"name": "lora", "rank": 8, "alpha": 16},
            "train": {"learning_rate": 3e-5, "global_batch_size": 4, "seed": 7, "steps": 1000},
            **sections,
        }
        run = resolve(validate(RunConfig, tree, "test"))
        found = metadata.subject(run, step, Path(run.config.model.path))
        storage.commit_json(found.run.paths.run / metadata.TRAINED_ON, COUNTS)
        return found

    return make


def write_sheet(subject: Subject, step: int, prompts: list[str], size: int = 64) -> None:
    images = [Image.new("RGB", (size, size), (step % 256, 40 * number, 7)) for number in range(len(prompts))]
    data = sheet.png_bytes(sheet.grid([[image] for image in images], prompts, [f"step {step}"]))
    storage.commit_bytes(subject.run.paths.run / f"samples/step-{step:08d}.png", data)


def written(subject: Subject, directory: Path) -> tuple[ModelCard, list[str]]:
    """(the card, all files beside it)."""
    form = subject.run.method.FORMATS[0]
    files = card.write(subject, directory, card.loading(subject, form))
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert sorted(path.relative_to(directory).as_posix() for path in files) == names
    return ModelCard((directory / "README.md").read_text()), names


def test_the_card_says_what_the_hub_and_its_reader_want_to_know(about: Make, tmp_path: Path) -> None:
    subject = about(
        model={"family": "qwen-image", "path": "Qwen/Qwen-Image"},
        card={"license": "apache-2.0", "description": "A *dog*.", "title": "Dog | one", "author": "Ada"},
    )
    # The base is not here: its folder is what was downloaded.
    subject = Subject(run=subject.run, step=subject.step, model=tmp_path)
    log = ValidationLog(subject.run.paths.run)
    for step, loss, is_best in ((100, 0.5, True), (200, 0.25, True), (250, 0.375, False), (300, 0.125, True)):
        log.append({"step": step, "loss": loss, "band_losses": None, "is_best": is_best})
    log.commit()
    write_sheet(subject, 250, ["sks dog | on\nthe moon", "two <b>dogs</b>"])
    found, names = written(subject, tmp_path / "adapter")
    data = found.data.to_dict()
    assert {key: data[key] for key in ("base_model", "base_model_relation", "library_name", "license", "pipeline_tag")} == {
        "base_model": "Qwen/Qwen-Image", "base_model_relation": "adapter", "library_name": "diffusers",
        "license": "apache-2.0", "pipeline_tag": "text-to-image",
    }  # fmt: skip
    assert {"ftk", "diffusers", "lora", "qwen-image"} <= set(data["tags"])
    assert data["instance_prompt"] == "sks dog, xyz"
    assert data["widget"] == [
        {"text": "sks dog | on\nthe moon", "output": {"url": "images/0.png"}},
        {"text": "two <b>dogs</b>", "output": {"url": "images/1.png"}},
    ]
    assert names == ["README.md", "images/0.png", "images/1.png"]
    for told in (
        "# Dog \\| one\n", "A *dog*.", "`sks dog`, `xyz`", "250 steps", "step 250", "rank 8", "alpha 16", "512 px, 768 px",
        "| batch size | 4 |", "3e-05", "1,200 of 1,100 images", "| class samples among them | 200 |", "repeats 4, instance",
        "0.375 at step 250; the best was 0.25 at step 200", "pipeline.load_lora_weights", "ftk 0.1.0",
        "sks dog \\| on the moon |", "two &lt;b>dogs", "--format comfyui", "Licence: apache-2.0",
    ):  # fmt: skip
        assert told in found.content, told


def test_nothing_in_it_names_a_place_on_this_machine(about: Make, tmp_path: Path) -> None:
    subject = about()
    found, _ = written(subject, tmp_path / "adapter")
    said = found.content + json.dumps(metadata.of(subject))
    assert str(tmp_path) not in said
    assert str(Path(subject.config.model.path).parent) not in said
    # The Hub would refuse the card for a base that is no id of its own.
    assert found.data.base_model is None
    assert "base_model_relation" not in found.data.to_dict()
    assert 'from_pretrained("path/to/qwen-image")' in found.content
    named = about(card={"base_model": "Qwen/Qwen-Image"})
    assert written(named, tmp_path / "named")[0].data.base_model == "Qwen/Qwen-Image"
    assert metadata.of(named)["ftk_base_model"] == "Qwen/Qwen-Image"


def test_secrets_are_redacted(about: Make, tmp_path: Path) -> None:
    subject = about(card={"description": f"made with {SECRET}", "author": SECRET, "title": SECRET})
    write_sheet(subject, 250, [f"a dog {SECRET}"])
    written(subject, tmp_path / "adapter")
    assert SECRET not in json.dumps(metadata.of(subject))
    for path in (tmp_path / "adapter").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_the_newest_pictures_up_to_the_step_are_shown(about: Make, tmp_path: Path) -> None:
    subject, place = about(), tmp_path / "adapter"
    assert written(subject, place)[1] == ["README.md"]
    write_sheet(subject, 100, ["one", "two", "three"])
    write_sheet(subject, 300, ["later"])
    found, names = written(subject, place)
    assert "Drawn at step 100" in found.content
    assert names == ["README.md", "images/0.png", "images/1.png", "images/2.png"]
    with Image.open(place / "images/1.png") as image:
        assert image.getpixel((0, 0)) == (100, 40, 7)
        assert image.info == {}
    write_sheet(subject, 250, ["only"], size=2000)
    (place / "images/7.png").write_bytes(b"somebody's own")
    card.write(subject, place, "")
    # What the earlier card showed is gone, and nothing else.
    assert (place / "images/7.png").read_bytes() == b"somebody's own"
    (place / "images/7.png").unlink()
    found, names = written(subject, place)
    assert names == ["README.md", "images/0.png"]
    assert "Drawn at step 250" in found.content
    with Image.open(place / "images/0.png") as image:
        assert image.size == (512, 512)
    write_sheet(subject, 250, [f"prompt {number}" for number in range(20)])
    assert len(written(subject, place)[1]) == 9


def test_a_sheet_of_an_earlier_ftk_is_shown_whole_and_a_damaged_one_not_at_all(
    about: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject, place = about(), tmp_path / "adapter"
    path = subject.run.paths.run / "samples/step-00000250.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (1000, 500)).save(path)
    found, names = written(subject, place)
    assert names == ["README.md", "images/0.png"]
    with Image.open(place / "images/0.png") as image:
        assert image.size == (512, 256)
    path.write_bytes(b"no picture")
    found, names = written(subject, place)
    assert names == ["README.md"]
    assert "Drawn at" not in found.content
    assert "is damaged" in caplog.text


def test_equal_runs_write_equal_bytes(about: Make, tmp_path: Path) -> None:
    subject = about()
    write_sheet(subject, 200, ["a dog"])
    for name in ("one", "two"):
        written(subject, tmp_path / name)
    for path in (tmp_path / "one").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert metadata.of(subject) == metadata.of(about())


def test_sizes_and_settings_of_sources_are_in_card_and_metadata(about: Make) -> None:
    sources = [{"path": "a", "resolutions": ["native"]}, {"path": "b"}]
    subject = about(data={"sources": sources, "resolutions": ["512x288", 768]})
    found = metadata.of(subject)
    assert found["ftk_resolutions"] == "512x288, 768, native"
    assert (found["modelspec.resolution"], found["ss_resolution"]) == ("512x288", "(512, 288)")
    assert card._training(subject)["resolutions"] == "512x288 px, 768 px, native"


def test_metadata_of_a_lora(about: Make) -> None:
    found = metadata.of(about(card={"license": "other", "license_name": "Mine", "license_link": "https://x"}))
    expected = {
        "ftk_family": "qwen-image", "ftk_method": "lora", "ftk_step": "250", "ftk_resolutions": "512, 768",
        "ftk_batch_size": "4", "ftk_learning_rate": "3e-05", "ftk_seed": "7", "ftk_triggers": "sks dog, xyz",
        "ftk_num_samples": "1200", "ftk_num_class_samples": "200", "ftk_license": "Mine",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "Qwen-Image/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "my-dog", "modelspec.resolution": "512x512", "modelspec.trigger_phrase": "sks dog, xyz",
        "modelspec.license": "Mine", "ss_base_model_version": "qwen_image", "ss_network_dim": "8", "ss_network_alpha": "8",
        "ss_steps": "250",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert json.loads(found["ftk_method_settings"]).items() >= {"rank": 8, "alpha": 16.0, "targets": "attention"}.items()
    assert "modelspec.prediction_type" not in found
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.parametrize(
    ("method", "dim"),
    [
        ({"name": "lora", "rank": 4, "initialisation": "pissa"}, "8"),
        ({"name": "lora", "rank": 4, "rank_pattern": {"to_q": 2}}, "Dynamic"),
        ({"name": "loha", "rank": 3}, "3"),
        ({"name": "oft", "block_size": 4}, None),
    ],
)
def test_the_rank_is_that_of_the_file(about: Make, method: dict[str, Any], dim: str | None) -> None:
    found = metadata.of(about(method=method))
    assert found.get("ss_network_dim") == found.get("ss_network_alpha") == dim
    assert found["modelspec.architecture"] == ("Qwen-Image/oft" if dim is None else "Qwen-Image/lora")


def test_whole_weights_are_a_fine_tune(about: Make, tmp_path: Path) -> None:
    subject = about(method={"name": "full"}, card={"base_model": "Qwen/Qwen-Image"})
    assert metadata.of(subject)["modelspec.architecture"] == "Qwen-Image"
    data = written(subject, tmp_path / "adapter")[0].data.to_dict()
    assert data["base_model_relation"] == "finetune"


def test_other_programs_know_the_families_by_their_names(
    about: Make, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    sdxl, sd = (metadata.of(about(family=name)) for name in ("sdxl", "stable-diffusion"))
    assert sdxl["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert sdxl["ss_base_model_version"] == "sdxl_base_v1-0"
    assert sd["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (sd["ss_base_model_version"], sd["modelspec.prediction_type"]) == ("sd_v1", "epsilon")
    family = families.get("stable-diffusion")
    for part, settings in (("unet/config.json", {"cross_attention_dim": 1024}), ("scheduler/scheduler_config.json", {})):
        source = tiny_models("stable-diffusion") / part
        storage.commit_json(tmp_path / part, {**json.loads(source.read_text()), **settings})
    assert families.published_names(family, tmp_path)["modelspec.architecture"] == "stable-diffusion-v2-512"
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    storage.commit_json(scheduler, {**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"})
    found = families.published_names(family, tmp_path)
    assert found == {
        "modelspec.architecture": "stable-diffusion-v2-768-v", "ss_base_model_version": "sd_v2", "ss_v2": "True",
    }  # fmt: skip


def test_the_settings_are_those_that_the_checkpoint_was_trained_with(about: Make, caplog: pytest.LogCaptureFixture) -> None:
    run, model = about().run, about().model
    trained = {"learning_rate": 0.5, "optimizer": {"name": "lion", "groups": []}, "schedule": {"name": "cosine"}}
    subject = metadata.subject(run, 250, model, trained)
    assert metadata.of(subject)["ftk_learning_rate"] == "0.5"
    assert "0.5, cosine" in card.text(subject, "", [], 0)
    assert subject.config.train.steps == 1000
    other = metadata.subject(run, 250, model, {"no_such_setting": 1})
    assert other.config.train == run.config.train
    assert "of another ftk" in caplog.text


def test_a_run_of_an_earlier_ftk_has_no_counts(about: Make) -> None:
    subject = about()
    (subject.run.paths.run / metadata.TRAINED_ON).unlink()
    assert "ftk_num_samples" not in metadata.of(subject)
    assert "held out" not in card.text(subject, "", [], 0)


@pytest.mark.parametrize("name", ["lora", "oft", "lokr", "full", "loha", "custom-diffusion"])
def test_from_the_hub_the_repository_is_what_is_loaded(about: Make, name: str) -> None:
    subject = about(method={"name": name})
    for form in subject.run.formats:
        here, there = card.loading(subject, form), card.loading(subject, form, "ada/dog")
        assert "ada/dog" not in here
        assert card.HERE not in there
        assert ("ada/dog" in there) == (card.HERE in here)


def test_a_text_encoder_lies_in_a_folder_of_the_repository(about: Make) -> None:
    subject = about(family="stable-diffusion", method={"name": "oft", "block_size": 4, "text_encoder": {}})
    there = card.loading(subject, "peft", "ada/dog")
    assert 'PeftModel.from_pretrained(pipeline.text_encoder, "ada/dog", subfolder="text_encoder")' in there


def test_a_file_that_is_read_by_itself_is_downloaded_from_the_repository(about: Make) -> None:
    there = card.loading(about(method={"name": "custom-diffusion"}), "diffusers", "ada/dog")
    lines = there.splitlines()
    assert lines.index("from huggingface_hub import hf_hub_download") < lines.index("from safetensors.torch import load_file")
    assert 'weights = load_file(hf_hub_download("ada/dog", "custom_diffusion_weights.safetensors"))' in lines
    unet = about(family="sdxl", method={"name": "custom-diffusion"})
    assert 'load_attn_procs("ada/dog", weight_name=' in card.loading(unet, "diffusers", "ada/dog")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: openrail++\n---\n# base", "openrail++"),
        ("---\nlicense: other\nlicense_name: flux-dev\n---\n", "flux-dev"),
        ("# base", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n{[\n---\n", None),
        ("---\n- a\n---\n", None),
        (None, None),
    ],
)
def test_the_bases_licence_is_read_from_its_card(tmp_path: Path, text: str | None, found: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert card.base_license(tmp_path) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"license": "Apache 2.0"}, "match pattern"),
        ({"license": "other"}, "needs a `license_name`"),
        ({"license_name": "x"}, "has no effect without `license: other`"),
        ({"license": "mit", "license_link": "x"}, "has no effect without `license: other`"),
        ({"base_model": "/home/ada/model"}, "match pattern"),
        ({"titel": "x"}, "Did you mean `title`"),
    ],
)
def test_wrong_settings_of_the_card_are_refused(about: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        about(card=settings)


def test_cells_of_a_sheet_are_its_pictures(tmp_path: Path) -> None:
    images = [[Image.new("RGB", (32, 16), (row, column, 0)) for column in range(2)] for row in range(2)]
    path = tmp_path / "sheet.png"
    path.write_bytes(sheet.png_bytes(sheet.grid(images, ["a", "b" * 300], ["base", "a title that is far too long" * 9])))
    cells = sheet.cells(path)
    assert [prompt for _, prompt in cells] == ["a", "a", "b" * 300, "b" * 300]
    assert [image.getpixel((5, 5)) for image, _ in cells] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert {image.width / image.height for image, _ in cells} == {2.0}


def test_every_method_has_a_card(about: Make, tmp_path: Path) -> None:
    for name in methods.available():
        needed = {"peft": {"type": "MISS"}, "textual-inversion": {"tokens": {"<cat>": "cat"}}}
        settings = {"name": name, **needed.get(name, {})}
        found, _ = written(about(method=settings), tmp_path / name)
        assert "```python" in found.content
