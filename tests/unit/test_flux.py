"""FLUX.1 and Kontext: the training step of diffusers' script, references against the official pipeline, and memory."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux import pipeline_flux_controlnet
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig, TrainConfig
from ftk.models import base as models
from ftk.models.base import Conditions, Model, load_model, with_arguments
from ftk.models.flux import FluxConfig
from ftk.run import resolve
from ftk.train import flow, memory

CPU = torch.device("cpu")
GUIDANCE = 2.5


def flux(name: str = "flux"):
    return type(models.get(name))(FluxConfig(guidance=GUIDANCE, max_text_tokens=24))


def texts_of(family, directory: Path, *captions: str):
    return family.encode_texts(family.load_text_encoder(directory, torch.float32, CPU), captions)


@torch.no_grad()
def test_the_loss_of_a_step_is_that_of_the_script(tiny_models: Callable[[str], Path]) -> None:
    """examples/dreambooth/train_dreambooth_lora_flux.py, from its noise to its loss."""
    family, directory = flux(), tiny_models("flux")
    model = load_model(family, directory, (), torch.float32, CPU)
    text = texts_of(family, directory, "a red cat", "a dog")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler")
    draw = torch.Generator().manual_seed(3)
    for _ in range(3):
        latents, noise = (torch.randn(2, 16, 6, 4, generator=draw) for _ in range(2))
        density = compute_density_for_timestep_sampling("none", 2, generator=draw)
        timesteps = scheduler.timesteps[(density * scheduler.config.num_train_timesteps).long()]
        sigmas_B = timesteps / 1000
        sigmas = sigmas_B[:, None, None, None]
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        prediction = model.denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, 2, 16, 6, 4),
            timestep=timesteps / 1000,
            guidance=torch.tensor([GUIDANCE]).expand(2),
            pooled_projections=torch.stack([each["pooled"] for each in text]),
            encoder_hidden_states=torch.stack([each["embeds"] for each in text]),
            txt_ids=torch.zeros(24, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 3, 2, CPU, torch.float32),
            return_dict=False,
        )[0]
        expected = (FluxPipeline._unpack_latents(prediction, 48, 32, 8) - (noise - latents)).square().flatten(1).mean(1)

        conditions = Conditions(texts=family.collate_texts(text))
        ours = family.predict(model, flow.interpolate(latents, noise, 1 - sigmas_B, sigmas_B), sigmas_B, conditions)
        losses = flow.loss_per_sample(ours, flow.target("flow", latents, noise, 1 - sigmas_B, sigmas_B), torch.ones(2))
        torch.testing.assert_close(losses, expected, atol=0, rtol=1e-6)


@torch.no_grad()
def test_without_an_input_for_guidance_the_model_is_told_none(tiny_models: Callable[[str], Path]) -> None:
    family, directory = flux(), tiny_models("flux")
    model = load_model(family, directory, (), torch.float32, CPU)
    text = texts_of(family, directory, "a red cat")
    conditions = Conditions(texts=family.collate_texts(text))
    noisy, sigma = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    told = family.predict(model, noisy, sigma, conditions)
    settings = {key: value for key, value in model.denoiser.config.items() if not key.startswith("_")}
    schnell = FluxTransformer2DModel.from_config({**settings, "guidance_embeds": False})
    schnell.load_state_dict(model.denoiser.state_dict(), strict=False)
    without = family.predict(Model(family=family, schedule=model.schedule, denoiser=schnell.eval()), noisy, sigma, conditions)
    assert (told - without).abs().max() > 1e-4


@torch.no_grad()
def test_a_reference_is_seen_as_the_official_pipeline_shows_it(tiny_models: Callable[[str], Path]) -> None:
    family, directory = flux("flux-kontext"), tiny_models("flux-kontext")
    (text,) = texts_of(family, directory, "make it red")
    reference = torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(1))
    pipeline = family.pipeline(directory, torch.float32, CPU, text_encoder=None, text_encoder_2=None)
    expected = pipeline(
        **family.pipeline_texts(text), **family.pipeline_references([reference]), **family.generation(1.0),
        height=32, width=64, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    model = load_model(family, directory, (), torch.float32, CPU)
    conditions = Conditions(texts=family.collate_texts([text]), references=(reference,))
    noisy = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    for sigma, following in itertools.pairwise(pipeline.scheduler.sigmas):
        noisy = noisy + (following - sigma) * family.predict(model, noisy, sigma[None], conditions)
    tokens = FluxPipeline._pack_latents(noisy, 1, 16, 4, 8)
    torch.testing.assert_close(tokens, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    alone = family.predict(model, noisy, torch.tensor([0.5]), Conditions(texts=conditions.texts))
    assert (alone - family.predict(model, noisy, torch.tensor([0.5]), conditions)).abs().max() > 1e-4


@torch.no_grad()
def test_a_controlnet_draws_what_the_official_pipeline_draws(tiny_models: Callable[[str], Path], monkeypatch) -> None:
    family, directory = flux(), tiny_models("flux")
    model = load_model(family, directory, (), torch.float32, CPU)
    network = family.make_control_network(model.denoiser, None).eval()
    for number, parameter in enumerate(network.parameters()):
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    (text,) = texts_of(family, directory, "a red cat")
    pixels = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    vae = family.load_vae(directory, torch.float32, CPU)
    (control, _) = family.encode_images(vae, pixels * 2 - 1)
    monkeypatch.setattr(pipeline_flux_controlnet, "retrieve_latents", lambda output, generator: output.latent_dist.mode())
    theirs = FluxControlNetPipeline.from_pretrained(directory, controlnet=network, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = {
        **family.pipeline_texts(text), "height": 32, "width": 64, "num_inference_steps": 3, "output_type": "latent",
        "guidance_scale": GUIDANCE,
    }  # fmt: skip
    # A tensor is taken as it is; a picture would be brought to [-1, 1].
    expected = theirs(control_image=pixels * 2 - 1, generator=torch.Generator().manual_seed(0), **options).images
    monkeypatch.undo()
    pipeline = family.pipeline(directory, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    drawn = family.draw_controlled(pipeline, network, [control], 1.0, {**options, "generator": generator}).images
    torch.testing.assert_close(drawn, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)

    conditions = Conditions(texts=family.collate_texts([text]), controls=(control,))
    noisy = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    for sigma, following in itertools.pairwise(pipeline.scheduler.sigmas):
        residuals = family.control_residuals(model, network, noisy, sigma[None], conditions)
        velocity = family.predict(with_arguments(model, **residuals), noisy, sigma[None], conditions)
        noisy = noisy + (following - sigma) * velocity
    tokens = FluxPipeline._pack_latents(noisy, 1, 16, 4, 8)
    torch.testing.assert_close(tokens, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (1000, 700), (1, 9)])
def test_references_have_the_nearest_of_the_sizes_that_kontext_was_trained_with(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    rule = models.get("flux-kontext").references
    assert rule is not None
    ratio = size[0] / size[1]
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    assert rule.size(*size) == (width, height)
    assert set(rule.sizes) == set(PREFERRED_KONTEXT_RESOLUTIONS)


@pytest.mark.parametrize(("group", "dtype"), [("attention", torch.bfloat16), ("all-linear", torch.float32)])
def test_estimated_activations_are_what_autograd_keeps(group: str, dtype: torch.dtype) -> None:
    family = flux()

    def make():
        denoiser = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
            joint_attention_dim=48, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
        ).to(dtype).requires_grad_(False)  # fmt: skip
        denoiser.add_adapter(LoraConfig(r=4, target_modules=family.target_groups[group].suffixes))
        return denoiser

    denoiser = make()
    weights = {each.untyped_storage()._cdata for each in denoiser.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    texts = {"embeds": torch.randn(1, 24, 48).to(dtype), "pooled": torch.randn(1, 32).to(dtype)}
    schedule = models.get("flux").load_schedule
    model = Model(family=family, schedule=schedule, denoiser=denoiser)  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        family.predict(model, torch.randn(1, 16, 32, 16).to(dtype), torch.tensor([0.5]), Conditions(texts=texts))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    for shapes in (denoiser, make().to("meta")):
        estimate = family.activations(shapes, 128, 24, dtype)
        planned = len(memory.blocks(denoiser, family)) * estimate.block_saved + estimate.outside
        assert measured <= planned <= 1.25 * measured
        assert 0 < estimate.block_input < estimate.block_saved


def test_pictures_are_drawn_without_a_negative_prompt_unless_it_is_asked_for() -> None:
    tree = {
        "run": "x", "workspace": "y", "model": {"family": "flux", "path": "x"},
        "data": {"sources": [{"path": "y"}], "resolutions": [64]},
        "train": TrainConfig(steps=1).model_dump(exclude_unset=True), "method": {"name": "lora", "rank": 2},
    }  # fmt: skip
    assert resolve(validate(RunConfig, tree, "the test")).config.sample.guidance_scale == 1.0
    tree["sample"] = {"guidance_scale": 3.0}
    assert resolve(validate(RunConfig, tree, "the test")).config.sample.guidance_scale == 3.0


def test_a_frozen_denoiser_keeps_what_gradients_need_that_come_from_beside_it(tiny_models: Callable[[str], Path]) -> None:
    for name in ("flux", "stable-diffusion"):
        family = models.get(name)
        denoiser = family.load_denoiser(tiny_models(name), torch.float32, torch.device("meta"))
        frozen = family.activations(denoiser, 64, 77, torch.float32)
        denoiser.requires_grad_(True)
        trained = family.activations(denoiser, 64, 77, torch.float32)
        assert 0.3 * trained.block_saved < frozen.block_saved < trained.block_saved
