"""The page that `ftk inspect --html --model` writes of a cache, from real pictures and a real VAE, opened in a browser."""

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from browser import measured, needs_browser, opened, title, with_script
from PIL import Image, ImageDraw, ImageOps

from ftk.cache.store import CacheStore
from ftk.demo import draw_pictures
from ftk.models import base as families
from ftk.pipeline.dataset import PreparedDataset

HOSTILE = """<script>document.title = "ran"</script><img src=x onerror="document.title = 'ran'">"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_model, ftk) -> Path:
    """A workspace with eight samples, two of them with a mask and a control image, prepared and cached; read only."""
    root = tmp_path_factory.mktemp("inspect")
    draw_pictures(root / "plain", 6)
    draw_pictures(root / "edited", 2)
    for path in (*(root / "edited").glob("*.png"), *(root / "edited").glob("*.jpg")):
        with Image.open(path) as image:
            for folder in ("masks", "negatives"):
                (root / folder).mkdir(exist_ok=True)
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).rectangle((0, 0, image.width // 2, image.height), fill=255)
            mask.save(root / "masks" / f"{path.stem}.png")
            ImageOps.invert(image.convert("RGB")).save(root / "negatives" / f"{path.stem}.png")
    next((root / "plain").glob("*.txt")).write_text(HOSTILE)
    edited = {"path": str(root / "edited"), "masks": str(root / "masks"), "controls": [str(root / "negatives")]}
    tree = {
        "run": "test", "workspace": str(root / "work"), "model": {"family": "qwen-image", "path": str(tiny_model)},
        "data": {"sources": [{"path": str(root / "plain")}, edited], "resolutions": [64], "workers": 1},
        "sample": {"prompts": [f"a cat {HOSTILE}"]},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    for command in ("prepare", "cache"):
        done = ftk(command, root / "run.yaml")
        assert done.code == 0, done.err
    return root / "work"


@pytest.fixture(scope="module")
def page(work, ftk, tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "inspect.html"
    result = ftk("inspect", work / "cache", "--html", "--model", tiny_model, "--out", out)
    assert (result.code, result.out.strip()) == (0, str(out)), result.err
    return out


def cards(text: str) -> Iterator[tuple[str, list[tuple[str, np.ndarray]], str]]:
    """Of each sample on the sheet: its key, its pictures with their labels, and all of its HTML."""
    for card in re.findall(r'<article class="card">(.*?)</article>', text, re.DOTALL):
        figures = re.findall(r'src="data:image/\w+;base64,([^"]+)".*?<figcaption>(.*?)</figcaption>', card, re.DOTALL)
        pictures = [(label, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for data, label in figures]
        yield re.search(r'class="key">(.*?)<', card).group(1), pictures, card


@pytest.fixture(scope="module")
def decoded(work, tiny_model) -> Callable[[torch.Tensor], np.ndarray]:
    """8-bit pixels [H,W,3] of latents, straight from the family."""
    family = families.get("qwen-image")
    vae = family.load_vae(tiny_model, torch.float32, torch.device("cpu"))

    def decode(latents: torch.Tensor) -> np.ndarray:
        pixels = family.decode(vae, latents[None].float())[0].clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()

    return decode


def test_the_sheet_shows_every_sample_decoded_beside_its_source(work, page, decoded):
    store, rows = CacheStore.open(work / "cache"), {row.key: row for row in PreparedDataset.open(work / "prepared").rows()}
    dataset = PreparedDataset.open(work / "prepared")
    shown = list(cards(page.read_text()))
    assert sorted(key for key, *_ in shown) == sorted(rows)
    for key, pictures, card in shown:
        number = store.table["key"].to_pylist().index(key)
        source = np.asarray(Image.open(io.BytesIO(dataset.image_bytes(rows[key]))).convert("RGB"))
        expected = decoded(store.latents(number)[0])
        ratio = 10 * np.log10(255**2 / np.mean((source.astype(float) - expected) ** 2))
        assert [label for label, _ in pictures][:2] == ["source", f"decoded, {ratio:.1f}\N{NO-BREAK SPACE}dB"]
        # As JPEG.
        for wanted, (_, found) in zip((source, expected), pictures, strict=False):
            assert np.abs(wanted.astype(float) - found).mean() < 4
        assert rows[key].captions[0] in html.unescape(card)
        assert f"{store.sample(number).text_lengths[0]} tokens" in card


def test_masks_and_control_images_are_shown_too(work, page, decoded):
    store = CacheStore.open(work / "cache")
    numbers = {key: number for number, key in enumerate(store.table["key"].to_pylist())}
    more = {key: pictures[2:] for key, pictures, _ in cards(page.read_text()) if len(pictures) > 2}
    assert sorted(numbers[key] for key in more) == [number for number in range(len(store)) if store.mask(number) is not None]
    assert len(more) == 2
    for key, pictures in more.items():
        assert [label.split(",")[0] for label, _ in pictures] == ["control 1", "decoded", "mask", "in cells"]
        control, _ = store.controls(numbers[key])[0]
        assert np.abs(decoded(control).astype(float) - pictures[1][1]).mean() < 4
        cells = store.mask(numbers[key]).float().numpy()
        assert np.abs(pictures[3][1] / 255 - cells).max() < 0.003


@needs_browser
def test_the_page_shows_numbers_and_encoders(work, page, tmp_path):
    document = opened(page, tmp_path)
    assert title(document) == "work/cache: 8 samples"
    manifest = CacheStore.open(work / "cache").manifest
    for text in (
        "64×64", "nothing was cut", "8 of 8 images read", "every value is finite", "libraries.torch", torch.__version__,
        manifest.latents_fingerprint, manifest.encoders["latents"]["weights"]["vae"], "named by no sample", "posterior std",
    ):  # fmt: skip
        assert text in document
    assert "These are not the weights" not in document


@needs_browser
@pytest.mark.parametrize("policy", [True, False])
def test_captions_and_prompts_cannot_run_scripts(page, tmp_path, policy):
    script = "addEventListener('load', () => { document.title += ' ' + document.querySelectorAll('script').length; });"
    assert title(opened(with_script(page, tmp_path, script, policy), tmp_path)) == "work/cache: 8 samples 1"


@needs_browser
@pytest.mark.parametrize("width_px", [1280, 390])
def test_every_image_decodes_and_nothing_is_fetched_or_cut_off(page, tmp_path, width_px):
    number = page.read_text().count("<figure>")
    assert measured(page, tmp_path, width_px) == {
        "images": number, "decoded": number, "fetched": 0, "width": width_px, "overflow": False,
    }  # fmt: skip
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page.read_text())


def test_a_cache_elsewhere_is_shown_with_the_dataset_that_is_named(work, ftk, tiny_model, tmp_path):
    shutil.copytree(work / "cache", tmp_path / "cache")
    alone = ftk("inspect", tmp_path / "cache", "--html", "--model", tiny_model)
    assert (alone.code, alone.out.strip()) == (0, str(tmp_path / "cache" / "inspect.html"))
    text = (tmp_path / "cache" / "inspect.html").read_text()
    assert "No prepared dataset lies beside the cache" in text
    assert {label for _, pictures, _ in cards(text) for label, _ in pictures} == {
        "decoded", "control 1, decoded", "mask, in cells",
    }  # fmt: skip
    ftk("inspect", tmp_path / "cache", "--html", "--model", tiny_model, "--prepared", work / "prepared")
    text = (tmp_path / "cache" / "inspect.html").read_text()
    assert f"Sources and captions: {work / 'prepared'}" in text
    assert "source" in {label for _, pictures, _ in cards(text) for label, _ in pictures}


def test_a_dataset_with_other_pixels_gives_no_sources(work, ftk, tiny_model, tmp_path):
    ftk("prepare", work.parent / "run.yaml", "--workspace", tmp_path, "--set", "data.resolutions=[96]")
    out = tmp_path / "x.html"
    arguments = ("inspect", work / "cache", "--html", "--model", tiny_model, "--prepared", tmp_path / "prepared", "--out", out)
    assert ftk(*arguments).code == 0
    assert out.read_text().count("The prepared dataset has no such sample any more, or other pixels for it") == 8
    assert "source" not in {label for _, pictures, _ in cards(out.read_text()) for label, _ in pictures}


def test_json_has_the_numbers_of_both_and_the_pages(work, ftk):
    both = json.loads(ftk("inspect", work, "--json").out)
    assert (both["num_samples"], both["num_masks"], both["cache"]["num_images"]) == (8, 2, 8 - 2)
    assert both["cache"]["latents"]["non_finite_share"] == 0
    assert len(both["cache"]["latents"]["channels"]) == 16


def test_damage_and_absence_end_in_a_message_and_code_2(work, ftk, tiny_model, tmp_path):
    shutil.copytree(work / "cache", tmp_path / "cache")
    shard = next((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    damaged = ftk("inspect", tmp_path / "cache")
    assert (damaged.code, damaged.out) == (2, "")
    assert "is damaged" in damaged.err
    shard.write_bytes(whole)
    foreign = ftk("inspect", tmp_path / "cache", "--html", "--model", tiny_model / "transformer")
    assert foreign.code == 2
    assert "no vae folder of a qwen-image model" in foreign.err
    (tmp_path / "cache" / "cache.json").unlink()
    unfinished = ftk("inspect", tmp_path)
    assert (unfinished.code, unfinished.out) == (2, "")
    assert "holds no finished cache. Run `ftk cache" in unfinished.err
