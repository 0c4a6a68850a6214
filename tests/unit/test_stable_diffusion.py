"""Stable Diffusion and SDXL: the classic training step, sizes and crops, what is kept for the backward pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from peft import LoraConfig

from ftk.configs.schema import LossConfig, OptimizerConfig, SigmaConfig, TrainConfig
from ftk.errors import ConfigError, ModelError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models import sdxl
from ftk.models.base import Conditions, Model
from ftk.models.components.geometry import SampleGeometry
from ftk.models.components.schedule import NoiseSchedule
from ftk.train import memory, optim, placement
from ftk.train.data import Batch, Step
from ftk.train.inputs import sigma_distribution
from ftk.train.loop import Trainer
from ftk.train.memory import Device, Workload
from ftk.train.optim import MasterOptimizer

CPU = torch.device("cpu")
FAMILIES = ["stable-diffusion", "sdxl"]
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
SAMPLE = SampleGeometry(
    width=1999, height=1333, resize_width=768, resize_height=512, crop_x=70, crop_y=3,
    bucket_width=640, bucket_height=448, flipped=False,
)  # fmt: skip
FLIPPED = SampleGeometry(
    width=1999, height=1333, resize_width=768, resize_height=512, crop_x=70, crop_y=3,
    bucket_width=640, bucket_height=448, flipped=True,
)  # fmt: skip


def conditions(family: Any, texts: list[Any], geometries: list[SampleGeometry]) -> Conditions:
    """What these samples are conditioned on; without geometries they are whole images."""
    numbers = torch.tensor([geometry.numbers() for geometry in geometries]) if geometries else None
    return Conditions(texts=family.collate_texts(texts), geometry_BG=numbers)


def model_of(family: Any, denoiser: Any) -> Model:
    """A denoiser with a noise schedule of three levels."""
    signals = torch.tensor([0.1, 0.5, 0.9])
    schedule = NoiseSchedule(
        objective="epsilon", sigmas=(1 - signals**2).sqrt(), signals=signals, times=torch.tensor([2.0, 1.0, 0.0])
    )
    return Model(family=family, schedule=schedule, denoiser=denoiser)


@pytest.fixture
def changed_model(tiny_models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model whose scheduler's configuration has other values."""

    def change(name: str, **settings: Any) -> Path:
        shutil.copytree(tiny_models(name), tmp_path / name)
        path = tmp_path / name / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / name

    return change


class Reference:
    """diffusers 0.42's `train_text_to_image_lora.py` and `..._sdxl.py`: the body of their loops, in their own words."""

    def __init__(self, model: Path, state: dict[str, torch.Tensor], gamma: float | None) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(model / "unet").requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
        own = dict(self.unet.named_parameters())
        for name, tensor in state.items():
            own[name].data.copy_(tensor)
        self.parameters = [own[name] for name in state]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.gamma = gamma

    def step(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, texts: list[Any]) -> float:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        embeds = torch.stack([text["embeds"] for text in texts])
        added = None
        if "pooled" in texts[0]:
            # original height and width, crop top and left, target height and width
            row = torch.tensor([[1333, 1999, 3, 70, 448, 640]], dtype=torch.float32)
            added = {"text_embeds": torch.stack([text["pooled"] for text in texts]), "time_ids": row.repeat(len(texts), 1)}
        is_epsilon = self.scheduler.config.prediction_type == "epsilon"
        target = noise if is_epsilon else self.scheduler.get_velocity(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
        if self.gamma is None:
            loss = loss.mean()
        else:
            snr = compute_snr(self.scheduler, timesteps)
            weights = torch.stack([snr, self.gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
            weights = weights / (snr if is_epsilon else snr + 1)
            loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def make_trainer(name: str, model: Path, sigma: SigmaConfig) -> tuple[Trainer, dict[str, torch.Tensor]]:
    family, method = models.get(name), methods.get("lora")
    loaded = models.load_model(family, model, (), torch.float32, CPU)
    parameters = method.attach(loaded, method.Config(rank=4, targets=tuple(TARGETS)), seed=3)
    config = TrainConfig(
        learning_rate=1e-3, precision="fp32", sigma=sigma, optimizer=OptimizerConfig(weight_decay=1e-2)
    )  # fmt: skip
    trainer = Trainer(
        model=loaded,
        method=method,
        optimizer=MasterOptimizer(parameters, config),
        schedule=optim.schedule(config.schedule, config.steps),
        config=config,
        device=CPU,
    )
    return trainer, {key: parameter.detach().clone() for key, parameter in parameters.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_three_optimizer_steps_give_the_classic_losses(
    changed_model: Callable[..., Path], name: str, prediction_type: str, gamma: float | None
) -> None:
    model = changed_model(name, prediction_type=prediction_type)
    weighting = {} if gamma is None else {"weighting": "min_snr", "min_snr_gamma": gamma}
    trainer, state = make_trainer(name, model, SigmaConfig(**weighting))
    reference = Reference(model, state, gamma)
    distribution = sigma_distribution(trainer.config, trainer.model.schedule, trainer.model.family)
    ours, theirs = [], []
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        latents, noise = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(2))
        u = torch.rand(3, generator=draw)
        width = trainer.model.denoiser.config.cross_attention_dim
        texts = [{"embeds": torch.randn(77, width, generator=draw)} for _ in range(3)]
        for text in texts if name == "sdxl" else []:
            text["pooled"] = torch.randn(16, generator=draw)
        batch = Batch(
            latents_BCHW=latents, noise_BCHW=noise, sigma_B=distribution.sigma(u, 64), weight_B=torch.ones(3),
            conditions=conditions(trainer.model.family, texts, [SAMPLE] * 3),
        )  # fmt: skip
        ours.append(trainer.update(Step(batches=[(0, batch)], num_samples=3)).loss.item())
        theirs.append(reference.step(latents, noise, 999 - (u * 1000).long(), texts))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert len({round(loss, 4) for loss in ours}) == 3
    for ours_now, theirs_now in zip(trainer.optimizer.weights().values(), reference.parameters, strict=True):
        assert torch.allclose(ours_now, theirs_now, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_any_sampler_has_the_noise_levels_of_its_betas(
    tiny_models: Callable[[str], Path], tmp_path: Path, name: str, scheduler: Any
) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler(**betas).save_pretrained(tmp_path / "scheduler")
    found, plain = models.get(name).load_schedule(tmp_path), models.get(name).load_schedule(tiny_models(name))
    assert torch.equal(found.sigmas, plain.sigmas)
    assert found.sigmas[[0, -1]].tolist() == pytest.approx([0.99767, 0.02915], abs=1e-5)


def test_zero_terminal_snr_begins_at_pure_noise_and_every_entry_has_its_time(changed_model: Callable[..., Path]) -> None:
    model = changed_model("sdxl", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = models.get("sdxl").load_schedule(model)
    assert schedule.objective == "v"
    assert schedule.sigmas[0] == 1
    assert torch.equal(schedule.time(schedule.sigmas), schedule.times)
    assert schedule.scales(schedule.sigmas[:1], torch.float32)[0].item() == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_schedulers_that_are_no_diffusions_are_refused(changed_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="prediction_type is 'sample'"):
        models.get(name).load_schedule(changed_model(name, prediction_type="sample"))
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        models.get(name).load_schedule(tmp_path / "flow")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 3.0}, r"train\.sigma\.shift: .* none between them"),
        ({"shift": "resolution"}, r"train\.sigma\.shift"),
        ({"minimum": 0.2}, r"train\.sigma\.minimum"),
        ({"maximum": 0.9}, r"train\.sigma\.maximum"),
        ({"continuous": True}, r"train\.sigma\.continuous"),
        ({"weighting": "cosmap"}, "predicts epsilon. Set it to min_snr or none"),
        ({"weighting": "like_epsilon"}, "predicts epsilon. Set it to min_snr or none; soft_min_snr and debiased fit, too"),
    ],
)
def test_what_a_table_cannot_carry_is_refused(
    tiny_models: Callable[[str], Path], settings: dict[str, Any], message: str
) -> None:
    family = models.get("stable-diffusion")
    config = TrainConfig(sigma=SigmaConfig(**settings))
    with pytest.raises(ConfigError, match=message):
        sigma_distribution(config, family.load_schedule(tiny_models("stable-diffusion")), family)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "like_epsilon"])
def test_min_snr_and_its_relatives_are_refused_for_flow_matching(tiny_model: Path, weighting: Any) -> None:
    family = models.get("qwen-image")
    config = TrainConfig(sigma=SigmaConfig(weighting=weighting))
    with pytest.raises(ConfigError, match=f"{weighting} is not made for qwen-image"):
        sigma_distribution(config, family.load_schedule(tiny_model), family)


def test_a_huber_schedule_by_snr_is_refused_for_flow_matching(tiny_model: Path) -> None:
    family = models.get("qwen-image")
    config = TrainConfig(loss=LossConfig(kind="huber", huber_schedule="snr"))
    with pytest.raises(ConfigError, match="Set it to exponential or constant"):
        sigma_distribution(config, family.load_schedule(tiny_model), family)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode", "beta"])
def test_every_sampling_draws_entries_of_the_table(tiny_models: Callable[[str], Path], sampling: str) -> None:
    family = models.get("stable-diffusion")
    schedule = family.load_schedule(tiny_models("stable-diffusion"))
    drawn = sigma_distribution(TrainConfig(sigma=SigmaConfig(sampling=sampling)), schedule, family).sigma(torch.rand(5000), 64)
    assert torch.isin(drawn, schedule.sigmas).all()
    signal, sigma = schedule.scales(drawn, torch.float32)
    assert torch.allclose(signal**2 + sigma**2, torch.ones(()), atol=1e-6)


def test_sizes_and_crops_are_told_as_in_the_paper() -> None:
    time_ids_B6 = sdxl.time_ids(torch.tensor([SAMPLE.numbers(), FLIPPED.numbers()]))
    # Mirrored, the 58 columns at the right of the crop lie at its left.
    assert time_ids_B6.tolist() == [[1333, 1999, 3, 70, 448, 640], [1333, 1999, 3, 768 - 640 - 70, 448, 640]]
    assert time_ids_B6.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_depend_on_pooled_text_sizes_and_crops(tiny_models: Callable[[str], Path], dtype: torch.dtype) -> None:
    family = models.get("sdxl")
    model = models.load_model(family, tiny_models("sdxl"), (), dtype, CPU)
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=draw).to(dtype)
    texts = [{"embeds": torch.randn(77, 64, generator=draw).to(dtype), "pooled": torch.randn(16, generator=draw).to(dtype)}
             for _ in range(2)]  # fmt: skip
    other = {**texts[0], "pooled": texts[1]["pooled"]}
    inputs = [([texts[0]], [SAMPLE]), ([texts[0]], [FLIPPED]), ([texts[0]], []), ([other], [SAMPLE])]
    sigma = model.schedule.sigmas[[499]]
    found = [family.predict(model, noisy, sigma, conditions(family, *each)) for each in inputs]
    assert all(one.dtype == torch.float32 for one in found)
    assert all((one - found[0]).abs().max() > 1e-5 for one in found[1:])


def test_the_vae_of_sdxl_is_fp32_whatever_the_rest_is(tiny_models: Callable[[str], Path]) -> None:
    family, model = models.get("sdxl"), tiny_models("sdxl")
    with pytest.raises(ConfigError, match=r"cache\.vae_dtype: bfloat16: .* float32 alone"):
        family.load_vae(model, torch.bfloat16, CPU)
    pipeline = family.pipeline(model, torch.bfloat16, CPU)
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.unet.dtype == torch.bfloat16
    (image,) = pipeline(prompt="a cat", height=32, width=32, num_inference_steps=2, guidance_scale=2.0).images
    assert image.size == (32, 32)


def test_a_tokenizer_of_another_length_is_refused(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models("sdxl"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 64}))
    with pytest.raises(ModelError, match="tokenizer_2: its texts have 64 tokens instead of 77"):
        models.get("sdxl").load_text_encoder(tmp_path, torch.float32, CPU)


def test_a_vae_with_statistics_of_its_own_is_normalised_by_them(tmp_path: Path) -> None:
    family = models.get("sdxl")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0],
        latents_std=[2.0, 2.0, 4.0, 4.0], down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    assert family.normalisation(tmp_path) == {"latents_mean": [1, 2, 3, 4], "latents_std": [4, 4, 8, 8]}
    vae = family.load_vae(tmp_path, torch.float32, CPU)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, std = family.encode_images(vae, pixels)
    posterior = vae.encode(pixels).latent_dist
    shift, scale = (torch.tensor(values).view(1, 4, 1, 1) for values in family.normalisation(tmp_path).values())
    assert torch.allclose(mean, (posterior.mean - shift) / scale, atol=1e-6)
    assert torch.allclose(std, posterior.std / scale, atol=1e-6)
    assert torch.allclose(family.decode(vae, mean), vae.decode(posterior.mean).sample, atol=1e-5)


def small_unet(name: str) -> Any:
    common = {
        "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 96, "attention_head_dim": 4,
        "block_out_channels": (32, 64, 64),
    }  # fmt: skip
    if name == "stable-diffusion":
        return UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), **common,
        )  # fmt: skip
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=32 + 96, **common,
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("group", "dtype"), [("attention", torch.bfloat16), ("all-linear", torch.float32)])
def test_estimated_activations_are_what_autograd_keeps(name: str, group: str, dtype: torch.dtype) -> None:
    family = models.get(name)
    denoiser = small_unet(name).to(dtype).requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=4, target_modules=family.target_groups[group].suffixes))
    weights = {one.untyped_storage()._cdata for one in denoiser.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    text = {"embeds": torch.randn(77, 96).to(dtype), "pooled": torch.randn(32).to(dtype)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noisy = torch.randn(1, 4, 32, 32).to(dtype)
        family.predict(model_of(family, denoiser), noisy, torch.tensor([0.5]), conditions(family, [text], []))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    on_meta = small_unet(name).to("meta").requires_grad_(False)
    on_meta.add_adapter(LoraConfig(r=4, target_modules=family.target_groups[group].suffixes))
    num_blocks = len(memory.blocks(denoiser, family))
    estimates = [family.activations(one, 16, 77, dtype) for one in (denoiser, on_meta)]
    for estimate in estimates:
        # `outside` has room for gradients beside what is kept.
        assert measured <= num_blocks * estimate.block_saved + estimate.outside <= 1.25 * measured
        assert 0 < estimate.block_input < estimate.block_saved
    assert not any(handlers for module in denoiser.modules() for handlers in (module._forward_hooks, module._forward_pre_hooks))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "changes", [{"num_checkpointed": 2}, {"num_checkpointed": 4, "num_offloaded": 3}, {"attention": "math"}]
)
def test_a_unet_that_a_plan_was_carried_out_on_computes_what_it_did(
    tiny_models: Callable[[str], Path], name: str, changes: dict[str, Any]
) -> None:
    facts = {
        "device": "cpu", "budget_bytes": None, "dtype": "float32", "num_blocks": 4, "num_checkpointed": 0, "num_offloaded": 0,
        "base": "full", "sharding": "none", "attention": "native", "compile": False, "parts": {}, "total_bytes": 0,
        "host_bytes": 0, "reasons": (), "fits": True,
    }  # fmt: skip
    losses = []
    for plan in ({}, changes):
        trainer, _ = make_trainer(name, tiny_models(name), SigmaConfig())
        assert len(memory.blocks(trainer.model.denoiser, trainer.model.family)) == 4
        placement.after_method(trainer.model.denoiser, memory.MemoryPlan(**{**facts, **plan}), trainer.model.family, CPU)
        draw = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
        text = {
            "embeds": torch.randn(77, trainer.model.denoiser.config.cross_attention_dim, generator=draw),
            "pooled": torch.ones(16),
        }
        batch = Batch(
            latents_BCHW=latents, noise_BCHW=noise, sigma_B=trainer.model.schedule.sigmas[[0, 700]], weight_B=torch.ones(2),
            conditions=conditions(trainer.model.family, [text, text], []),
        )  # fmt: skip
        step = Step(batches=[(0, batch)], num_samples=2)
        losses.append([trainer.update(step).loss.item() for _ in range(3)])
    tolerance = 1e-5 if "attention" in changes else 0
    assert losses[1] == pytest.approx(losses[0], rel=tolerance, abs=0)
    assert losses[0][2] < losses[0][0]


def test_a_plan_counts_blocks_of_every_size() -> None:
    """The published SDXL U-Net with a LoRA: 2.57 billion parameters, and checkpointing saves most of what it keeps."""
    family = models.get("sdxl")
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ).requires_grad_(False)  # fmt: skip
    denoiser.add_adapter(LoraConfig(r=4, target_modules=family.target_groups["attention"].suffixes))
    gpu = Device(kind="cuda", name="a GPU", budget_bytes=80 << 30, capability=(9, 0))
    workload = Workload(height=128, width=128, text_tokens=77, micro_batch_size=1)
    settings = ({"checkpointing": "none"}, {"offload": 70})
    plain, saving = (
        memory.plan(model_of(family, denoiser), TrainConfig.model_validate({"memory": each}), workload, gpu)
        for each in settings
    )
    assert plain.num_blocks == saving.num_checkpointed == 70
    assert plain.parts["frozen weights"] == pytest.approx(2 * 2.567e9, rel=1e-3)
    assert saving.parts["activations"] < plain.parts["activations"] / 2
    # 2.2 billion of them lie in the blocks.
    assert saving.host_bytes == pytest.approx(2 * 2.2e9, rel=0.05)
