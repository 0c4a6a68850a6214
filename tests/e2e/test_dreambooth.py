"""DreamBooth from its recipe: class images are drawn, the same after any kill, never mixed, and trained on."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL

import draw_forks
import pytest
import yaml
from killing import Server
from PIL import Image

from ftk.cache.store import CacheStore
from ftk.deliver import draw_class_images as drawing
from ftk.models import base as families
from ftk.pipeline import stage
from ftk.pipeline.dataset import PreparedDataset
from ftk.run import load_run

NUM_IMAGES = 5
GENERATE = "data.sources.1.generate"
# How often a commit touches the disk: the middle of its write, and both sides of two fsyncs and a rename.
COMMIT = 7
IMAGE = 2 * COMMIT


class DrawServer(Server):
    """Forks of a process that has imported what drawing needs."""

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, draw_forks.__file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@pytest.fixture
def settings(tiny_models: Callable[[str], Path]) -> list[str]:
    """What makes the recipe small."""
    small = {
        "model.path": tiny_models("stable-diffusion"), "data.resolutions": "[64]", "data.workers": 1,
        f"{GENERATE}.count": NUM_IMAGES, f"{GENERATE}.num_inference_steps": 2, f"{GENERATE}.batch_size": 2,
        "train.precision": "fp32", "train.steps": 2,
    }  # fmt: skip
    return [part for name, value in small.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def run(ftk: Callable, settings: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Call a command with the recipe in a folder with four photos, each with its caption."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        for path in pictures.glob(f"{number:03d}-*"):
            (tmp_path / "photos").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "photos")
    assert ftk("init", "run.yaml", "--recipe", "dreambooth").code == 0

    def call(command: str, *options: str):
        return ftk(command, "run.yaml", *settings, *options)

    return call


def draw(run: Callable, *options: str):
    return run("prepare", "--make-class-images", *options)


def drawn() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("class-images/generated").iterdir() if path.name != ".lock"}


def images() -> list[str]:
    return sorted(name for name in drawn() if name.endswith(".png"))


def changed(name: str, value: object) -> tuple[str, str]:
    return "--set", f"{GENERATE}.{name}={value}"


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    run: Callable, settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = DrawServer(tmp_path_factory.mktemp("forks"))
    assert (result := draw(run)).code == 0, result.err
    whole = drawn()
    assert images() == [f"{index:05d}.png" for index in range(NUM_IMAGES)]
    assert whole["00000.txt"] == b"a photo of a dog\n"
    assert len({whole[name] for name in images()}) == NUM_IMAGES
    for folder in ("class-images", "work"):
        shutil.rmtree(folder)
    done = []
    # In the record; in the second image of a batch, whose caption is there; behind the first image of a batch.
    for point in (1, COMMIT + IMAGE + COMMIT + 1, COMMIT + 2 * IMAGE):
        assert server.run("prepare", "run.yaml", *settings, "--make-class-images", at=point).code == -SIGKILL
        done.append(len(images()))
    server.close()
    assert done == [0, 1, 3]
    assert all(whole[name] == drawn()[name] for name in images())
    assert not Path("work").exists()
    assert (result := draw(run)).code == 0, result.err
    assert drawn() == whole
    assert (result := run("prepare", "--json")).code == 0, result.err
    assert json.loads(result.out)["num_samples"] == 4 + NUM_IMAGES


def test_without_the_option_prepare_says_what_is_missing(run: Callable) -> None:
    result = run("prepare")
    assert result.code == 2
    assert f"class-images holds 0 of the {NUM_IMAGES} class images" in result.err
    assert f"`ftk prepare RUN.yaml --make-class-images` draws the other {NUM_IMAGES} with the base model" in result.err
    result = draw(run, "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["num_class_images_to_draw"] == {"class-images": NUM_IMAGES}
    assert plan["num_samples"] == 4
    assert not Path("class-images").exists()
    assert f"class-images holds 0 of the {NUM_IMAGES}" in run("run").err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--part", "1/2"], "--part 1/2 and --make-class-images do not go together"),
        (["--set", f"{GENERATE}=null"], "no source says what to draw"),
        (["--set", "data.sources.0.path=phots"], "phots does not exist. Did you mean `photos`?"),
        (["--set", "model.path=nowhere"], "model.path nowhere: no such folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(run: Callable, options: list[str], told: str) -> None:
    result = draw(run, *options)
    assert result.code == 2
    assert told in result.err
    assert not Path("class-images").exists()
    assert not Path("work").exists()


def test_your_own_images_count_and_are_left_alone(run: Callable, pictures: Path) -> None:
    own = {"mine.png": b"", "more/mine.txt": b"a small dog", "more/mine.png": b"", "generated/00001.png": b""}
    picture = next(pictures.glob("*.png")).read_bytes()
    for name, data in own.items():
        path = Path("class-images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or picture)
    result = draw(run)
    assert result.code == 0, result.err
    assert "drew 2 class images into class-images/generated" in result.err
    assert images() == ["00000.png", "00001.png", "00002.png"]
    assert all(Path("class-images", name).read_bytes() == (data or picture) for name, data in own.items())
    rows = [row for row in PreparedDataset.open(Path("work/prepared")).rows() if row.role == "class"]
    assert sorted(row.captions[0] for row in rows) == ["a photo of a dog"] * 4 + ["a small dog"]
    again, before = draw(run, *changed("count", 6)), drawn()
    assert again.code == 0, again.err
    assert images() == ["00000.png", "00001.png", "00002.png", "00003.png"]
    # Whatever else was there, an image is the same.
    shutil.rmtree("class-images")
    assert draw(run).code == 0
    assert all(drawn()[name] == before[name] for name in ("00000.png", "00002.png", "00003.png"))


def test_other_settings_or_weights_are_refused_with_a_table(run: Callable, tiny_models: Callable) -> None:
    assert draw(run).code == 0
    before = drawn()
    cat = changed("prompt", "a photo of a cat")
    for result in (run("prepare", *cat), run("run", *cat), draw(run, *cat), draw(run, *cat, "--dry-run")):
        assert result.code == 2
        assert "  generate.prompt: expected 'a photo of a cat', found 'a photo of a dog'\n" in result.err
        assert "delete class-images/generated" in result.err
    more = [*changed("count", 2 * NUM_IMAGES), *changed("seed", 1)]
    assert "  generate.seed: expected 1, found 0\n" in draw(run, *more).err
    shutil.copytree(tiny_models("stable-diffusion"), "moved")
    moved = ["--set", "model.path=moved"]
    result = run("prepare", *moved)
    assert (result.code, "model.path: expected 'moved'" in result.err, "another place" in result.err) == (2, True, True)
    assert draw(run, *moved).code == run("prepare", *moved).code == 0
    assert json.loads(Path("class-images/generated/generated.json").read_text())["model"]["path"] == "moved"
    path = Path("moved/scheduler/scheduler_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    result = draw(run, *moved)
    assert (result.code, "  weights.scheduler: expected" in result.err) == (2, True)
    assert {name: data for name, data in drawn().items() if name != "generated.json"} == {
        name: data for name, data in before.items() if name != "generated.json"
    }


def test_the_model_is_freed_before_prepare_goes_on(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    family, held, freed = type(families.get("stable-diffusion")), [], []
    load_pipeline, prepare = family.pipeline, stage.run

    def load_watched(*arguments, **options):
        pipeline = load_pipeline(*arguments, **options)
        held.extend(weakref.ref(part) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
        return pipeline

    def run_watched(*arguments):
        freed.extend(reference() is None for reference in held)
        return prepare(*arguments)

    monkeypatch.setattr(family, "pipeline", load_watched)
    monkeypatch.setattr(stage, "run", run_watched)
    assert draw(run).code == 0
    assert freed == [True, True, True]


@pytest.mark.parametrize("family", families.available())
def test_every_family_draws_them(family: str, run: Callable, tiny_models: Callable, tmp_path: Path) -> None:
    tree = yaml.safe_load(Path("run.yaml").read_text())
    tree["model"] = {"family": family, "path": str(tiny_models(family))}
    tree["data"]["resolutions"] = [64]
    tree["data"]["sources"][1]["generate"] |= {"count": 3, "num_inference_steps": 2, "batch_size": 2}
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    drawing.run(load_run(Path("run.yaml")))
    assert images() == ["00000.png", "00001.png", "00002.png"]
    for name in images():
        with Image.open(Path("class-images/generated", name)) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
            assert any(low < high for low, high in image.getextrema())


def test_the_recipe_trains_on_both_roles_with_every_kind_of_method(run: Callable) -> None:
    for result in (draw(run), run("cache")):
        assert result.code == 0, result.err
    table = CacheStore.open(Path("work/cache")).table
    assert sorted(table["role"].to_pylist()) == ["class"] * NUM_IMAGES + ["instance"] * 4
    for method in (
        "{name: lora, rank: 2, targets: attention}",
        "{name: oft, block_size: 8, targets: attention}",
        "{name: full}",
    ):
        name = method.split()[1].strip(",}")
        result = run("train", "--set", f"method={method}", "--set", f"run={name}", "--json")
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert (report["step"], report["num_bad_steps"]) == (2, 0)
        assert any(Path("work/runs", name, "adapter").iterdir())
