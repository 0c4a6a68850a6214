"""Control LoRA against diffusers: widened models, and the loaders and pipelines that know them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftk import storage
from ftk.configs.schema import MethodConfig
from ftk.deliver import merge
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods import control_lora
from ftk.methods.base import Export
from ftk.methods.controls import input_columns
from ftk.models import base as families
from ftk.models.base import Conditions, Family, Model, load_model
from ftk.models.components import flow_matching

CPU = torch.device("cpu")
METHOD = control_lora.METHOD
# Of several kinds: ranks that differ, a strength that is not 1, the input layer among the targets.
SETTINGS = {"rank": 3, "alpha": 5.0, "targets": ("to_q", "to_out.0"), "rank_pattern": {"to_q": 2}}


def attached(family: Family, directory: Path, **settings: Any) -> tuple[Model, Any, dict[str, Any]]:
    method, parsed = methods.parse(MethodConfig(name="control-lora", **{**SETTINGS, **settings}))
    model = load_model(family, directory, (), torch.float32, CPU)
    parameters = method.attach(model, parsed, 3)
    model.denoiser.eval()
    return model, parsed, parameters


@torch.no_grad()
def perturb(parameters: dict[str, Any]) -> None:
    """As if something had been trained."""
    draw = torch.Generator().manual_seed(2)
    for parameter in parameters.values():
        parameter += 0.2 * torch.randn(parameter.shape, generator=draw)


def texts_of(family: Family, directory: Path) -> dict[str, Any]:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    return family.collate_texts([{name: tensor.clone() for name, tensor in family.encode_texts(encoder, ["a cat"])[0].items()}])


def inputs(family: Family) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents, and those of a control image."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(1, family.geometry.channels, 8, 8, generator=draw), torch.randn(
        1, family.geometry.channels, 8, 8, generator=draw
    )


def exported(model: Model, settings: Any, directory: Path) -> None:
    METHOD.export(model, settings, Export(directory=directory, form="diffusers", metadata={}))


@torch.no_grad()
@pytest.mark.parametrize("family_name", families.available())
def test_training_starts_at_exactly_the_base_and_strength_0_restores_it(
    tiny_models: Callable[[str], Path], family_name: str
) -> None:
    family, directory = families.get(family_name), tiny_models(family_name)
    noisy, control = inputs(family)
    conditions = Conditions(texts=texts_of(family, directory), controls=(control,))
    base_model = load_model(family, directory, (), torch.float32, CPU)
    base_model.denoiser.eval()
    sigma_B = base_model.schedule.sigmas[[500]]
    base = family.predict(base_model, noisy, sigma_B, conditions)
    model, _, parameters = attached(family, directory)
    assert torch.equal(METHOD.predict(model, noisy, sigma_B, conditions), base)
    perturb(parameters)
    trained = METHOD.predict(model, noisy, sigma_B, conditions)
    assert (trained - base).abs().max() > 1e-2
    columns = model.extras[control_lora.NETWORK]
    with control_lora._controlling(family, model.denoiser, columns, control, 0.0):
        assert torch.equal(family.predict(model, noisy, sigma_B, conditions), base)
    assert torch.equal(METHOD.predict(model, noisy, sigma_B, conditions), trained)


@torch.no_grad()
@pytest.mark.parametrize("targets", [("to_q",), ("to_q", "conv_in")])
@pytest.mark.parametrize("family_name", ["stable-diffusion", "sdxl"])
def test_diffusers_loads_the_file_into_a_widened_u_net(
    tiny_models: Callable[[str], Path], family_name: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    family, directory = families.get(family_name), tiny_models(family_name)
    model, settings, parameters = attached(family, directory, targets=targets)
    perturb(parameters)
    exported(model, settings, tmp_path)
    noisy, control = inputs(family)
    conditions, sigma_B = Conditions(texts=texts_of(family, directory), controls=(control,)), model.schedule.sigmas[[500]]
    expected = METHOD.predict(model, noisy, sigma_B, conditions)

    parts = {name: None for name in (*family.text_components, *family.latent_components)}
    pipeline = family.pipeline(directory, torch.float32, CPU, **parts)
    unet = pipeline.unet
    zeros = torch.zeros_like(unet.conv_in.weight)
    widened = torch.nn.Conv2d(8, unet.conv_in.out_channels, 3, padding=1)
    widened.weight.data, widened.bias.data = torch.cat([unet.conv_in.weight, zeros], 1), unet.conv_in.bias.data
    unet.conv_in = widened
    pipeline.load_lora_weights(tmp_path)
    loaded = Model(family=family, schedule=model.schedule, denoiser=unet.eval())
    theirs = family.predict(loaded, torch.cat([noisy, control], 1), sigma_B, conditions)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["attention", ("to_q", "x_embedder")])
def test_the_flux_control_pipeline_loads_the_file(targets: Any, tmp_path: Path) -> None:
    """The form is that of FLUX.1's Control LoRAs, whose loader widens the input layer itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    family = families.get("flux")
    model = Model(family=family, schedule=None, denoiser=transformer)  # type: ignore[arg-type]
    settings = methods.parse(MethodConfig(name="control-lora", rank=2, alpha=3.0, targets=("to_q", "x_embedder")))[1]
    if targets == "attention":
        settings = settings.model_copy(update={"targets": ("to_q", "to_k")})
    noisy, control = inputs(family)
    fixed = {
        "encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    parameters = METHOD.attach(model, settings, 0)
    transformer.eval()
    perturb(parameters)
    with control_lora._controlling(family, transformer, model.extras[control_lora.NETWORK], control, 1.0):
        expected = transformer(hidden_states=flow_matching.pack(noisy), **fixed)[0]
    exported(model, settings, tmp_path)

    torch.manual_seed(0)
    fresh = FluxTransformer2DModel.from_config(transformer.config)
    pipeline = FluxControlPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=fresh,
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.transformer.config.in_channels == 128
    both = torch.cat([flow_matching.pack(noisy), flow_matching.pack(control)], 2)
    theirs = pipeline.transformer.eval()(hidden_states=both, **fixed)[0]
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family_name", ["stable-diffusion", "sdxl"])
def test_a_merged_u_net_draws_the_same_in_diffusers_instruct_pix2pix_pipeline(
    tiny_models: Callable[[str], Path], family_name: str, tmp_path: Path
) -> None:
    import diffusers

    family, directory = families.get(family_name), tiny_models(family_name)
    model, _, parameters = attached(family, directory)
    perturb(parameters)
    control = Image.effect_noise((64, 64), 90).convert("RGB")
    options = {"prompt": "a cat", "negative_prompt": "a dog", "num_inference_steps": 2, "guidance_scale": 3.0,
               "output_type": "np"}  # fmt: skip
    base = family.pipeline(directory, torch.float32, CPU, unet=model.denoiser)
    with model.evaluating():
        ours = METHOD.sampling_pipeline(model, base)
        expected = ours(**options, control=control, generator=torch.Generator().manual_seed(0)).images
    METHOD.merge(model)
    pipeline = METHOD.merged_pipeline(model, directory)
    shutil.copytree(directory, tmp_path / "merged")
    storage.commit_json(tmp_path / "merged" / "model_index.json", merge._index(directory, pipeline.name))
    model.denoiser.save_pretrained(tmp_path / "merged" / "unet")

    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(loaded).__name__ == pipeline.name
    assert loaded.unet.config.in_channels == 8
    theirs = loaded(**options, image=control, image_guidance_scale=1, generator=torch.Generator().manual_seed(0)).images
    assert abs(theirs - expected).max() < 1e-4


@torch.no_grad()
def test_a_layer_beside_the_input_layer_is_a_widened_one(tiny_models: Callable[[str], Path]) -> None:
    family, directory = families.get("qwen-image"), tiny_models("qwen-image")
    model, _, parameters = attached(family, directory)
    perturb(parameters)
    noisy, control = inputs(family)
    texts, sigma_B = texts_of(family, directory), torch.tensor([0.6])
    expected = METHOD.predict(model, noisy, sigma_B, Conditions(texts=texts, controls=(control,)))
    layer, columns = model.denoiser.img_in, model.extras[control_lora.NETWORK]
    widened = torch.nn.Linear(128, layer.out_features)
    widened.weight.data, widened.bias.data = torch.cat([layer.weight, columns.weight], 1), layer.bias.data
    model.denoiser.img_in = widened
    output = model.denoiser(
        hidden_states=torch.cat([flow_matching.pack(noisy), flow_matching.pack(control)], 2), timestep=sigma_B,
        encoder_hidden_states=texts["embeds"], encoder_hidden_states_mask=texts["mask"], img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(flow_matching.unpack(output, 8, 8), expected, atol=1e-5, rtol=1e-5)


def test_the_plain_pipeline_refuses_the_file_and_does_not_draw_with_half_of_it(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    family, directory = families.get("qwen-image"), tiny_models("qwen-image")
    model, settings, _ = attached(family, directory)
    exported(model, settings, tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        family.pipeline(directory, torch.float32, CPU).load_lora_weights(tmp_path)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 3, 3)])
def test_columns_survive_their_form_as_a_lora(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    A, B = input_columns.as_factors(weight)
    columns, own = input_columns.from_factors(A, B)
    assert torch.equal(columns, weight)
    assert own is None


@torch.no_grad()
@pytest.mark.parametrize("family_name", families.available())
def test_a_pipelines_own_vae_encodes_like_the_familys(tiny_models: Callable[[str], Path], family_name: str) -> None:
    family, directory = families.get(family_name), tiny_models(family_name)
    pixels_BCHW = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = family.pipeline(directory, torch.float32, CPU, **dict.fromkeys(family.text_components)).vae
    ours = family.encode_images(family.load_vae(directory, torch.float32, CPU), pixels_BCHW)
    for expected, found in zip(ours, family.encode_images(plain, pixels_BCHW), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family_name", ["qwen-image", "sdxl"])
def test_ftks_loader_draws_from_a_picture_what_training_draws(
    tiny_models: Callable[[str], Path], family_name: str, tmp_path: Path
) -> None:
    family, directory = families.get(family_name), tiny_models(family_name)
    model, settings, parameters = attached(family, directory)
    perturb(parameters)
    exported(model, settings, tmp_path)
    control = Image.effect_noise((64, 64), 90).convert("RGB")
    options = {"prompt": "a cat", "negative_prompt": "a dog", "num_inference_steps": 2, "output_type": "latent",
               **family.generation(3.0)}  # fmt: skip

    def draw(pipeline: Any, **arguments: Any) -> torch.Tensor:
        latents: torch.Tensor = pipeline(**options, **arguments, generator=torch.Generator().manual_seed(0)).images
        return latents

    loaded = control_lora.load(family.pipeline(directory, torch.float32, CPU), str(tmp_path))
    latents_BCHW = family.encode_images(family.load_vae(directory, torch.float32, CPU), as_pixels(control))[0]
    base = family.pipeline(directory, torch.float32, CPU, **{family.denoiser_attribute: model.denoiser})
    training = METHOD.sampling_pipeline(model, base)
    arguments = METHOD.pipeline_controls([latents_BCHW])
    expected = draw(training, width=64, height=64, **arguments)
    torch.testing.assert_close(draw(loaded, control=control), expected, atol=1e-4, rtol=1e-4)
    plain = draw(family.pipeline(directory, torch.float32, CPU), width=64, height=64)
    assert torch.equal(draw(loaded, control=control, control_strength=0.0), plain)
    halfway = draw(loaded, control=control, control_strength=0.5)
    assert (halfway - plain).abs().max() > 1e-3 < (halfway - expected).abs().max()


def as_pixels(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True}, "`dora: true` is not for control-lora"),
        ({"initialisation": "pissa"}, "`initialisation: pissa` is not for control-lora"),
        ({"modules_to_save": ["norm_out"]}, "`modules_to_save` is not for control-lora"),
        ({"text_encoder": {}}, "`text_encoder` is not for control-lora"),
        ({"rnak": 3}, "Did you mean `rank`"),
    ],
)
def test_settings_that_a_control_lora_cannot_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(MethodConfig(name="control-lora", **settings))


def test_a_plain_lora_is_no_control_lora(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    family, directory = families.get("qwen-image"), tiny_models("qwen-image")
    method, settings = methods.parse(MethodConfig(name="lora", rank=2))
    model = load_model(family, directory, (), torch.float32, CPU)
    method.attach(model, settings, 0)
    method.export(model, settings, Export(directory=tmp_path, form="diffusers", metadata={}))
    pipeline = family.pipeline(directory, torch.float32, CPU, text_encoder=None, tokenizer=None)
    with pytest.raises(CheckpointError, match=r"no Control LoRA of this model.*does not widen img_in from 64 to 128"):
        METHOD.load_into(family, pipeline, tmp_path)
    with pytest.raises(CheckpointError, match="does not say which model it is for"):
        control_lora.load(pipeline, str(tmp_path))
    assert not any("control" in name for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))


def test_a_denoiser_whose_input_is_not_known_is_refused_in_words(tiny_models: Callable[[str], Path]) -> None:
    family, directory = families.get("qwen-image"), tiny_models("qwen-image")
    model = load_model(family, directory, (), torch.float32, torch.device("meta"))
    model.denoiser.img_in = torch.nn.Linear(80, 32, device="meta")
    settings = methods.parse(MethodConfig(name="control-lora"))[1]
    with pytest.raises(ConfigError, match="takes its latents in no layer that can be widened"):
        METHOD.attach(model, settings, 0)


@pytest.mark.parametrize("targets", [("to_q", "to_out.0"), ("to_q", "img_in")])
def test_a_run_starts_from_another_runs_file(
    tiny_models: Callable[[str], Path], targets: tuple[str, ...], tmp_path: Path
) -> None:
    family, directory = families.get("qwen-image"), tiny_models("qwen-image")
    model, settings, parameters = attached(family, directory, targets=targets)
    perturb(parameters)
    exported(model, settings, tmp_path)
    other, _, started = attached(family, directory, targets=targets, alpha=2.0)
    values, (file,) = METHOD.start_values(other, tmp_path)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    assert values.keys() == started.keys()
    with torch.no_grad():
        for name, parameter in started.items():
            parameter.copy_(values[name])
        noisy, control = inputs(family)
        conditions = Conditions(texts=texts_of(family, directory), controls=(control,))
        ours, theirs = (METHOD.predict(each, noisy, torch.tensor([0.6]), conditions) for each in (other, model))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    larger = attached(family, directory, targets=targets, rank=4, rank_pattern={})[0]
    with pytest.raises(ConfigError, match=r"other layers or ranks.*Set method.rank and method.targets"):
        METHOD.start_values(larger, tmp_path)
    with pytest.raises(ConfigError, match="there is no Control LoRA"):
        METHOD.start_values(other, tmp_path / "none")
