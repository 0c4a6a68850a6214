"""`ftk demo` and the model that it teaches: what is learned and kept is read from the pictures, not from the loss."""

import json
import shutil
from io import StringIO

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from ftk.cli import demo as command
from ftk.configs.load import RECIPES, load
from ftk.deliver.run_delivery import RunDelivery
from ftk.demo import evaluate, lesson, steering, world
from ftk.models.qwen_image import FAMILY
from ftk.run import load_run
from ftk.train import sheet, stage

LEARNED = 0.2
"""A likeness that only a model which knows the creature reaches: measured 0.30 to 0.40, and 0.00 before."""
FEW = {"NUM_SCENES": 2, "NUM_SHOWN": (2, 1, 1)}
"""Where drawing takes longest and one picture would do."""
FEW_STEPS = 200
"""A third of the demo's: measured likeness 0.34."""
SHIPPED = {name: getattr(lesson, name) for name in ("NUM_KNOWN", "NUM_SCENES")}
"""Of class images and scenes the short demo draws half as many."""


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.campaign)])
def taught(request, ftk, tmp_path_factory):
    """Reports of a demo, and its folder; by default one of fewer steps and pictures than the shipped recipe's."""
    root = tmp_path_factory.mktemp("taught") / "it is here"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "short":
            recipe = yaml.safe_load((RECIPES / "demo.yaml").read_text())
            recipe["train"] |= {"steps": FEW_STEPS, "checkpoint_every": FEW_STEPS // 2}
            recipe["train"]["validation"]["every"] = FEW_STEPS
            recipes = tmp_path_factory.mktemp("recipes")
            (recipes / "demo.yaml").write_text(yaml.safe_dump(recipe))
            patch.setattr(lesson, "RECIPES", recipes)
            for name, number in SHIPPED.items():
                patch.setattr(lesson, name, number // 2)
        demo = ftk("demo", "--workspace", root, "--json")
        assert demo.code == 0, demo.err
        yield json.loads(demo.out), root


def draw_few(monkeypatch):
    for name, number in FEW.items():
        monkeypatch.setattr(lesson, name, number)


def test_the_demo_teaches_the_word(taught):
    reports, _ = taught
    assert list(reports) == ["prepare", "cache", "train", "lesson", "demo"]
    found = reports["lesson"]
    assert found["likeness"]["before"] < LEARNED / 4
    assert found["likeness"]["after"] > LEARNED
    assert found["num_recognised"]["before"] == 0
    assert found["num_recognised"]["after"] >= lesson.NUM_SCENES / 3
    assert found["followed"]["after"] > found["followed"]["before"] + 0.15
    assert found["num_pictures"] == 12


def test_the_demo_is_a_minute_or_two_of_work():
    """What its time consists of, whatever the machine; benchmarks/overheads.py measures the time itself."""
    recipe = load(RECIPES / "demo.yaml")
    assert recipe.train.steps * recipe.train.global_batch_size <= 7_200
    assert recipe.sample.num_inference_steps <= 20
    assert lesson.NUM_PICTURES + SHIPPED["NUM_KNOWN"] <= 110
    assert SHIPPED["NUM_SCENES"] <= 24


def test_the_demo_does_what_its_recipe_says(taught):
    reports, root = taught
    recipe = load(root / "demo.yaml")
    assert reports["train"]["num_samples_seen"] == recipe.train.steps * recipe.train.global_batch_size
    assert reports["cache"]["num_latents_encoded"] == lesson.NUM_PICTURES + lesson.NUM_KNOWN
    assert reports["lesson"]["num_scenes"] == lesson.NUM_SCENES


def test_what_the_model_knew_is_kept(taught):
    kept = taught[0]["lesson"]["kept"]
    assert kept["before"] >= 0.9
    assert kept["after"] >= kept["before"] - 0.1


def test_other_creatures_names_do_not_come_to_mean_it(taught):
    found = taught[0]["lesson"]
    assert found["num_confused"]["before"] == 0
    assert found["num_confused"]["after"] < found["num_recognised"]["after"]


def test_the_loss_of_held_out_pictures_falls_at_most_noise_levels(taught):
    bands = taught[0]["lesson"]["bands"]
    assert [band["low"] for band in bands] == [0, 0.25, 0.5, 0.75]
    assert sum(band["after"] < band["before"] for band in bands) >= 3


def test_the_sheet_shows_scenes_with_and_without_the_word(taught):
    _, root = taught
    cells = sheet.cells(root / "runs" / "demo" / "samples" / "before-and-after.png")
    prompts = [prompt for _, prompt in cells]
    assert len(prompts) == 2 * sum(lesson.NUM_SHOWN)
    assert sum(world.CREATURE in prompt for prompt in prompts) == 2 * lesson.NUM_SHOWN[0]


def test_an_adapter_that_was_not_trained_has_learned_nothing(taught, tmp_path, monkeypatch):
    draw_few(monkeypatch)
    _, root = taught
    for name in ("prepared", "cache"):
        shutil.copytree(root / name, tmp_path / name)
    places = [f"model.path={lesson.MODEL}", "train.steps=1", "train.learning_rate=1e-12"]
    run = load_run(root / "demo.yaml", places, workspace=str(tmp_path))
    stage.run(run, RunDelivery)
    found = lesson.examine(run)
    assert found.likeness.after < LEARNED / 4
    assert found.kept.after == found.kept.before


def test_what_is_printed_opens_with_what_was_learned_and_ends_with_ones_own_photos(taught, monkeypatch):
    reports, root = taught
    printed = StringIO()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=printed, width=120))
    command.render(root, reports)
    lines = [line for line in printed.getvalue().splitlines() if line.strip()]
    assert "has learned what a mippo is" in lines[0]
    assert "ftk sample my-lora.yaml" in lines[-1]
    assert "before-and-after.png" in printed.getvalue()


def test_a_terminal_with_colours_shows_pictures_before_and_after(taught, monkeypatch):
    reports, root = taught
    terminal = Console(file=StringIO(), width=120, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr("rich.console.Console", lambda: terminal)
    command.render(root, reports)
    assert terminal.file.getvalue().count("\u2580") > 2 * 3 * 32 * 8


def test_the_demos_folder_is_an_ordinary_workspace_and_goes_on(taught, ftk, tmp_path, monkeypatch):
    draw_few(monkeypatch)
    _, root = taught
    again = ftk("demo", "--workspace", root, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["cache"]["num_latents_encoded"] == 0
    assert json.loads(again.out)["train"]["num_steps_now"] == 0
    copy = ftk("export", root / "demo.yaml", "--workspace", root, "--set", f"model.path={lesson.MODEL}",
               "--format", "comfyui", "--out", tmp_path / "out")  # fmt: skip
    assert copy.code == 0, copy.err


def test_the_shipped_model_follows_captions_that_it_was_not_trained_on():
    scenes = evaluate.held_out(32)
    pipeline = FAMILY.pipeline(lesson.MODEL, torch.float32, torch.device("cpu"))
    found = evaluate.agreement(evaluate.draw(pipeline, FAMILY, scenes, evaluate.Sampling()), scenes)
    assert found["all"] >= 0.9, found


def test_the_shipped_weights_are_small_safetensors_with_a_card():
    files = [path for path in lesson.MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 6e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png", ".svg", ".txt", ".jinja"}
    text = (lesson.MODEL / "README.md").read_text()
    for picture in ("samples.png", "curve.svg"):
        assert picture in text
        assert (lesson.MODEL / picture).stat().st_size > 1000
    with Image.open(lesson.MODEL / "samples.png") as sheet:
        assert sheet.width > 300


def test_a_copy_of_the_model_can_be_had(ftk, tmp_path):
    made = ftk("tiny", "qwen-image", tmp_path / "model", "--trained", "--json")
    assert made.code == 0, made.err
    assert (tmp_path / "model" / "model_index.json").read_bytes() == (lesson.MODEL / "model_index.json").read_bytes()
    refused = ftk("tiny", "sdxl", tmp_path / "other", "--trained")
    assert refused.code == 2
    assert "qwen-image" in refused.err


def test_an_installation_without_the_model_says_so(ftk, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "MODEL", tmp_path / "gone")
    failed = ftk("demo", "--workspace", tmp_path / "demo")
    assert failed.code == 2
    assert "install ftk anew" in failed.err


@pytest.fixture(scope="module")
def steered(ftk, tmp_path_factory):
    """The report of a whole `ftk demo --control` on fewer pictures and scenes, and its folder."""
    root = tmp_path_factory.mktemp("steered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "NUM_PICTURES", 96)
        patch.setattr(steering, "NUM_SCENES", 12)
        result = ftk("demo", "--control", "--workspace", root, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out), root


def test_the_control_is_followed_and_not_another_ones(steered):
    lesson = steered[0]["lesson"]
    assert lesson["without"]["place"] <= 0.25
    assert lesson["steered"]["place"] >= 0.7
    assert lesson["shuffled"]["place"] <= 0.35
    assert lesson["steered"]["distance_px"] < 6 < 20 < lesson["shuffled"]["distance_px"]


def test_the_sheet_of_controls_shows_each_without_and_with_it(steered):
    cells = sheet.cells(steered[1] / "runs" / "demo-control" / "samples" / "steered.png")
    assert len(cells) == 3 * steering.NUM_SHOWN


def test_what_is_printed_of_the_control_says_how_well_it_is_followed(steered, monkeypatch):
    reports, root = steered
    terminal = Console(file=StringIO(), width=120, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr("rich.console.Console", lambda: terminal)
    command.render_control(root, reports)
    printed = terminal.file.getvalue()
    assert "are where they are to be" in printed
    assert "steered.png" in printed
    assert printed.count("\u2580") > 3 * 3 * 32 * 8
