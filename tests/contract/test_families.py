"""What every family promises, held against the diffusers pipeline of its tiny model."""

import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import denoisers
import numpy as np
import pytest
import torch

from ftk import devices
from ftk.cache import fingerprint
from ftk.configs.schema import ModelConfig, RunConfig
from ftk.errors import ConfigError, EnvironmentFault, ModelError
from ftk.models import base
from ftk.models.base import Conditions, Family, Model, TrainsEncoders
from ftk.models.components import model_folder
from ftk.models.components.geometry import SampleGeometry, nearest_multiple
from ftk.run import resolve

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat on a chair", "", "größe 猫", "a dog, " * 20]


@pytest.fixture(params=denoisers.all_families())
def name(request: pytest.FixtureRequest) -> str:
    """Each family: a test runs with all of them unless it names its own."""
    return str(request.param)


@pytest.fixture
def family(name: str) -> Family:
    return base.get(name)


@pytest.fixture
def directory(name: str, tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models(name)


@pytest.fixture
def texts(family: Family, directory: Path) -> list[dict[str, torch.Tensor]]:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    return [{key: value.clone() for key, value in item.items()} for item in family.encode_texts(encoder, CAPTIONS)]


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pixels(batch: int, height: int = 48, width: int = 32) -> torch.Tensor:
    return _draw(batch, 3, height, width, seed=5).clamp(-1, 1)


def test_native_sizes_are_ones_that_the_family_has(family: Family) -> None:
    assert family.native_sizes
    assert len(set(family.native_sizes)) == len(family.native_sizes)
    multiple = family.geometry.pixel_multiple
    assert all(side % multiple == 0 for size in family.native_sizes for side in size)


def test_the_native_sizes_of_sdxl_hold_the_buckets_that_diffusers_knows_of_its_training() -> None:
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

    # PixArt took over SDXL's list, as (height, width), but for some of the longest.
    known = {(int(width), int(height)) for height, width in ASPECT_RATIO_1024_BIN.values()}
    assert known <= set(base.get("sdxl").native_sizes)
    assert len(base.get("sdxl").native_sizes) == 40


def test_the_size_named_for_an_odd_one_of_qwen_image_is_what_its_pipeline_draws() -> None:
    from diffusers import QwenImagePipeline

    tokens = torch.zeros(1, (1472 // 16) * (1140 // 16), 64)
    drawn = QwenImagePipeline._unpack_latents(tokens, 1140, 1472, 8)
    assert (drawn.shape[-1] * 8, drawn.shape[-2] * 8) == nearest_multiple((1472, 1140), 16) == (1472, 1136)


def _latents(family: Family, batch: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return _draw(batch, family.geometry.channels, height, width)


def _model(family: Family, directory: Path) -> Model:
    model = base.load_model(family, directory, (), torch.float32, CPU)
    model.denoiser.eval()
    return model


def _sigmas(model: Model, *shares: float) -> torch.Tensor:
    """Sigmas at shares of the model's training table: 0 is noise."""
    table = model.schedule.sigmas
    return table[[int(share * len(table)) for share in shares]]


def _conditions(family: Family, *items: Mapping[str, torch.Tensor], **others: Any) -> Conditions:
    return Conditions(texts=family.collate_texts(items), **others)


def _hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _posterior(family: Family, directory: Path, pixels: torch.Tensor) -> Any:
    """The posterior of diffusers' own VAE, in fp32; a video VAE takes images as clips of one frame."""
    vae = family.pipeline(directory, torch.float32, CPU).vae
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    is_video = hasattr(vae.config, "temperal_downsample")
    with torch.no_grad():
        return vae.encode(pixels.unsqueeze(2) if is_video else pixels).latent_dist


def _assert_equal_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal in fp32 to 1e-6 of the largest value."""
    torch.testing.assert_close(ours, theirs, atol=1e-6 * theirs.abs().max().item(), rtol=0)


def test_the_tiny_model_is_deterministic(family: Family, directory: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    family.tiny(tmp_path)
    assert _hashes(tmp_path) == _hashes(directory)


def test_building_the_tiny_model_leaves_the_random_state(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    family.tiny(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_tiny_model_is_one_of_its_family_and_complete(family: Family, directory: Path) -> None:
    family.check(directory)
    for component in (*family.latent_components, *family.text_components, *family.denoiser_components):
        assert (directory / component).is_dir()


def test_texts_equal_the_pipelines(family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]) -> None:
    pipeline = family.pipeline(directory, torch.float32, CPU)
    theirs = _encoded(pipeline, CAPTIONS)
    collated = family.collate_texts(texts)
    assert collated["embeds"] is not None
    mask = torch.ones(collated["embeds"].shape[:2]) if family.pads_texts else collated["mask"]
    assert mask is not None
    assert theirs.get("mask") is None or torch.equal(theirs["mask"].bool(), mask)
    assert collated["embeds"].shape == theirs["embeds"].shape
    _assert_equal_to_rounding(collated["embeds"] * mask[..., None], theirs["embeds"] * mask[..., None])
    for caption, item in zip(CAPTIONS, texts, strict=True):
        alone = _encoded(pipeline, [caption])
        # Token ids are there where a text encoder can be trained with them.
        assert any("ids" in key for key in item) == isinstance(family, TrainsEncoders)
        assert {key for key in item if "ids" not in key} == alone.keys()
        for key, value in alone.items():
            _assert_equal_to_rounding(item[key], value[0])


@torch.no_grad()
def _encoded(pipeline: Any, captions: list[str], **settings: Any) -> dict[str, torch.Tensor]:
    """What `encode_prompt` returns, by our names: embeddings and their mask, or also the negative and the pooled ones."""
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    known = inspect.signature(pipeline.encode_prompt).parameters
    options = {key: value for key, value in options.items() if key in known}
    outputs = pipeline.encode_prompt(captions, device=CPU, **options, **settings)
    by_number = {
        2: ("embeds", "mask"),
        3: ("embeds", "pooled", "positions"),
        4: ("embeds", "negative", "pooled", "negative_pooled"),
    }
    named = dict(zip(by_number[len(outputs)], outputs, strict=True))
    return {name: tensor for name, tensor in named.items() if tensor is not None and name != "positions"}


def test_the_empty_caption_encodes_to_something(family: Family, texts: list[dict[str, torch.Tensor]]) -> None:
    empty = texts[CAPTIONS.index("")]["embeds"]
    assert len(empty) > 0
    assert empty.isfinite().all()
    assert family.pads_texts or len(empty) < min(
        len(item["embeds"]) for caption, item in zip(CAPTIONS, texts, strict=True) if caption
    )


def test_batch_composition_changes_no_text(family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]) -> None:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    for caption, together in zip(CAPTIONS, texts, strict=True):
        (alone,) = family.encode_texts(encoder, [caption])
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            _assert_equal_to_rounding(value, together[key])


def test_text_lengths_are_those_of_the_encoded_texts(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    assert family.text_lengths(encoder, CAPTIONS) == [len(item["embeds"]) for item in texts]
    assert family.text_lengths(encoder, ["word " * 3000]) == [family.max_text_tokens]


def test_tokens_beyond_the_limit_are_counted(family: Family, directory: Path) -> None:
    """By captions of which each has one letter more than the one before, and letters are what the tiny tokenizers know."""
    lengths = range(family.max_text_tokens - 20, family.max_text_tokens + 20)
    counts = family.tokens_cut(directory, ["a" * length for length in lengths])
    num_whole = counts.index(1)
    assert num_whole <= 20
    assert counts == [0] * num_whole + list(range(1, len(lengths) - num_whole + 1))


def test_memory_grows_with_the_text_and_with_the_image(family: Family, directory: Path) -> None:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    assert 0 < family.text_memory(encoder, 10) < family.text_memory(encoder, 100)
    vae = family.load_vae(directory, torch.float32, CPU)
    one = family.image_memory(vae, 64, 64)
    assert one > 64 * 64 * 3 * 4
    assert family.image_memory(vae, 128, 64) == family.image_memory(vae, 64, 128) == pytest.approx(2 * one, rel=0.1)


def test_different_captions_give_different_texts(texts: list[dict[str, torch.Tensor]]) -> None:
    one, two = texts[0]["embeds"], texts[2]["embeds"]
    length = min(len(one), len(two))
    assert (one[:length] - two[:length]).abs().max() > 1e-2


def test_a_caption_beyond_the_limit_is_cut(family: Family, directory: Path) -> None:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    (item,) = family.encode_texts(encoder, ["word " * 3000])
    assert len(item["embeds"]) == family.max_text_tokens


def test_the_text_options_are_plain_values(family: Family) -> None:
    assert json.loads(json.dumps(family.text_options())) == family.text_options()


# What the caches of these families were made with: other values would leave every cached text unused.
_DEFAULT_OPTIONS = {
    "sdxl": {
        "layer": "second to last of both, pooled of the second", "padding": "max_length", "max_text_tokens": 77,
    },
    "stable-diffusion": {"layer": "last, normed", "padding": "max_length", "max_text_tokens": 77},
}  # fmt: skip
_CHANGED = [("qwen-image", {"max_text_tokens": 8}), ("sdxl", {"clip_skip": 1}), ("stable-diffusion", {"clip_skip": 1})]


def _with_settings(family: Family, **settings: Any) -> Any:
    """The family with settings of its own, as a run file gives them."""
    return base.parse(ModelConfig.model_validate({"family": family.name, "path": "unused", **settings}))


def _text_fingerprint(family: Family) -> str:
    model = {"family": family.name, "path": "unused"}
    run = resolve(RunConfig.model_validate({"run": "test", "model": model, "data": {"sources": [{"path": "unused"}]}}))
    return fingerprint.of_parts(fingerprint.encoder_parts("texts", dataclasses.replace(run, family=family), None))


@pytest.mark.parametrize("name", _DEFAULT_OPTIONS)
def test_default_settings_leave_the_text_options_as_they_were(family: Family) -> None:
    assert family.text_options() == _DEFAULT_OPTIONS[family.name]


@pytest.mark.parametrize("name", ["qwen-image"])
def test_the_default_text_options_are_the_pipelines_template_and_cut(family: Family, directory: Path) -> None:
    pipeline = family.pipeline(directory, torch.float32, CPU)
    assert family.text_options() == {
        "template": pipeline.prompt_template_encode,
        "prefix_tokens": pipeline.prompt_template_encode_start_idx,
        "max_text_tokens": inspect.signature(pipeline.encode_prompt).parameters["max_sequence_length"].default,
    }


@pytest.mark.parametrize(("name", "settings"), _CHANGED)
def test_a_changed_setting_changes_the_fingerprint_of_texts(family: Family, settings: dict[str, Any]) -> None:
    changed = _with_settings(family, **settings)
    assert family.text_options() != changed.text_options()
    assert changed.text_options().items() >= settings.items()
    assert _text_fingerprint(family) != _text_fingerprint(changed)
    assert _text_fingerprint(family) == _text_fingerprint(_with_settings(family))


@torch.no_grad()
def _with_layers_skipped(family: Family, encoder: Any, captions: list[str], skip: int) -> dict[str, torch.Tensor]:
    """`embeds`, and of SDXL `pooled`, from transformers' own hidden states."""
    tokenizers = getattr(encoder, "tokenizers", None) or (encoder.tokenizer,)
    models = getattr(encoder, "models", None) or (encoder.model,)
    outputs = []
    for tokenizer, model in zip(tokenizers, models, strict=True):
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")["input_ids"]
        outputs.append(model(ids, output_hidden_states=True))
    if family.name == "stable-diffusion":
        norm = next(part for path, part in models[0].named_modules() if path.split(".")[-1] == "final_layer_norm")
        return {"embeds": norm(outputs[0].hidden_states[-1 - skip])}
    embeds = torch.cat([output.hidden_states[-2 - skip] for output in outputs], dim=-1)
    return {"embeds": embeds, "pooled": outputs[1].text_embeds}


@pytest.mark.parametrize("name", ["sdxl", "stable-diffusion"])
def test_texts_with_layers_skipped_equal_the_pipelines(family: Family, directory: Path) -> None:
    skipping = _with_settings(family, clip_skip=1)
    encoder = skipping.load_text_encoder(directory, torch.float32, CPU)
    collated = skipping.collate_texts(skipping.encode_texts(encoder, CAPTIONS))
    expected = _with_layers_skipped(family, encoder, CAPTIONS, 1)
    pipelines = _encoded(skipping.pipeline(directory, torch.float32, CPU), CAPTIONS, clip_skip=1)

    trained = base.load_model(skipping, directory, skipping.trainable_encoders, torch.float32, CPU)
    ids = {key: tensor.clone() for key, tensor in collated.items() if "ids" in key}
    with torch.no_grad():
        from_ids = base.encoded(trained, ids)
    plain = family.collate_texts(family.encode_texts(encoder, CAPTIONS))
    assert expected.keys() == pipelines.keys() == {key for key in collated if "ids" not in key}
    for key, tensor in expected.items():
        _assert_equal_to_rounding(pipelines[key], tensor)
        _assert_equal_to_rounding(collated[key], tensor)
        _assert_equal_to_rounding(from_ids[key], tensor)
    assert (plain["embeds"] - collated["embeds"]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "most"), [("sdxl", 1), ("stable-diffusion", 2)])
def test_more_skipped_layers_than_a_text_encoder_has_are_a_config_error(family: Family, most: int, directory: Path) -> None:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    (item,) = _with_settings(family, clip_skip=most).encode_texts(encoder, ["a cat"])
    assert item["embeds"].isfinite().all()
    with pytest.raises(ConfigError, match=rf"model\.clip_skip: {most + 1}: .* has 2 layers.* Set it to {most} or less"):
        _with_settings(family, clip_skip=most + 1).encode_texts(encoder, ["a cat"])


@pytest.mark.parametrize("name", ["qwen-image"])
def test_a_lower_limit_of_tokens_cuts_where_the_pipeline_cuts(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    cutting = _with_settings(family, max_text_tokens=8)
    encoder = cutting.load_text_encoder(directory, torch.float32, CPU)
    pipeline = family.pipeline(directory, torch.float32, CPU)
    items = cutting.encode_texts(encoder, CAPTIONS)
    lengths = [len(item["embeds"]) for item in items]
    assert lengths == cutting.text_lengths(encoder, CAPTIONS)
    assert min(lengths) < max(lengths) == cutting.max_text_tokens == 8
    whole = [len(item["embeds"]) for item in texts]
    assert cutting.tokens_cut(directory, CAPTIONS) == [full - cut for full, cut in zip(whole, lengths, strict=True)]
    for caption, item in zip(CAPTIONS, items, strict=True):
        _assert_equal_to_rounding(item["embeds"], _encoded(pipeline, [caption], max_sequence_length=8)["embeds"][0])


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), _CHANGED)
def test_with_its_own_settings_cached_texts_give_the_image_that_the_prompt_gives(
    family: Family, directory: Path, settings: dict[str, Any], texts: list[dict[str, torch.Tensor]]
) -> None:
    changed = _with_settings(family, **settings)
    encoder = changed.load_text_encoder(directory, torch.float32, CPU)
    (item,) = changed.encode_texts(encoder, CAPTIONS[:1])
    pipeline = changed.pipeline(directory, torch.float32, CPU)
    cached = _generate(changed, pipeline, item, output_type="pt")
    no_embeds = dict.fromkeys(changed.pipeline_texts(item))
    prompted = _generate(changed, pipeline, item, **no_embeds, prompt=CAPTIONS[0], output_type="pt")
    torch.testing.assert_close(cached, prompted, atol=1e-4, rtol=0)
    assert (cached - _generate(family, pipeline, texts[0], output_type="pt")).abs().max() > 1e-3


def test_images_equal_the_vaes_posterior_normalised(family: Family, directory: Path) -> None:
    vae = family.load_vae(directory, torch.float32, CPU)
    constants = family.normalisation(directory)
    pixels = _pixels(2)
    mean, std = family.encode_images(vae, pixels)
    posterior = _posterior(family, directory, pixels)
    shape = (1, family.geometry.channels, 1, 1)
    shift, scale = (torch.tensor(constants[key]).view(shape) for key in ("latents_mean", "latents_std"))
    _assert_equal_to_rounding(mean, (posterior.mean.squeeze(2) - shift) / scale)
    _assert_equal_to_rounding(std, posterior.std.squeeze(2) / scale)
    assert mean.dtype == std.dtype == torch.float32
    assert (std > 0).all()


def test_batch_composition_changes_no_image(family: Family, directory: Path) -> None:
    vae = family.load_vae(directory, torch.float32, CPU)
    pixels = _pixels(3)
    mean, std = family.encode_images(vae, pixels)
    for index in range(3):
        mean_alone, std_alone = family.encode_images(vae, pixels[index : index + 1])
        for alone, together in ((mean_alone, mean), (std_alone, std)):
            torch.testing.assert_close(alone[0], together[index], atol=2e-6 * float(together.abs().max()), rtol=0)


def test_decoding_gives_the_shape_of_what_was_encoded(family: Family, directory: Path) -> None:
    vae = family.load_vae(directory, torch.float32, CPU)
    multiple = family.geometry.pixel_multiple
    pixels = _pixels(2, height=3 * multiple, width=2 * multiple)
    mean, _ = family.encode_images(vae, pixels)
    factor = family.geometry.factor
    assert mean.shape == (2, family.geometry.channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
    decoded = family.decode(vae, mean)
    assert decoded.shape == pixels.shape
    assert decoded.isfinite().all()


def test_components_are_frozen_and_the_denoiser_is_in_training_mode(family: Family, directory: Path) -> None:
    denoiser = family.load_denoiser(directory, torch.bfloat16, CPU)
    assert denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in family.load_vae(directory, torch.float32, CPU).parameters())


def test_the_denoiser_on_meta_has_the_same_shapes_and_no_weights(family: Family, directory: Path, tmp_path: Path) -> None:
    loaded = family.load_denoiser(directory, torch.float32, CPU)
    component = family.denoiser_attribute
    (tmp_path / component).mkdir()
    (tmp_path / component / "config.json").write_bytes((directory / component / "config.json").read_bytes())
    meta = family.load_denoiser(tmp_path, torch.float32, torch.device("meta"))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert {key: value.shape for key, value in meta.named_parameters()} == {
        key: value.shape for key, value in loaded.named_parameters()
    }
    assert not any(parameter.requires_grad for parameter in meta.parameters())


def test_the_schedule_is_the_schedulers_training_table(family: Family, directory: Path) -> None:
    schedule = family.load_schedule(directory)
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.sigmas.shape == (1000,)
    assert schedule.sigmas[0] <= 1
    assert (schedule.sigmas.diff() < 0).all()
    assert schedule.sigmas[-1] > 0
    signal, sigma = schedule.scales(schedule.sigmas, torch.float32)
    assert torch.equal(sigma, schedule.sigmas)
    if schedule.objective == "flow":
        torch.testing.assert_close(schedule.sigmas, torch.arange(1000, 0, -1) / 1000, atol=1e-6, rtol=0)
        assert torch.equal(schedule.time(sigma), sigma)
        assert torch.equal(signal, 1 - sigma)
    else:
        signals_squared = family.pipeline(directory, torch.float32, CPU).scheduler.alphas_cumprod.flip(0)
        assert torch.equal(schedule.time(sigma), torch.arange(999, -1, -1, dtype=torch.float32))
        assert torch.equal(signal, signals_squared**0.5)
        assert torch.equal(sigma, (1 - signals_squared) ** 0.5)


def test_rounded_scales_are_those_of_the_rounded_sigma(family: Family, directory: Path) -> None:
    schedule = family.load_schedule(directory)
    signal, sigma = schedule.scales(schedule.sigmas, torch.bfloat16)
    assert torch.equal(sigma, schedule.sigmas.bfloat16())
    exact, _ = schedule.scales(schedule.sigmas, torch.float32)
    # In flow matching the signal is what the rounded sigma leaves.
    expected = 1 - sigma if schedule.objective == "flow" else exact.bfloat16()
    assert signal.dtype == torch.bfloat16
    assert torch.equal(signal, expected)


def test_texts_of_one_length_need_no_mask(family: Family, texts: list[dict[str, torch.Tensor]]) -> None:
    collated = family.collate_texts([texts[0], texts[0]])
    assert collated.get("mask") is None
    assert collated["embeds"] is not None
    assert torch.equal(collated["embeds"][1], texts[0]["embeds"])


@torch.no_grad()
def test_without_geometries_images_are_whole(family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]) -> None:
    model, noisy = _model(family, directory), _latents(family, 1)
    height, width = (cells * family.geometry.factor for cells in noisy.shape[-2:])
    whole = SampleGeometry(
        width=width, height=height, resize_width=width, resize_height=height, crop_x=0, crop_y=0,
        bucket_width=width, bucket_height=height, flipped=False,
    )  # fmt: skip
    given = _conditions(family, texts[0], geometry_BG=torch.tensor([whole.numbers()]))
    left_out = _conditions(family, texts[0])
    sigma = _sigmas(model, 0.5)
    assert torch.equal(family.predict(model, noisy, sigma, given), family.predict(model, noisy, sigma, left_out))


@torch.no_grad()
def test_a_padded_batch_predicts_what_its_samples_predict_alone(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    model = _model(family, directory)
    noisy, sigmas = _latents(family, len(texts)), _sigmas(model, 0.9, 0.5, 0.1, 0.0)
    together = family.predict(model, noisy, sigmas, _conditions(family, *texts))
    assert together.shape == noisy.shape
    assert together.dtype == torch.float32
    for index, item in enumerate(texts):
        row = slice(index, index + 1)
        alone = family.predict(model, noisy[row], sigmas[row], _conditions(family, item))
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_prediction_depends_on_image_time_and_text(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    model = _model(family, directory)

    def predict(seed: int, share: float, text: int) -> torch.Tensor:
        noisy = _draw(1, family.geometry.channels, 4, 6, seed=seed)
        return family.predict(model, noisy, _sigmas(model, share), _conditions(family, texts[text]))

    first = predict(0, 0.5, 0)
    assert torch.equal(first, predict(0, 0.5, 0))
    for other in (predict(1, 0.5, 0), predict(0, 0.9, 0), predict(0, 0.5, 2)):
        assert (first - other).abs().max() > 1e-4


class _Recorder:
    """Keeps the tensors that a denoiser was called with, and what it returned."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[torch.Tensor] = []
        self._names = list(inspect.signature(denoiser.forward).parameters)
        denoiser.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module: Any, arguments: Any, inputs: dict[str, Any], outputs: Any) -> None:
        named = {**dict(zip(self._names, arguments, strict=False)), **inputs}
        nested = {key: value for each in named.values() if isinstance(each, dict) for key, value in each.items()}
        self.inputs.append({key: value for key, value in (named | nested).items() if not isinstance(value, dict)})
        self.outputs.append(outputs[0])


def _generate(family: Family, pipeline: Any, item: Mapping[str, torch.Tensor], **options: Any) -> Any:
    return pipeline(**{
        **family.pipeline_texts(item), **family.generation(1.0), "height": 32, "width": 48, "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0), **options,
    }).images  # fmt: skip


def _denoised(model: Model, scheduler: Any, item: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What our predictions make of the pipeline's noise, on the noise levels that its scheduler has taken."""
    family, schedule = model.family, model.schedule
    factor, conditions = family.geometry.factor, _conditions(family, item)
    latents = _draw(1, family.geometry.channels, 32 // factor, 48 // factor, seed=0)
    if schedule.objective == "flow":
        for now, following in itertools.pairwise(scheduler.sigmas):
            latents = latents + (following - now) * family.predict(model, latents, now[None], conditions)
        return latents
    assert schedule.times is not None
    scheduler.set_timesteps(2)
    latents = latents * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, time)
        (entry,) = (schedule.times == time).nonzero()
        prediction = family.predict(model, noisy, schedule.sigmas[entry], conditions)
        latents = scheduler.step(prediction, time, latents).prev_sample
    return latents


@torch.no_grad()
def test_predictions_equal_the_pipelines_to_the_last_pixel(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    pipeline = family.pipeline(directory, torch.float32, CPU)
    theirs = _Recorder(getattr(pipeline, family.denoiser_attribute))
    images = _generate(family, pipeline, texts[0], output_type="pt")

    model = _model(family, directory)
    ours = _Recorder(model.denoiser)
    latents = _denoised(model, pipeline.scheduler, texts[0])

    assert len(theirs.inputs) == len(ours.inputs) >= 2
    assert torch.equal(theirs.outputs[0], ours.outputs[0])
    for step, (first, second) in enumerate(zip(theirs.inputs, ours.inputs, strict=True)):
        given = {key for key, value in first.items() if isinstance(value, torch.Tensor)}
        assert len(given & second.keys()) >= 3
        for key in given & second.keys():
            value = second[key].reshape(first[key].shape).to(first[key].dtype)
            torch.testing.assert_close(value, first[key], atol=1e-5 if step else 0, rtol=0)
        assert first.get("img_shapes") == second.get("img_shapes")
        torch.testing.assert_close(ours.outputs[step], theirs.outputs[step], atol=1e-5, rtol=0)

    decoded = family.decode(family.load_vae(directory, torch.float32, CPU), latents)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, atol=1e-4, rtol=0)


@torch.no_grad()
def test_guidance_by_cached_texts_equals_that_by_prompts(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    pipeline, options = family.pipeline(directory, torch.float32, CPU), {**family.generation(3.0), "output_type": "pt"}
    negative = {f"negative_{key}": value for key, value in family.pipeline_texts(texts[2]).items()}
    cached = _generate(family, pipeline, texts[0], **negative, **options)
    alone = _generate(family, pipeline, texts[0], output_type="pt")
    no_embeds = dict.fromkeys(family.pipeline_texts(texts[0]))
    pipeline = family.pipeline(directory, torch.float32, CPU)
    prompted = _generate(family, pipeline, texts[0], **no_embeds, prompt=CAPTIONS[0], negative_prompt=CAPTIONS[2], **options)
    torch.testing.assert_close(cached, prompted, atol=1e-4, rtol=0)
    assert (cached - alone).abs().max() > 1e-3


def test_the_pipeline_generates_an_image_from_cached_texts_alone(
    family: Family, directory: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    pipeline = family.pipeline(directory, torch.float32, CPU, **dict.fromkeys(family.text_components))
    (image,) = _generate(family, pipeline, texts[0])
    assert image.size == (48, 32)
    assert image.mode == "RGB"
    (again,) = _generate(family, pipeline, texts[0])
    assert np.array_equal(np.asarray(again), np.asarray(image))
    (prompted,) = family.pipeline(directory, torch.float32, CPU)(
        prompt=CAPTIONS[0], **family.generation(1.0), height=32, width=48, num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert np.abs(np.asarray(prompted).astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_another_folder_is_no_model_of_the_family(family: Family, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json \(found: nothing\)"):
        family.check(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "LattePipeline"}), encoding="utf-8")
    with pytest.raises(ModelError, match="holds a LattePipeline"):
        family.check(tmp_path)
    for broken in (b"{", b"[]", b"\xff\xfe"):
        index.write_bytes(broken)
        with pytest.raises(ModelError, match=r"cannot be read as JSON|instead of settings by name"):
            family.check(tmp_path)


def test_a_model_without_its_weights_is_a_model_error(family: Family, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((directory / "model_index.json").read_bytes())
    for load in (family.load_denoiser, family.load_vae, family.load_text_encoder):
        with pytest.raises(ModelError, match=str(tmp_path)):
            load(tmp_path, torch.float32, CPU)
    with pytest.raises(ModelError, match=str(tmp_path)):
        family.load_schedule(tmp_path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        family.pipeline(tmp_path, torch.float32, CPU)


def test_a_missing_component_is_named(name: str, family: Family, directory: Path, tmp_path: Path) -> None:
    config = ModelConfig(family=name, path=str(directory))
    assert model_folder.locate(family, config, family.latent_components, tmp_path) == directory
    assert model_folder.local_components(family, config, family.latent_components, tmp_path) == directory
    (tmp_path / "model_index.json").write_bytes((directory / "model_index.json").read_bytes())
    partial = ModelConfig(family=name, path=str(tmp_path))
    with pytest.raises(ModelError, match=f"no {family.latent_components[0]} folder in it"):
        model_folder.locate(family, partial, family.latent_components, tmp_path)
    assert model_folder.local_components(family, partial, family.latent_components, tmp_path) is None


def test_a_path_that_is_neither_folder_nor_hub_id_is_a_model_error(name: str, family: Family, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        model_folder.locate(family, ModelConfig(family=name, path=str(tmp_path / "missing")), ("vae",), tmp_path)


def test_a_misspelt_family_and_an_absent_device_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no family '{name}x'.*{name}"):
        base.get(f"{name}x")
    assert base.get(name).name == name
    assert devices.resolve_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert devices.resolve_device("auto") == CPU
        with pytest.raises(EnvironmentFault, match="cuda"):
            devices.resolve_device("cuda")
