"""Settings of single prompts: what may be written, what they replace, and what they are cached under."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ftk.configs import prompt_lines
from ftk.configs.load import load, resolved_yaml, validate
from ftk.configs.schema import PromptConfig, RunConfig, SampleConfig
from ftk.errors import ConfigError
from ftk.run import Run, resolve
from ftk.train import sheet

OWN = {"prompt": "a dog", "size": "128x64", "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 7, "strength": 0.5,
       "negative_prompt": "blurry"}  # fmt: skip


def _run(prompts: list[Any], **sample: Any) -> Run:
    tree = {
        "run": "test",
        "model": {"family": "qwen-image", "path": "model"},
        "data": {"sources": [{"path": "x"}], "resolutions": [96]},
        "sample": {"prompts": prompts, **sample},
    }
    return resolve(validate(RunConfig, tree, "test"))


def test_a_prompts_own_settings_replace_those_of_all_prompts() -> None:
    run = _run(["a cat", OWN, {"prompt": "a fox", "height": 32}], num_inference_steps=9, seed=100, negative_prompt="ugly")
    plain, own, tall = run.drawn_prompts
    assert (plain.width, plain.height, plain.num_inference_steps, plain.guidance_scale, plain.seed) == (96, 96, 9, 4.0, 100)
    assert (own.width, own.height, own.num_inference_steps, own.guidance_scale, own.seed) == (128, 64, 3, 2.5, 7)
    assert (tall.width, tall.height, tall.seed) == (96, 32, 102)
    negatives = [run.negative_prompt(Path("model"), each.entry) for each in run.drawn_prompts]
    assert negatives == ["ugly", "blurry", "ugly"]
    assert own.entry.notes() == "128x64 px, steps 3, guidance 2.5, seed 7, strength 0.5, without blurry"
    assert plain.entry.notes() == ""


def test_a_resolved_run_file_says_the_same_of_its_prompts() -> None:
    config = _run(["a cat", OWN]).config
    assert validate(RunConfig, yaml.safe_load(resolved_yaml(config)), "resolved").sample.entries == config.sample.entries


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "x", "guidance": 3}, r"`prompts.0.guidance` is not a setting. Did you mean `guidance_scale`"),
        ({"prompt": "x", "controll_strength": 3}, "Did you mean `control_strength`"),
        ({"prompt": "x", "size": "64x64", "width": 64}, "`size` sets `width` and `height`"),
        ({"prompt": "x", "size": 64}, "a size is WIDTHxHEIGHT in px, such as 768x1024"),
        ({"prompt": "x", "size": "64x0"}, "a side has 1 to 16,384 px"),
        ({"prompt": "x", "width": 8}, "greater than or equal to 16"),
        ({"prompt": "x", "control_strength": 0.5}, "`control_strength` has no effect without `controls`"),
        ({"prompt": "x", "controls": ["a.png"], "control_strength": -1}, "greater than or equal to 0"),
        ({"prompt": "x", "guidance_scale": 1, "negative_prompt": "y"}, "has no effect without `guidance_scale` above 1"),
        ({"prompt": "x", "negative_prompt": "half \ud83d"}, "half of a surrogate pair"),
        ("a dog --w 768 --h 512", "options of a prompt .* are read from a file of lines alone"),
    ],
)
def test_wrong_settings_of_a_prompt_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(SampleConfig, {"prompts": [prompt]}, "test")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "x", "width": 72}, r"sample.prompts.1: 72 x 96 px; qwen-image needs multiples of 16 px"),
        ({"prompt": "x", "references": ["a.png"]}, r"sample.prompts.1.references: qwen-image takes no input images"),
        ({"prompt": "x", "controls": ["a.png"]}, r"sample.prompts.1.controls: method lora reads no control images"),
    ],
)
def test_what_the_family_or_method_cannot_draw_is_refused_with_its_place(prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = _run(["a cat", prompt]).drawn_prompts


def test_caches_list_prompts_without_new_settings_as_before() -> None:
    assert PromptConfig(prompt="a dog").key() == "a dog"
    images = {"references": ("a.png",), "controls": ("b.png",)}
    digest = hashlib.sha256(repr([["a.png"], ["b.png"]]).encode()).hexdigest()[:12]
    assert PromptConfig(prompt="a dog", **images).key() == f"a dog #{digest}"
    assert PromptConfig(prompt="a dog", **images).key(None) == f"\0 #{digest}"
    # How it is drawn is no part of what is cached; the size of its control images is.
    drawn_otherwise = {"seed": 7, "strength": 0.5, "num_inference_steps": 3, "control_strength": 0.5, "negative_prompt": "x"}
    assert PromptConfig(prompt="a dog", **images, **drawn_otherwise).key() == f"a dog #{digest}"
    assert PromptConfig(prompt="a dog", **images, width=64).key() not in (f"a dog #{digest}", "a dog")
    assert PromptConfig(prompt="a dog", references=("a.png",), width=64).key() == (
        PromptConfig(prompt="a dog", references=("a.png",)).key()
    )


def _lines(tmp_path: Path, text: str) -> Path:
    (tmp_path / "prompts.txt").write_text(text)
    run_file = tmp_path / "run.yaml"
    tree = {"run": "test", "model": {"family": "qwen-image", "path": "m"}, "data": {"sources": [{"path": "x"}]}}
    run_file.write_text(yaml.safe_dump({**tree, "sample": {"prompts": str(tmp_path / "prompts.txt")}}))
    return run_file


def test_prompts_may_be_a_file_of_lines_with_the_options_of_sd_scripts(tmp_path: Path) -> None:
    lines = "# comment\n\na dog, sitting --n blurry, dark --W 768 --h 1024 --d 7 --l 3.5 --s 20\r\n  a cat  \nrain --cn a b.png"
    first, second, third = load(_lines(tmp_path, lines)).sample.entries
    assert first == PromptConfig(
        prompt="a dog, sitting", negative_prompt="blurry, dark", width=768, height=1024, seed=7, guidance_scale=3.5,
        num_inference_steps=20,
    )  # fmt: skip
    assert second == PromptConfig(prompt="a cat")
    assert third == PromptConfig(prompt="rain", controls=("a b.png",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\na dog --ss ddim", r"prompts.txt, line 2: `--ss` \(the sampler\) is not known to ftk"),
        ("a dog --width 768", r"line 1: `--width` is not an option of a prompt.* Known are --n, --w, --h"),
        ("a dog --w 64 --w 96", "line 1: `--w` stands twice"),
        ("a dog --w wide", r"`sample.prompts.0.width`: .*integer"),
    ],
)
def test_options_that_a_line_cannot_have_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(_lines(tmp_path, text))


def test_a_file_of_prompts_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sample.prompts: .*none.txt cannot be read: No such file"):
        prompt_lines.read(str(tmp_path / "none.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="Name a text file with a prompt per line"):
        prompt_lines.read(str(tmp_path / "binary.txt"))


def test_a_sheet_shows_what_pictures_were_drawn_from_and_gives_both_back(tmp_path: Path) -> None:
    def filled(red: int, width: int = 32, height: int = 16) -> Image.Image:
        return Image.new("RGB", (width, height), (red, 0, 0))

    rows = [[filled(1), filled(2)], [filled(3, 16, 32), filled(4, 16, 32)], [filled(5), filled(6)]]
    inputs: list[sheet.Inputs] = [
        {"reference": [filled(11, 400, 200)], "control": [filled(12)]},
        {"control": [filled(13, 16, 32)]},
        {},
    ]
    page = sheet.grid(rows, ["a", "b", "c"], ["base", "run"], inputs, ["seed 7", "", ""])
    path = tmp_path / "sheet.png"
    path.write_bytes(sheet.png_bytes(page))

    def red(image: Image.Image) -> int:
        return image.getpixel((image.width // 2, image.height // 2))[0]  # type: ignore[index]

    cells = sheet.cells_with_inputs(path)
    assert [(red(image), prompt, [red(each) for each in given]) for image, prompt, given in cells] == [
        (1, "a", [11, 12]), (2, "a", [11, 12]), (3, "b", [13]), (4, "b", [13]), (5, "c", []), (6, "c", []),
    ]  # fmt: skip
    assert [(image.size, prompt) for image, prompt in sheet.cells(path)] == [(image.size, prompt) for image, prompt, _ in cells]
    # A large reference is shrunk to the drawn picture, and no picture is stretched.
    assert cells[0][2][0].size == cells[0][0].size == (192, 96)
    assert cells[2][0].size == (96, 192)
    # Two columns more than without, and the notes do not change what a cell says.
    assert page.width > sheet.grid(rows, ["a", "b", "c"], ["base", "run"]).width * 1.8
