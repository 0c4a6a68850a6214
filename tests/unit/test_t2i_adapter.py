"""T2I-Adapters against diffusers: its networks, its training script, its pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ftk.configs.schema import MethodConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods import t2i_adapter
from ftk.methods.base import Export
from ftk.methods.controls import steering, unet_adapter
from ftk.methods.controls.token_adapter import TokenAdapter, num_used
from ftk.models import base as families
from ftk.models.base import Conditions, Family, Model, load_model
from ftk.train.flow import SigmaDistribution

CPU = torch.device("cpu")
SMALL = {"qwen-image": {"width": 8}}
U_NETS = ("stable-diffusion", "sdxl")


def attached(family_name: str, directory: Path, seed: int = 3, **settings: Any) -> tuple[Model, Any, dict[str, Any]]:
    """A tiny model with an adapter: the model, the adapter's settings, what is trained."""
    family = families.get(family_name)
    method, parsed = methods.parse(MethodConfig(name="t2i-adapter", **{**SMALL.get(family_name, {}), **settings}))
    method.encoders(family, parsed)
    model = load_model(family, directory, (), torch.float32, CPU)
    return model, parsed, method.attach(model, parsed, seed)


@torch.no_grad()
def perturb(parameters: dict[str, Any]) -> None:
    """As if something had been trained."""
    draw = torch.Generator().manual_seed(2)
    for parameter in parameters.values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def texts_of(family: Family, directory: Path, *captions: str) -> dict[str, Any]:
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    items = family.encode_texts(encoder, captions)
    return family.collate_texts([{name: tensor.clone() for name, tensor in item.items()} for item in items])


def published_u_net(name: str) -> Any:
    """The levels of Stable Diffusion 1.x or of SDXL with their own widths, thin elsewhere, and without values."""
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    if name == "sdxl":
        shape = {"block_out_channels": (320, 640, 1280), "down_block_types": (down[1], down[0], down[0]),
                 "up_block_types": (up[0], up[0], up[1])}  # fmt: skip
    else:
        shape = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": (down[0],) * 3 + (down[1],),
                 "up_block_types": (up[1], up[0], up[0], up[0])}  # fmt: skip
    with torch.device("meta"):
        return UNet2DConditionModel(**shape, layers_per_block=1, cross_attention_dim=32)


@pytest.mark.parametrize(
    ("name", "adapter_type", "channels", "factor"),
    [
        ("stable-diffusion", "full_adapter", [320, 640, 1280, 1280], 8),
        ("stable-diffusion", "light_adapter", [320, 640, 1280], 8),
        ("sdxl", "full_adapter_xl", [320, 640, 1280, 1280], 16),
    ],
)
def test_the_published_adapters_are_what_the_published_u_nets_take(
    name: str, adapter_type: str, channels: list[int], factor: int
) -> None:
    """By the configurations of TencentARC's adapters; and the U-Net itself takes their features, or its shapes would differ."""
    from diffusers import T2IAdapter

    unet = published_u_net(name)
    features = unet_adapter.taken(unet, 8)
    wanted = None if adapter_type != "light_adapter" else adapter_type
    settings = unet_adapter.settings(wanted, features)
    assert settings == {"adapter_type": adapter_type, "channels": channels, "downscale_factor": factor}
    with torch.device("meta"):
        adapter = T2IAdapter(**settings)
        with steering.passing(unet, "down_intrablock_additional_residuals", adapter(torch.empty(1, 3, 512, 512))):
            output = unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 7, 32)).sample
    assert output.shape == (1, 4, 64, 64)
    assert [str(each) for each in unet_adapter.made(adapter_type, channels, factor)] == [
        f"{tensor.shape[1]} channels at 1/{512 // tensor.shape[2]}"
        for tensor in adapter(torch.empty(1, 3, 512, 512, device="meta"))
    ]


def test_an_adapter_of_another_geometry_is_refused_with_what_fits() -> None:
    features = unet_adapter.taken(published_u_net("sdxl"), 8)
    with pytest.raises(ConfigError, match=r"not light_adapter fits.*320 channels at 1/16.*What fits: full_adapter_xl\."):
        unet_adapter.settings("light_adapter", features)
    with pytest.raises(ConfigError, match=r"no type of T2IAdapter fits.*Train a ControlNet"):
        unet_adapter.settings(None, [unet_adapter.Feature(channels=8, pixels=each) for each in (8, 8, 8, 8)])


def test_equal_seeds_give_the_weights_that_diffusers_starts_from(tiny_models: Callable[[str], Path]) -> None:
    from diffusers import T2IAdapter

    model, _, _ = attached("sdxl", tiny_models("sdxl"), seed=11)
    network = model.extras[t2i_adapter.NETWORK]
    torch.manual_seed(11)
    theirs = T2IAdapter(**{name: value for name, value in network.config.items() if not name.startswith("_")})
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_a_step_is_that_of_diffusers_training_script(tiny_models: Callable[[str], Path]) -> None:
    """The arithmetic of `train_t2i_adapter_sdxl.py`: noise in k-diffusion's scale, a denoised image, weights sigma^-2."""
    from diffusers import EulerDiscreteScheduler

    directory = tiny_models("sdxl")
    model, _, parameters = attached("sdxl", directory)
    family, draw = model.family, torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    control_BCHW = torch.rand(2, 3, 64, 64, generator=draw)
    texts = texts_of(family, directory, "a cat", "two dogs")
    times = torch.tensor([870, 140])

    scheduler = EulerDiscreteScheduler.from_pretrained(directory / "scheduler")
    noisy = scheduler.add_noise(latents, noise, times.float())
    all_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    sigmas = all_sigmas[times].view(-1, 1, 1, 1)
    seen = noisy / (sigmas**2 + 1) ** 0.5
    added = {"text_embeds": texts["pooled"], "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)}
    features = model.extras[t2i_adapter.NETWORK](control_BCHW)
    predicted = model.denoiser(
        seen, times, encoder_hidden_states=texts["embeds"], added_cond_kwargs=added,
        down_intrablock_additional_residuals=list(features),
    ).sample  # fmt: skip
    denoised = predicted * -sigmas + noisy
    theirs = (sigmas**-2.0 * (denoised - latents) ** 2).mean()
    expected = torch.autograd.grad(theirs, list(parameters.values()))

    sigma_B = model.schedule.sigmas[999 - times]
    signal_B, noise_B = model.schedule.scales(sigma_B, torch.float32)
    ours_noisy = signal_B.view(-1, 1, 1, 1) * latents + noise_B.view(-1, 1, 1, 1) * noise
    conditions = Conditions(texts=texts, controls=(control_BCHW * 2 - 1,))
    ours = (t2i_adapter.METHOD.predict(model, ours_noisy, sigma_B, conditions) - noise).square().mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    for mine, wanted in zip(torch.autograd.grad(ours, list(parameters.values())), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-6)


def test_the_noise_levels_of_the_paper_are_a_beta_distribution() -> None:
    """`(1 - u ** 3) * num_train_timesteps`, as the paper's section 3.4 and the script draw times."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = SigmaDistribution(table=torch.linspace(1, 0, 1000), sampling="beta", beta_alpha=1.0, beta_beta=1 / 3)
    times = ((1 - u**3) * 1000).long().clamp(max=999)
    ours = 999 - (levels.position(u) * 1000).long()
    assert (ours - times).abs().max() <= 1


@pytest.mark.parametrize("family_name", U_NETS)
def test_diffusers_pipeline_with_the_folder_draws_what_training_draws(
    tiny_models: Callable[[str], Path], family_name: str, tmp_path: Path
) -> None:
    import diffusers

    directory = tiny_models(family_name)
    model, settings, parameters = attached(family_name, directory)
    perturb(parameters)
    family = model.family
    t2i_adapter.METHOD.export(model, settings, Export(directory=tmp_path, form="diffusers", metadata={}))
    control = Image.effect_noise((64, 64), 90).convert("RGB")
    options = {
        "prompt": "a cat", "negative_prompt": "a dog", "width": 64, "height": 64, "num_inference_steps": 2,
        "output_type": "np", **family.generation(3.0),
    }  # fmt: skip

    base = family.pipeline(directory, torch.float32, CPU, unet=model.denoiser)
    ours = t2i_adapter.METHOD.sampling_pipeline(model, base)
    pixels_BCHW = steering.as_pixels(control, (64, 64))

    def drawn(strength: float) -> Any:
        arguments = t2i_adapter.METHOD.pipeline_controls([pixels_BCHW], strength)
        return ours(**options, **arguments, generator=torch.Generator().manual_seed(0)).images

    kind = {"stable-diffusion": "StableDiffusionAdapterPipeline", "sdxl": "StableDiffusionXLAdapterPipeline"}[family_name]
    parts = {"safety_checker": None} if family_name == "stable-diffusion" else {}
    adapter = diffusers.T2IAdapter.from_pretrained(tmp_path)
    theirs = getattr(diffusers, kind).from_pretrained(directory, adapter=adapter, **parts)
    assert type(ours) is type(theirs)
    for strength in (1.0, 0.4):
        options_of_theirs = {"image": control, "adapter_conditioning_scale": strength}
        expected = theirs(**options, **options_of_theirs, generator=torch.Generator().manual_seed(0)).images
        assert abs(drawn(strength) - expected).max() < 1e-5
    without = base(**options, generator=torch.Generator().manual_seed(0)).images
    assert abs(drawn(0.0) - without).max() < 1e-6
    assert abs(drawn(1.0) - without).max() > 1e-3


def test_a_transformer_starts_at_the_base_and_gets_features_after_its_blocks(tiny_models: Callable[[str], Path]) -> None:
    directory = tiny_models("qwen-image")
    model, _, parameters = attached("qwen-image", directory)
    texts = texts_of(model.family, directory, "a cat")
    noisy, sigma_B = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.6])
    pixels_BCHW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    conditions = Conditions(texts=texts, controls=(pixels_BCHW,))

    @torch.no_grad()
    def predicted() -> torch.Tensor:
        return t2i_adapter.METHOD.predict(model, noisy, sigma_B, conditions)

    with torch.no_grad():
        base = model.family.predict(model, noisy, sigma_B, conditions)
    assert torch.equal(predicted(), base)
    perturb(parameters)
    features = model.extras[t2i_adapter.NETWORK]((pixels_BCHW + 1) / 2)
    assert [each.shape for each in features] == [(1, 16, 32)] * 2
    plain = model.denoiser.forward

    def with_features(**options: Any) -> Any:
        return plain(**options, controlnet_block_samples=features)

    model.denoiser.forward = with_features
    with torch.no_grad():
        expected = model.family.predict(model, noisy, sigma_B, conditions)
    del model.denoiser.forward
    assert torch.equal(predicted(), expected)
    assert (expected - base).abs().max() > 1e-3


def test_tokens_lie_row_by_row_like_those_of_the_latents() -> None:
    """A white square of one token moves the tokens around its place, two far through two kernels of 3 x 3, and no others."""
    torch.manual_seed(0)
    network = TokenAdapter(width=4, hidden_width=8, stages=1, num_res_blocks=1, pixels=16)
    torch.nn.init.normal_(network.projections[0].weight)
    black = torch.zeros(1, 3, 96, 128)
    white = black.clone()
    white[:, :, 16:32, 48:64] = 1
    with torch.no_grad():
        moved = (network(white)[0] - network(black)[0]).abs().sum(-1).reshape(6, 8)
    rows, columns = (axis.tolist() for axis in torch.nonzero(moved, as_tuple=True))
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 3, 1, 5)


@pytest.mark.parametrize(
    ("stages", "blocks", "used"), [(1, 60, 1), (4, 60, 4), (3, 4, 2), (4, 5, 3), (60, 60, 60), (7, 60, 7), (8, 60, 8)]
)
def test_stages_are_spread_over_the_blocks_as_diffusers_does(stages: int, blocks: int, used: int) -> None:
    import numpy as np

    interval = int(np.ceil(blocks / stages))
    assert num_used(stages, blocks) == used == len({block // interval for block in range(blocks)})


@pytest.mark.parametrize(
    ("family_name", "settings", "message"),
    [
        ("sdxl", {"width": 8}, "method.width has no effect with sdxl, whose denoiser is a U-Net"),
        ("stable-diffusion", {"stages": 2}, "method.stages has no effect with stable-diffusion"),
        ("qwen-image", {"adapter_type": "full_adapter"}, "method.adapter_type has no effect with qwen-image"),
        ("qwen-image", {"stages": 5}, r"method.stages: 5 features cannot be spread evenly over the 2 blocks.*Possible: 1, 2\."),
        ("sdxl", {"adapter_type": "full_adapter"}, "not full_adapter fits this U-Net.*What fits: full_adapter_xl"),
        ("sdxl", {"adapter_type": "full"}, "method.adapter_type"),
    ],
)
def test_settings_that_do_not_fit_the_family_are_refused(
    tiny_models: Callable[[str], Path], family_name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        attached(family_name, tiny_models(family_name), **settings)


def test_a_transformer_that_takes_no_features_is_refused_in_words(tiny_models: Callable[[str], Path]) -> None:
    model, settings, _ = attached("qwen-image", tiny_models("qwen-image"))

    class Closed(type(model.denoiser)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    model.denoiser.__class__ = Closed
    with pytest.raises(ConfigError, match=r"Closed, the denoiser of qwen-image, takes nothing.*Use control-lora"):
        t2i_adapter.METHOD.attach(model, settings, 0)


def test_ftks_loader_finds_the_family_and_takes_pictures(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_models("qwen-image")
    model, settings, parameters = attached("qwen-image", directory)
    perturb(parameters)
    t2i_adapter.METHOD.export(model, settings, Export(directory=tmp_path, form="diffusers", metadata={}))
    control = Image.effect_noise((64, 48), 90).convert("RGB")
    text = texts_of(model.family, directory, "a cat")
    options = {
        **model.family.pipeline_texts({"embeds": text["embeds"][0]}), "num_inference_steps": 2, "output_type": "latent",
        "true_cfg_scale": 1.0,
    }  # fmt: skip

    def pipeline(**parts: Any) -> Any:
        return model.family.pipeline(directory, torch.float32, CPU, text_encoder=None, tokenizer=None, **parts)

    ours = t2i_adapter.load(pipeline(), str(tmp_path))
    drawn = ours(**options, image=control, generator=torch.Generator().manual_seed(0)).images
    arguments = t2i_adapter.METHOD.pipeline_controls([steering.as_pixels(control, (64, 48))])
    trained = t2i_adapter.METHOD.sampling_pipeline(model, pipeline(transformer=model.denoiser))
    expected = trained(**options, **arguments, width=64, height=48, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(drawn, expected)
    with pytest.raises(TypeError, match="give it one as `image`"):
        ours(**options)
    other = families.get("sdxl").pipeline(tiny_models("sdxl"), torch.float32, CPU)
    with pytest.raises(CheckpointError, match=r"another (base )?model"):
        t2i_adapter.METHOD.load_into(families.get("sdxl"), other, tmp_path)


def test_a_run_starts_from_a_published_adapters_folder(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import T2IAdapter

    model, _, parameters = attached("sdxl", tiny_models("sdxl"))
    torch.manual_seed(5)
    theirs = T2IAdapter(channels=[8, 32], downscale_factor=16, adapter_type="full_adapter_xl")
    theirs.save_pretrained(tmp_path)
    values, files = t2i_adapter.METHOD.start_values(model, tmp_path)
    assert values.keys() == parameters.keys()
    assert torch.equal(values["t2i_adapter.adapter.conv_in.weight"], theirs.adapter.conv_in.weight)
    assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
    other = attached("sdxl", tiny_models("sdxl"), num_res_blocks=1)[0]
    with pytest.raises(CheckpointError, match=r"holds another adapter than this run trains.*and absent here"):
        t2i_adapter.METHOD.start_values(other, tmp_path)
    with pytest.raises(ConfigError, match="there is no T2I-Adapter"):
        t2i_adapter.METHOD.start_values(model, tmp_path / "none")
