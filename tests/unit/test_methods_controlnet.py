"""ControlNet: against diffusers' training script and its pipelines, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, QwenImageControlNetModel, UNet2DConditionModel
from diffusers.pipelines.flux import pipeline_flux_controlnet as official_flux
from diffusers.pipelines.qwenimage import pipeline_qwenimage_controlnet as official_qwen
from safetensors.torch import load_file, save_file

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig, TrainConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.base import Export
from ftk.methods.controlnet import WEIGHTS_FILE
from ftk.models import base as models
from ftk.models.base import Conditions, Model
from ftk.models.components import control_networks
from ftk.run import Run, resolve
from ftk.train import inputs, memory, optim, start
from ftk.train.data import Batch, Step
from ftk.train.inputs import sigma_distribution
from ftk.train.loop import Trainer
from ftk.train.optim import MasterOptimizer

CPU, META = torch.device("cpu"), torch.device("meta")
METHOD = methods.get("controlnet")
FAMILIES = ["flux", "qwen-image", "sdxl", "stable-diffusion"]
# A family that reads latents and one that reads pixels run each time, the others by `make campaign-methods`.
LESS_OFTEN = [("qwen-image", 2), ("stable-diffusion", 1), ("flux", 2)]
each_form = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign if name in ("flux", "sdxl") else ()) for name in FAMILIES]
)
SIDE = 64


def attached(name: str, directory: Path, device: torch.device = CPU, seed: int = 3, **settings: Any) -> tuple[Model, Any]:
    """A tiny model with a network, and what is trained of it."""
    model = models.load_model(models.get(name), directory, (), torch.float32, device)
    return model, METHOD.attach(model, METHOD.Config(**settings), seed)


def trained(name: str, directory: Path, **settings: Any) -> Model:
    """The same with noise on every weight, as if it had been trained."""
    model, parameters = attached(name, directory, **settings)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    for module in model.components.values():
        module.eval()
    return model


def text_item(name: str, model: Model, draw: torch.Generator) -> dict[str, torch.Tensor]:
    config, is_transformer = model.denoiser.config, name in ("flux", "qwen-image")
    width = config.joint_attention_dim if is_transformer else config.cross_attention_dim
    item = {"embeds": torch.randn(5 if is_transformer else 77, width, generator=draw)}
    pooled = {"sdxl": 16, "flux": config.get("pooled_projection_dim")}
    return {**item, "pooled": torch.randn(pooled[name], generator=draw)} if name in pooled else item


def exported(model: Model, directory: Path) -> Path:
    METHOD.export(model, METHOD.Config(), Export(directory=directory, form="diffusers", metadata={"run": "test"}))
    return directory


class Reference:
    """diffusers 0.42's `train_controlnet.py`: the body of its loop, in its own words."""

    def __init__(self, model: Path, network: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(model / "unet").requires_grad_(False)
        self.controlnet = ControlNetModel.from_pretrained(network).train()
        self.optimizer = torch.optim.AdamW(self.controlnet.parameters(), lr=1e-3, weight_decay=1e-2, eps=1e-8)
        self.scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")

    def step(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, texts: Any, image: Any) -> float:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        down, middle = self.controlnet(noisy, timesteps, encoder_hidden_states=texts, controlnet_cond=image, return_dict=False)
        prediction = self.unet(
            noisy, timesteps, encoder_hidden_states=texts, down_block_additional_residuals=list(down),
            mid_block_additional_residual=middle, return_dict=False,
        )[0]  # fmt: skip
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.controlnet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def test_three_steps_give_the_losses_of_diffusers_training_script(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_models("stable-diffusion")
    model, parameters = attached("stable-diffusion", directory)
    reference = Reference(directory, exported(model, tmp_path))
    config = TrainConfig(learning_rate=1e-3, precision="fp32")
    trainer = Trainer(
        model=model, method=METHOD, optimizer=MasterOptimizer(parameters, config), config=config, device=CPU,
        schedule=optim.schedule(config.schedule, config.steps),
    )  # fmt: skip
    distribution = sigma_distribution(config, model.schedule, model.family)
    ours, theirs = [], []
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        latents, noise = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(2))
        u, image = torch.rand(3, generator=draw), torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=draw)
        texts = [text_item("stable-diffusion", model, draw) for _ in range(3)]
        conditions = Conditions(texts=model.family.collate_texts(texts), controls=(image.float() / 127.5 - 1,))
        batch = Batch(
            latents_BCHW=latents, noise_BCHW=noise, sigma_B=distribution.sigma(u, 64), weight_B=torch.ones(3),
            conditions=conditions,
        )  # fmt: skip
        ours.append(trainer.update(Step(batches=[(0, batch)], num_samples=3)).loss.item())
        embeds = torch.stack([text["embeds"] for text in texts])
        theirs.append(reference.step(latents, noise, 999 - (u * 1000).long(), embeds, image.float() / 255))
    assert ours == pytest.approx(theirs, rel=1e-6)
    weights = dict(reference.controlnet.named_parameters())
    for name, weight in trainer.optimizer.weights().items():
        torch.testing.assert_close(weight, weights[name.removeprefix("controlnet.")].detach(), rtol=1e-3, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen-image", 1),
        ("stable-diffusion", 2),
        ("sdxl", 1),
        ("flux", 1),
        *(pytest.param(name, count, marks=pytest.mark.campaign) for name, count in LESS_OFTEN),
    ],
)
def test_the_official_pipeline_draws_what_ftk_draws(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    directory = tiny_models(name)
    model = trained(name, directory)
    family, draw = model.family, torch.Generator().manual_seed(7)
    network_class, pipeline_class = family.control_classes()
    network = network_class.from_pretrained(exported(model, tmp_path))
    extra = {"safety_checker": None, "feature_extractor": None} if name == "stable-diffusion" else {}
    networks = network
    if count > 1:
        networks = diffusers.QwenImageMultiControlNetModel([network]) if name == "qwen-image" else [network] * count
    absent = dict.fromkeys(family.text_components)
    official = pipeline_class.from_pretrained(directory, controlnet=networks, **absent, **extra)
    official.set_progress_bar_config(disable=True)

    images = [torch.rand(1, 3, SIDE, SIDE, generator=draw) for _ in range(count)]
    options = {
        **family.pipeline_texts(text_item(name, model, draw)), **family.generation(2.0), "width": SIDE, "height": SIDE,
        "num_inference_steps": 2, "output_type": "np",
        **{f"negative_{key}": each for key, each in family.pipeline_texts(text_item(name, model, draw)).items()},
    }  # fmt: skip
    scale = 0.7 if count == 1 else [0.7] * count
    controls = [image * 2 - 1 for image in images]
    # Pipelines of transformers take tensors as they are, the others those in [0, 1].
    reads_latents = family.control_form == "latents"
    argument, pixels = ("control_image", controls) if reads_latents else ("image", images)
    shown = {argument: pixels if count > 1 else pixels[0]}
    if reads_latents:
        vae = family.load_vae(directory, torch.float32, CPU)
        controls = [family.encode_images(vae, each)[0] for each in controls]
    with monkeypatch.context() as patch:
        # They draw the control latents at random, with the generator of the noise; training reads their mean.
        for module in (official_flux, official_qwen):
            patch.setattr(module, "retrieve_latents", lambda output, generator: output.latent_dist.mode())
        theirs = official(
            **options, **shown, controlnet_conditioning_scale=scale, generator=torch.Generator().manual_seed(4)
        ).images
    pipeline = family.pipeline(directory, torch.float32, CPU, **absent)
    base = pipeline(**options, generator=torch.Generator().manual_seed(4)).images
    drawing = METHOD.load_into(family, pipeline, tmp_path)
    ours = drawing(**options, **METHOD.pipeline_controls(controls, 0.7), generator=torch.Generator().manual_seed(4)).images
    assert abs(ours - theirs).max() < 1e-4
    assert abs(ours - base).max() > 1e-2
    nothing = drawing(**options, **METHOD.pipeline_controls(controls, 0.0), generator=torch.Generator().manual_seed(4)).images
    assert abs(nothing - base).max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_copy_starts_with_every_weight_of_the_base_and_adds_nothing(tiny_models: Callable[[str], Path], name: str) -> None:
    directory = tiny_models(name)
    base = models.get(name).load_denoiser(directory, torch.float32, CPU)
    # In the tiny model the norm of texts is as a fresh one is: the copy must be told from it.
    for parameter in base.parameters():
        parameter += 0.01
    network = models.get(name).make_control_network(base, None)
    theirs = base.state_dict()
    copied = {key for key, tensor in network.state_dict().items() if key in theirs and torch.equal(tensor, theirs[key])}
    rest = network.state_dict().keys() - copied
    assert all(key.startswith("controlnet_") for key in rest)
    model, _ = attached(name, directory)
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, model.family.geometry.channels, 8, 8, generator=draw)
    texts = model.family.collate_texts([text_item(name, model, draw) for _ in range(2)])
    is_pixels = model.family.control_form == "pixels"
    control = torch.randn(2, *((3, SIDE, SIDE) if is_pixels else noisy.shape[1:]), generator=draw)
    sigma_B = model.schedule.sigmas[[700, 200]]
    for module in model.components.values():
        module.eval()
    plain = model.family.predict(model, noisy, sigma_B, Conditions(texts=texts))
    assert torch.equal(METHOD.predict(model, noisy, sigma_B, Conditions(texts=texts, controls=(control,))), plain)


@torch.no_grad()
@each_form
def test_pictures_are_drawn_in_half_precision_too(tiny_models: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    directory, family = tiny_models(name), models.get(name)
    model, draw = attached(name, directory)[0], torch.Generator().manual_seed(1)
    pipeline = family.pipeline(directory, torch.bfloat16, CPU, **dict.fromkeys(family.text_components))
    drawing = METHOD.load_into(family, pipeline, exported(model, tmp_path))
    item = {key: tensor.bfloat16() for key, tensor in text_item(name, model, draw).items()}
    shape = (3, SIDE, SIDE) if family.control_form == "pixels" else (family.geometry.channels, SIDE // 8, SIDE // 8)
    control = torch.randn(1, *shape, generator=draw).bfloat16()
    options = {**family.pipeline_texts(item), **family.generation(1.0), "width": SIDE, "height": SIDE}
    picture = drawing(**options, **METHOD.pipeline_controls([control]), num_inference_steps=2, output_type="pil").images[0]
    assert picture.size == (SIDE, SIDE)


def test_a_copy_is_made_before_the_base_is_quantised(tiny_models: Callable[[str], Path]) -> None:
    model = models.load_model(models.get("qwen-image"), tiny_models("qwen-image"), (), torch.float32, CPU)
    weight = model.denoiser.img_in.weight.detach().clone()
    METHOD.thaw(model, METHOD.Config())
    with torch.no_grad():
        model.denoiser.img_in.weight.zero_()
    METHOD.attach(model, METHOD.Config(), 3)
    assert torch.equal(model.extras["controlnet"].img_in.weight, weight)


@pytest.mark.parametrize(
    ("asked", "total", "expected"),
    [(None, 60, 5), (None, 2, 2), (None, 4, 4), (None, 7, 4), (1, 60, 1), (5, 60, 5), (30, 60, 30), (2, 4, 2), (60, 60, 60)],
)
def test_every_copied_block_reaches_a_block_of_the_model(asked: int | None, total: int, expected: int) -> None:
    count = control_networks.num_blocks(asked, total)
    assert count == expected
    # As diffusers' transformers spread them.
    assert {index // -(-total // count) for index in range(total)} == set(range(count))


@pytest.mark.parametrize(("asked", "total"), [(3, 4), (11, 60), (61, 60), (5, 4)])
def test_numbers_of_blocks_that_waste_outputs_are_refused(asked: int, total: int) -> None:
    with pytest.raises(ConfigError, match=f"method.blocks: {asked} copied blocks do not spread over the model's {total}"):
        control_networks.num_blocks(asked, total)


def test_a_unet_is_copied_whole(tiny_models: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"method\.blocks: the ControlNet of a U-Net copies its whole encoder"):
        attached("sdxl", tiny_models("sdxl"), META, blocks=2)


def test_heads_and_widths_are_those_of_the_base(tiny_models: Callable[[str], Path]) -> None:
    model, _ = attached("qwen-image", tiny_models("qwen-image"), META, blocks=1)
    config = model.extras["controlnet"].config
    assert (config.num_layers, config.attention_head_dim, config.num_attention_heads) == (1, 16, 2)


def run_of(name: str, directory: Path, **sections: Any) -> Run:
    tree = {
        "run": "test", "workspace": "work", "model": {"family": name, "path": str(directory)},
        "data": {"sources": [{"path": "photos"}]}, "method": {"name": "controlnet", **sections.pop("method", {})},
        "train": {"precision": "fp32", **sections},
    }  # fmt: skip
    return resolve(validate(RunConfig, tree, "the test"))


def test_a_family_without_a_controlnet_is_refused_before_anything_is_read() -> None:
    message = r"method\.name: controlnet cannot be trained for qwen-image-edit: diffusers has no pipeline .* for edit models"
    with pytest.raises(ConfigError, match=f"{message}.*It can be for flux, qwen-image, sdxl, stable-diffusion"):
        run_of("qwen-image-edit", Path("nowhere"))


@pytest.mark.parametrize("is_file", [False, True])
def test_a_run_starts_from_a_network_in_a_folder_or_file(
    tiny_models: Callable[[str], Path], tmp_path: Path, is_file: bool
) -> None:
    directory = tiny_models("sdxl")
    folder = exported(trained("sdxl", directory), tmp_path / "theirs")
    path = folder / WEIGHTS_FILE if is_file else folder
    outline, parameters = attached("sdxl", directory, META)
    begun = start.read(run_of("sdxl", directory, start_from=str(path)), directory, outline, parameters)
    assert begun is not None
    assert begun.values.keys() == parameters.keys()
    theirs = load_file(folder / WEIGHTS_FILE)
    assert all(torch.equal(begun.values[f"controlnet.{name}"], tensor) for name, tensor in theirs.items())


def test_a_start_that_does_not_fit_is_refused_with_what_to_set(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_models("qwen-image")
    one = exported(attached("qwen-image", directory, blocks=1)[0], tmp_path / "one")
    of_sdxl = exported(attached("sdxl", tiny_models("sdxl"))[0], tmp_path / "sdxl")
    outline, parameters = attached("qwen-image", directory, META)

    def begin(path: Path) -> None:
        start.read(run_of("qwen-image", directory, start_from=str(path)), directory, outline, parameters)

    with pytest.raises(ConfigError, match=r"copies 1 blocks, and this run 2. Set method.blocks: 1"):
        begin(one)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        begin(of_sdxl)
    with pytest.raises(ConfigError, match=r"there is no ControlNet\. Name a folder with diffusion_pytorch_model.safetensors"):
        begin(tmp_path / "nowhere")
    with_single = tmp_path / "single.safetensors"
    save_file({**load_file(one / WEIGHTS_FILE), "single_transformer_blocks.0.norm.linear.bias": torch.zeros(2)}, with_single)
    with pytest.raises(ConfigError, match="copies single blocks too"):
        start.read(
            run_of("qwen-image", directory, start_from=str(with_single)),
            directory,
            *attached("qwen-image", directory, META, blocks=1),
        )
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    for file in one.iterdir():
        (tmp_path / "run" / "adapter" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="Did you mean the folder adapter/ in it"):
        begin(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: None, "config.json does not exist"),
        (lambda config: "{", "config.json is damaged"),
        (lambda config: json.dumps({**config, "_class_name": "UNet2DModel"}), "is of a UNet2DModel, not of a QwenImage"),
        (lambda config: json.dumps({**config, "num_layers": "x"}), "config.json is damaged"),
        (lambda config: json.dumps({**config, "num_layers": 1}), "was trained on another base model"),
    ],
)
def test_a_damaged_folder_is_named(
    tiny_models: Callable[[str], Path], tmp_path: Path, change: Callable[[Any], str | None], message: str
) -> None:
    directory = tiny_models("qwen-image")
    folder = exported(attached("qwen-image", directory)[0], tmp_path)
    path = folder / "config.json"
    text = change(json.loads(path.read_text()))
    path.unlink() if text is None else path.write_text(text)
    family = models.get("qwen-image")
    pipeline = family.pipeline(directory, torch.float32, CPU, text_encoder=None, tokenizer=None, vae=None)
    with pytest.raises(CheckpointError, match=message):
        METHOD.load_into(family, pipeline, folder)


def test_a_folder_of_a_smaller_base_is_refused(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_models("qwen-image")
    small = QwenImageControlNetModel(
        in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=1, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    small.save_pretrained(tmp_path)
    family = models.get("qwen-image")
    pipeline = family.pipeline(directory, torch.float32, CPU, text_encoder=None, tokenizer=None, vae=None)
    with pytest.raises(CheckpointError, match="was trained on another base model, or another size of this one"):
        METHOD.load_into(family, pipeline, tmp_path)


@each_form
def test_the_memory_plan_counts_the_network_and_what_passes_gradients_to_it(
    tiny_models: Callable[[str], Path], name: str
) -> None:
    directory = tiny_models(name)
    workload = memory.Workload(height=SIDE, width=SIDE, text_tokens=8, micro_batch_size=1)
    sizes = inputs.plan_sizes(run_of(name, directory), directory, workload, CPU)
    activations = sizes.plan.parts["activations"]
    assert activations > 10_000
    # Weights, gradients and two moments of fp32, and activations of its own.
    extra = sizes.plan.parts["extra networks"] - 16 * sizes.num_trainable_parameters
    assert extra > activations * sizes.num_trainable_parameters / sizes.num_frozen_parameters / 2


def test_a_file_with_a_value_that_is_not_finite_is_refused(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_models("sdxl")
    folder = exported(attached("sdxl", directory)[0], tmp_path)
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path)
    outline, parameters = attached("sdxl", directory, META)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        start.read(run_of("sdxl", directory, start_from=str(folder)), directory, outline, parameters)
