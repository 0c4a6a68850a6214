"""The edit models against diffusers' own pipelines, which are given the positions of images that they leave out."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ftk.errors import ModelError
from ftk.models import base as models
from ftk.models.base import Conditions, load_model
from ftk.models.qwen_image_edit import IMAGE_PAD, QwenImageEdit, QwenImageEditConfig

CPU = torch.device("cpu")
NAMES = ("qwen-image-edit", "qwen-image-edit-plus")
COUNTED = [("qwen-image-edit", 1), *(("qwen-image-edit-plus", count) for count in (1, 2, 3))]
CAPTIONS = ["make it red", " ", "größe 猫 🐈, twice as large", "a dog, " * 20]
SIZES = [(384, 384), (320, 448), (512, 288)]
AREA = 64 * 96
"""In place of a megapixel, of which each picture takes seconds."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name) / "model"
        models.get(name).tiny(made[name])
    return made


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for height, width in SIZES]


class Processor:
    """What Qwen2VLProcessor does for images, without torchvision, which its video processor needs."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory / "processor")
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        pixels = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        filled = []
        for each in text:
            first, *parts = each.split(IMAGE_PAD)
            filled.append(first + "".join(IMAGE_PAD * next(counts) + part for part in parts))
        return BatchFeature({**self.tokenizer(filled, padding=padding, return_tensors=return_tensors), **pixels})


@contextmanager
def positions_of_images(model: Any) -> Iterator[None]:
    """The argument that the pipelines leave out."""
    plain = model.forward

    def forward(*arguments: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        kinds = (input_ids == model.config.image_token_id).int()
        return plain(*arguments, input_ids=input_ids, mm_token_type_ids=kinds, **options)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        model.model.rope_deltas = None


def official(name: str, directory: Path) -> Any:
    """diffusers' own class with its own text encoding."""
    family = models.get(name)
    pipeline_class = getattr(diffusers, family.pipeline_name)
    pipeline = pipeline_class.from_pretrained(directory, dtype=torch.float32, processor=None)
    pipeline.processor = Processor(directory, pipeline.tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def given(name: str, pictures: Sequence[Image.Image]) -> Any:
    """As the pipeline takes them: the first model one image, the second a list."""
    return pictures[0] if name == "qwen-image-edit" else list(pictures)


@pytest.mark.parametrize(("name", "count"), COUNTED)
@torch.no_grad()
def test_texts_equal_the_pipelines_with_positions_of_images(name, count, folders, pictures) -> None:
    family, pipeline = models.get(name), official(name, folders[name])
    encoder = family.load_text_encoder(folders[name], torch.float32, CPU)
    references = [as_pixels(picture) for picture in pictures[:count]]
    ours = family.encode_texts(encoder, CAPTIONS, [references] * len(CAPTIONS))
    for caption, item in zip(CAPTIONS, ours, strict=True):
        with positions_of_images(pipeline.text_encoder):
            theirs, _ = pipeline.encode_prompt(caption, image=given(name, pictures[:count]), device=CPU)
        assert item["embeds"].shape == theirs[0].shape
        torch.testing.assert_close(item["embeds"], theirs[0], atol=3e-6 * float(theirs.abs().max()), rtol=0)
    without, _ = pipeline.encode_prompt(CAPTIONS[-1], image=given(name, pictures[:count]), device=CPU)
    assert (without[0] - ours[-1]["embeds"]).norm() > 0.1 * ours[-1]["embeds"].norm()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_states_of_references_do_not_depend_on_the_caption(name, folders, pictures) -> None:
    family = models.get(name)
    encoder = family.load_text_encoder(folders[name], torch.float32, CPU)
    first, second = ([as_pixels(pictures[number])] for number in (0, 1))
    together = family.encode_texts(encoder, ["make it red", "remove the hat", "make it red"], [first, first, second])
    shared = family.shared_tokens(encoder, first)
    assert torch.equal(together[0]["embeds"][:shared], together[1]["embeds"][:shared])
    alone = family.encode_texts(encoder, ["remove the hat"], [first])[0]["embeds"]
    torch.testing.assert_close(together[1]["embeds"], alone, atol=1e-5, rtol=0)
    (seen_otherwise,) = family.encode_texts(encoder, ["make it red"], [second])
    torch.testing.assert_close(together[2]["embeds"], seen_otherwise["embeds"], atol=1e-5, rtol=0)
    lengths = family.text_lengths(encoder, ["make it red", "remove the hat"])
    assert [len(item["embeds"]) - shared for item in together[:2]] == lengths


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_references_a_text_is_the_templates_alone(name, folders) -> None:
    """The second pipeline encodes such a text; the first one knows none."""
    family = models.get(name)
    encoder = family.load_text_encoder(folders[name], torch.float32, CPU)
    (item,) = family.encode_texts(encoder, ["make it red"])
    pipeline = official("qwen-image-edit-plus", folders["qwen-image-edit-plus"])
    pipeline.processor = lambda text, images, padding, return_tensors: encoder.tokenizer(text, return_tensors="pt")
    pipeline.text_encoder = encoder.model
    theirs, _ = pipeline.encode_prompt("make it red", device=CPU)
    torch.testing.assert_close(item["embeds"], theirs[0], atol=3e-6 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("caption", [f"a {IMAGE_PAD} b", "end <|im_end|>", "\nred"])
def test_a_caption_that_would_break_the_template_is_refused(caption, folders) -> None:
    family = models.get("qwen-image-edit")
    encoder = family.load_text_encoder(folders["qwen-image-edit"], torch.float32, CPU)
    with pytest.raises(ModelError, match="caption"):
        family.encode_texts(encoder, [caption])


@pytest.fixture
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines' megapixel is a constant of theirs."""
    plain = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _area, ratio: plain(AREA, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)


def small(name: str) -> QwenImageEdit:
    family = type(models.get(name))(QwenImageEditConfig(reference_area=AREA))
    assert isinstance(family, QwenImageEdit)
    return family


def inputs_of(family: QwenImageEdit, directory: Path, pictures: Sequence[Image.Image]) -> tuple[Any, Any, list[torch.Tensor]]:
    """Texts with and without instruction, and reference latents, from Pillow's resizing as in the pipelines."""

    def resized(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        return as_pixels(picture.resize(size, Image.Resampling.LANCZOS))

    rule = family.references
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    vae = family.load_vae(directory, torch.float32, CPU)
    seen = [resized(picture, rule.seen_size(*picture.size)) for picture in pictures]
    texts = family.encode_texts(encoder, ["make it red", " "], [seen, seen])
    latents = [family.encode_images(vae, resized(picture, rule.size(*picture.size))[None])[0] for picture in pictures]
    return *texts, latents


@pytest.mark.parametrize(("name", "count"), COUNTED)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_pictures_from_cached_tensors_equal_the_pipelines(name, count, guidance, folders, pictures, small_references) -> None:
    family, chosen = small(name), pictures[:count]
    options = {
        "height": 32, "width": 64, "num_inference_steps": 3, "true_cfg_scale": guidance, "output_type": "latent",
    }  # fmt: skip
    theirs = official(name, folders[name])
    with positions_of_images(theirs.text_encoder):
        expected = theirs(
            image=given(name, chosen), prompt="make it red", negative_prompt=" " if guidance > 1 else None,
            generator=torch.Generator().manual_seed(0), **options,
        ).images  # fmt: skip
    text, empty, latents = inputs_of(family, folders[name], chosen)
    ours = family.pipeline(folders[name], torch.float32, CPU, text_encoder=None, tokenizer=None)
    texts = family.pipeline_texts(text)
    if guidance > 1:
        texts |= {f"negative_{key}": value for key, value in family.pipeline_texts(empty).items()}
    arguments = {**texts, **family.pipeline_references(latents), **options}
    drawn = ours(generator=torch.Generator().manual_seed(0), **arguments).images
    torch.testing.assert_close(drawn, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    alone = ours(generator=torch.Generator().manual_seed(0), **{**arguments, "reference_latents": ()}).images
    assert (alone - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "count"), COUNTED)
@torch.no_grad()
def test_a_trajectory_of_predictions_equals_the_pipelines(name, count, folders, pictures, small_references) -> None:
    family = small(name)
    text, _, latents = inputs_of(family, folders[name], pictures[:count])
    pipeline = family.pipeline(folders[name], torch.float32, CPU, text_encoder=None, tokenizer=None)
    expected = pipeline(
        **family.pipeline_texts(text), **family.pipeline_references(latents), true_cfg_scale=1.0, height=32, width=64,
        num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    model = load_model(family, folders[name], (), torch.float32, CPU)
    conditions = Conditions(texts=family.collate_texts([text]), references=tuple(latents))
    noisy = torch.randn(1, 1, 16, 4, 8, generator=torch.Generator().manual_seed(0))[:, 0]
    for sigma, following in itertools.pairwise(pipeline.scheduler.sigmas):
        noisy = noisy + (following - sigma) * family.predict(model, noisy, sigma[None], conditions)
    patches = noisy.view(1, 16, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 8, 64)
    torch.testing.assert_close(patches, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
def test_a_batch_of_samples_with_equal_sizes_predicts_what_each_does_alone(folders, pictures) -> None:
    family = small("qwen-image-edit-plus")
    model = load_model(family, folders[family.name], (), torch.float32, CPU)
    text, empty, latents = inputs_of(family, folders[family.name], pictures[:2])
    others = [each.flip(-1) for each in latents]
    noisy, sigmas = torch.randn(2, 16, 4, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])
    both = Conditions(
        texts=family.collate_texts([text, empty]),
        references=tuple(torch.cat(pair) for pair in zip(latents, others, strict=True)),
    )
    together = family.predict(model, noisy, sigmas, both)
    for row, (item, references) in enumerate(((text, latents), (empty, others))):
        conditions = Conditions(texts=family.collate_texts([item]), references=tuple(references))
        alone = family.predict(model, noisy[row : row + 1], sigmas[row : row + 1], conditions)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "count"), [COUNTED[0], COUNTED[2]])
@torch.no_grad()
def test_the_familys_pipeline_draws_from_files_as_the_official_one(name, count, folders, pictures, small_references) -> None:
    options = {
        "image": given(name, pictures[:count]), "prompt": "make it red", "negative_prompt": " ", "true_cfg_scale": 4.0,
        "height": 32, "width": 64, "num_inference_steps": 2, "output_type": "pt",
    }  # fmt: skip
    theirs = official(name, folders[name])
    with positions_of_images(theirs.text_encoder):
        expected = theirs(generator=torch.Generator().manual_seed(0), **options).images
    ours = small(name).pipeline(folders[name], torch.float32, CPU)
    drawn = ours(generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(640, 480), (1500, 1000), (1920, 1080), (300, 500), (33, 1000)])
def test_references_have_the_pipelines_sizes(size) -> None:
    width, height = size
    rule = models.get("qwen-image-edit-plus").references
    assert rule.size(*size) == pipeline_qwenimage_edit_plus.calculate_dimensions(1024 * 1024, width / height)
    assert rule.seen_size(*size) == pipeline_qwenimage_edit_plus.calculate_dimensions(384 * 384, width / height)
    rule = models.get("qwen-image-edit").references
    assert (
        rule.seen_size(*size) == rule.size(*size) == pipeline_qwenimage_edit.calculate_dimensions(1024**2, width / height)[:2]
    )
