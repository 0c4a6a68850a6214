"""What every family promises, held against the diffusers pipeline of its tiny model."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftk.errors import ConfigError, EnvironmentFault, ModelError
from ftk.models import base
from ftk.models.base import Family

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat on a chair", "", "größe 猫", "a dog, " * 20]

pytestmark = pytest.mark.parametrize("name", base.available())


@pytest.fixture
def family(name: str) -> Family:
    return base.get(name)


@pytest.fixture
def model(name: str, tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models(name)


@pytest.fixture
def texts(family: Family, model: Path) -> list[dict[str, torch.Tensor]]:
    encoder = family.load_text_encoder(model, torch.float32, CPU)
    return [{key: value.clone() for key, value in item.items()} for item in family.encode_texts(encoder, CAPTIONS)]


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pixels(batch: int, height: int = 48, width: int = 32) -> torch.Tensor:
    return _draw(batch, 3, height, width, seed=5).clamp(-1, 1)


def _latents(family: Family, batch: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return _draw(batch, family.geometry.channels, height, width)


def _denoiser(family: Family, model: Path) -> Any:
    return family.load_denoiser(model, torch.float32, CPU).eval()


def _hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _posterior(family: Family, model: Path, pixels: torch.Tensor) -> Any:
    """The posterior of diffusers' own VAE, in fp32; a video VAE takes images as clips of one frame."""
    vae = family.pipeline(model, torch.float32, CPU).vae
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    is_video = hasattr(vae.config, "temperal_downsample")
    with torch.no_grad():
        return vae.encode(pixels.unsqueeze(2) if is_video else pixels).latent_dist


def _assert_equal_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal in fp32 to 1e-6 of the largest value."""
    torch.testing.assert_close(ours, theirs, atol=1e-6 * theirs.abs().max().item(), rtol=0)


def test_the_tiny_model_is_deterministic(family: Family, model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    family.tiny(tmp_path)
    assert _hashes(tmp_path) == _hashes(model)


def test_building_the_tiny_model_leaves_the_random_state(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    family.tiny(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_tiny_model_is_one_of_its_family_and_complete(family: Family, model: Path) -> None:
    family.check(model)
    for component in (*family.latent_components, *family.text_components, *family.denoiser_components):
        assert (model / component).is_dir()


def test_texts_equal_the_pipelines(family: Family, model: Path, texts: list[dict[str, torch.Tensor]]) -> None:
    pipeline = family.pipeline(model, torch.float32, CPU)
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(CAPTIONS, device=CPU)
    assert mask is not None
    collated = family.collate_texts(texts)
    assert collated["embeds"] is not None
    assert collated["mask"] is not None
    assert torch.equal(collated["mask"], mask.bool())
    assert collated["embeds"].shape == embeds.shape
    _assert_equal_to_rounding(collated["embeds"] * mask[..., None], embeds * mask[..., None])
    for caption, item in zip(CAPTIONS, texts, strict=True):
        with torch.no_grad():
            alone, no_mask = pipeline.encode_prompt([caption], device=CPU)
        assert no_mask is None
        _assert_equal_to_rounding(item["embeds"], alone[0])


def test_the_empty_caption_encodes_to_something(texts: list[dict[str, torch.Tensor]]) -> None:
    empty = texts[CAPTIONS.index("")]["embeds"]
    assert len(empty) > 0
    assert empty.isfinite().all()
    assert len(empty) < min(len(item["embeds"]) for caption, item in zip(CAPTIONS, texts, strict=True) if caption)


def test_batch_composition_changes_no_text(family: Family, model: Path, texts: list[dict[str, torch.Tensor]]) -> None:
    encoder = family.load_text_encoder(model, torch.float32, CPU)
    for caption, together in zip(CAPTIONS, texts, strict=True):
        (alone,) = family.encode_texts(encoder, [caption])
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            _assert_equal_to_rounding(value, together[key])


def test_text_lengths_are_those_of_the_encoded_texts(family: Family, model: Path, texts: list[dict[str, torch.Tensor]]) -> None:
    encoder = family.load_text_encoder(model, torch.float32, CPU)
    assert family.text_lengths(encoder, CAPTIONS) == [len(item["embeds"]) for item in texts]
    assert family.text_lengths(encoder, ["word " * 3000]) == [family.max_text_tokens]


def test_memory_grows_with_the_text_and_with_the_image(family: Family, model: Path) -> None:
    encoder = family.load_text_encoder(model, torch.float32, CPU)
    assert 0 < family.text_memory(encoder, 10) < family.text_memory(encoder, 100)
    vae = family.load_vae(model, torch.float32, CPU)
    one = family.image_memory(vae, 64, 64)
    assert one > 64 * 64 * 3 * 4
    assert family.image_memory(vae, 128, 64) == family.image_memory(vae, 64, 128) == pytest.approx(2 * one, rel=0.1)


def test_different_captions_give_different_texts(texts: list[dict[str, torch.Tensor]]) -> None:
    one, two = texts[0]["embeds"], texts[2]["embeds"]
    length = min(len(one), len(two))
    assert (one[:length] - two[:length]).abs().max() > 1e-2


def test_a_caption_beyond_the_limit_is_cut(family: Family, model: Path) -> None:
    encoder = family.load_text_encoder(model, torch.float32, CPU)
    (item,) = family.encode_texts(encoder, ["word " * 3000])
    assert len(item["embeds"]) == family.max_text_tokens


def test_the_text_options_are_plain_values(family: Family) -> None:
    assert json.loads(json.dumps(family.text_options())) == family.text_options()


def test_images_equal_the_vaes_posterior_normalised(family: Family, model: Path) -> None:
    vae = family.load_vae(model, torch.float32, CPU)
    constants = family.normalisation(model)
    pixels = _pixels(2)
    mean, std = family.encode_images(vae, pixels)
    posterior = _posterior(family, model, pixels)
    shape = (1, family.geometry.channels, 1, 1)
    shift, scale = (torch.tensor(constants[key]).view(shape) for key in ("latents_mean", "latents_std"))
    _assert_equal_to_rounding(mean, (posterior.mean.squeeze(2) - shift) / scale)
    _assert_equal_to_rounding(std, posterior.std.squeeze(2) / scale)
    assert mean.dtype == std.dtype == torch.float32
    assert (std > 0).all()


def test_batch_composition_changes_no_image(family: Family, model: Path) -> None:
    vae = family.load_vae(model, torch.float32, CPU)
    pixels = _pixels(3)
    mean, std = family.encode_images(vae, pixels)
    for index in range(3):
        mean_alone, std_alone = family.encode_images(vae, pixels[index : index + 1])
        _assert_equal_to_rounding(mean_alone[0], mean[index])
        _assert_equal_to_rounding(std_alone[0], std[index])


def test_decoding_gives_the_shape_of_what_was_encoded(family: Family, model: Path) -> None:
    vae = family.load_vae(model, torch.float32, CPU)
    multiple = family.geometry.pixel_multiple
    pixels = _pixels(2, height=3 * multiple, width=2 * multiple)
    mean, _ = family.encode_images(vae, pixels)
    factor = family.geometry.factor
    assert mean.shape == (2, family.geometry.channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
    decoded = family.decode(vae, mean)
    assert decoded.shape == pixels.shape
    assert decoded.isfinite().all()


def test_components_are_frozen_and_the_denoiser_is_in_training_mode(family: Family, model: Path) -> None:
    denoiser = family.load_denoiser(model, torch.bfloat16, CPU)
    assert denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in family.load_vae(model, torch.float32, CPU).parameters())


def test_the_denoiser_on_meta_has_the_same_shapes_and_no_weights(family: Family, model: Path, tmp_path: Path) -> None:
    loaded = family.load_denoiser(model, torch.float32, CPU)
    component = family.denoiser_components[0]
    (tmp_path / component).mkdir()
    (tmp_path / component / "config.json").write_bytes((model / component / "config.json").read_bytes())
    meta = family.load_denoiser(tmp_path, torch.float32, torch.device("meta"))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert {key: value.shape for key, value in meta.named_parameters()} == {
        key: value.shape for key, value in loaded.named_parameters()
    }
    assert not any(parameter.requires_grad for parameter in meta.parameters())


def test_the_block_class_and_the_target_groups_name_parts_of_the_denoiser(family: Family, model: Path) -> None:
    denoiser = family.load_denoiser(model, torch.float32, torch.device("meta"))
    assert family.block_class in {type(module).__name__ for module in denoiser.modules()}
    linear = [key for key, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    for targets in family.target_groups.values():
        for target in targets:
            assert any(key == target or key.endswith("." + target) for key in linear), target
    everything = tuple("." + target for target in family.target_groups["all-linear"])
    assert [key for key in linear if not ("." + key).endswith(everything)] == []


def test_the_schedule_is_the_schedulers_training_table(family: Family, model: Path) -> None:
    schedule = family.load_schedule(model)
    assert schedule.objective == "flow"
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.sigmas.shape == (1000,)
    assert schedule.sigmas[0] == 1
    assert (schedule.sigmas.diff() < 0).all()
    assert schedule.sigmas[-1] > 0
    torch.testing.assert_close(schedule.sigmas, torch.arange(1000, 0, -1) / 1000, atol=1e-6, rtol=0)


def test_texts_of_one_length_need_no_mask(family: Family, texts: list[dict[str, torch.Tensor]]) -> None:
    collated = family.collate_texts([texts[0], texts[0]])
    assert collated["mask"] is None
    assert collated["embeds"] is not None
    assert torch.equal(collated["embeds"][1], texts[0]["embeds"])


@torch.no_grad()
def test_a_padded_batch_predicts_what_its_samples_predict_alone(
    family: Family, model: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    denoiser = _denoiser(family, model)
    noisy, sigmas = _latents(family, len(texts)), torch.tensor([0.1, 0.5, 0.9, 1.0])
    together = family.predict(denoiser, noisy, sigmas, family.collate_texts(texts))
    assert together.shape == noisy.shape
    assert together.dtype == torch.float32
    for index, item in enumerate(texts):
        chosen = slice(index, index + 1)
        alone = family.predict(denoiser, noisy[chosen], sigmas[chosen], family.collate_texts([item]))
        torch.testing.assert_close(together[chosen], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_prediction_depends_on_image_sigma_and_text(
    family: Family, model: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    denoiser = _denoiser(family, model)

    def predict(seed: int, sigma: float, text: int) -> torch.Tensor:
        noisy = _draw(1, family.geometry.channels, 4, 6, seed=seed)
        return family.predict(denoiser, noisy, torch.tensor([sigma]), family.collate_texts([texts[text]]))

    first = predict(0, 0.5, 0)
    assert torch.equal(first, predict(0, 0.5, 0))
    for other in (predict(1, 0.5, 0), predict(0, 0.9, 0), predict(0, 0.5, 2)):
        assert (first - other).abs().max() > 1e-4


class _Recorder:
    """Keeps what a denoiser was called with, and what it returned."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[torch.Tensor] = []
        denoiser.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module: Any, _args: Any, inputs: dict[str, Any], outputs: Any) -> None:
        self.inputs.append(inputs)
        self.outputs.append(outputs[0])


def _generate(family: Family, pipeline: Any, item: Mapping[str, torch.Tensor], **options: Any) -> Any:
    return pipeline(
        **family.pipeline_texts(item),
        **family.generation(1.0),
        height=32, width=48, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip


@torch.no_grad()
def test_predictions_equal_the_pipelines_to_the_last_pixel(
    family: Family, model: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    pipeline = family.pipeline(model, torch.float32, CPU)
    theirs = _Recorder(getattr(pipeline, family.denoiser_components[0]))
    images = _generate(family, pipeline, texts[0], output_type="pt")
    sigmas = pipeline.scheduler.sigmas

    denoiser = _denoiser(family, model)
    ours = _Recorder(denoiser)
    factor = family.geometry.factor
    latents = _draw(1, family.geometry.channels, 32 // factor, 48 // factor, seed=0)
    for now, following in itertools.pairwise(sigmas):
        prediction = family.predict(denoiser, latents, now[None], family.collate_texts([texts[0]]))
        latents = latents + (following - now) * prediction

    assert len(theirs.inputs) == len(ours.inputs) == 2
    assert torch.equal(theirs.inputs[0]["hidden_states"], ours.inputs[0]["hidden_states"])
    for step in range(2):
        assert theirs.inputs[step]["img_shapes"] == ours.inputs[step]["img_shapes"]
        for key in ("hidden_states", "timestep", "encoder_hidden_states"):
            torch.testing.assert_close(ours.inputs[step][key], theirs.inputs[step][key], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.outputs[step], theirs.outputs[step], atol=1e-5, rtol=0)
    assert torch.equal(theirs.inputs[0]["timestep"], ours.inputs[0]["timestep"])
    assert torch.equal(theirs.outputs[0], ours.outputs[0])

    decoded = family.decode(family.load_vae(model, torch.float32, CPU), latents)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, atol=1e-4, rtol=0)


def test_the_pipeline_generates_an_image_from_cached_texts_alone(
    family: Family, model: Path, texts: list[dict[str, torch.Tensor]]
) -> None:
    pipeline = family.pipeline(model, torch.float32, CPU, **dict.fromkeys(family.text_components))
    (image,) = _generate(family, pipeline, texts[0])
    assert image.size == (48, 32)
    assert image.mode == "RGB"
    (again,) = _generate(family, pipeline, texts[0])
    assert np.array_equal(np.asarray(again), np.asarray(image))
    (prompted,) = family.pipeline(model, torch.float32, CPU)(
        prompt=CAPTIONS[0], **family.generation(1.0), height=32, width=48, num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert np.abs(np.asarray(prompted).astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_another_folder_is_no_model_of_the_family(family: Family, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json \(found: nothing\)"):
        family.check(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8")
    with pytest.raises(ModelError, match="holds a StableDiffusionPipeline"):
        family.check(tmp_path)
    for broken in (b"{", b"[]", b"\xff\xfe"):
        index.write_bytes(broken)
        with pytest.raises(ModelError, match="cannot be read as JSON"):
            family.check(tmp_path)


def test_a_model_without_its_weights_is_a_model_error(family: Family, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    for load in (family.load_denoiser, family.load_vae, family.load_text_encoder):
        with pytest.raises(ModelError, match=str(tmp_path)):
            load(tmp_path, torch.float32, CPU)
    with pytest.raises(ModelError, match=str(tmp_path)):
        family.load_schedule(tmp_path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        family.pipeline(tmp_path, torch.float32, CPU)


def test_a_missing_component_is_named(name: str, family: Family, model: Path, tmp_path: Path) -> None:
    from ftk.configs.schema import ModelConfig

    config = ModelConfig(family=name, path=str(model))
    assert base.locate(config, family.latent_components) == model
    assert base.local_components(config, family.latent_components) == model
    (tmp_path / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    partial = ModelConfig(family=name, path=str(tmp_path))
    with pytest.raises(ModelError, match=f"no {family.latent_components[0]} folder in it"):
        base.locate(partial, family.latent_components)
    assert base.local_components(partial, family.latent_components) is None


def test_a_path_that_is_neither_folder_nor_hub_id_is_a_model_error(name: str, tmp_path: Path) -> None:
    from ftk.configs.schema import ModelConfig

    with pytest.raises(ModelError, match="no such folder"):
        base.locate(ModelConfig(family=name, path=str(tmp_path / "missing")), ("vae",))


def test_a_misspelt_family_and_an_absent_device_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no family '{name}x'.*{name}"):
        base.get(f"{name}x")
    assert base.get(name).name == name
    assert base.resolve_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert base.resolve_device("auto") == CPU
        with pytest.raises(EnvironmentFault, match="cuda"):
            base.resolve_device("cuda")
