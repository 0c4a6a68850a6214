"""Our training step against the reference: a straight re-implementation of diffusers' Qwen-Image LoRA script.

Source: diffusers 0.42, `examples/dreambooth/train_dreambooth_lora_qwen_image.py`, with diffusers' own helpers; x, noise and u
are given, so that the step alone is compared.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft import LoraConfig

from ftk.configs.schema import LossConfig, OptimizerConfig, PreservationConfig, SigmaConfig, TrainConfig
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Conditions
from ftk.train import optim
from ftk.train.data import Batch, Step
from ftk.train.loop import Trainer
from ftk.train.optim import MasterOptimizer

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
CPU = torch.device("cpu")


def make_inputs(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), 16, 8, 12)
    texts = [{"embeds": torch.randn(length, 16, generator=generator)} for length in lengths]
    u = torch.rand(len(lengths), generator=generator)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator), u, texts


class Reference:
    """The script's loop body, in its own words."""

    def __init__(self, model, state, weighting):
        self.transformer = QwenImageTransformer2DModel.from_pretrained(model / "transformer").requires_grad_(False)
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS)
        self.transformer.add_adapter(config)
        own = dict(self.transformer.named_parameters())
        for name, tensor in state.items():
            own[name].data.copy_(tensor)
        self.parameters = [own[name] for name in state]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler", shift=3.0)
        self.scheduler = copy.deepcopy(scheduler)
        self.weighting = weighting

    def sigmas(self, timesteps):
        steps = [(self.scheduler.timesteps == t).nonzero().item() for t in timesteps]
        return self.scheduler.sigmas[steps].flatten().view(-1, 1, 1, 1, 1)

    def step(self, clean, noise, u, texts, preserved=None):
        """Args: preserved: (texts, weight): the model without its adapter is the target for these, see ai-toolkit."""
        # the script's latents are [B, C, 1, H, W]; its packing permutes frames in front of channels
        model_input, noise = clean.unsqueeze(2), noise.unsqueeze(2)
        indices = (u * self.scheduler.config.num_train_timesteps).long()
        timesteps = self.scheduler.timesteps[indices]
        sigmas = self.sigmas(timesteps)
        noisy = (1.0 - sigmas) * model_input + sigmas * noise
        batch, channels, _, height, width = model_input.shape
        packed = QwenImagePipeline._pack_latents(noisy.permute(0, 2, 1, 3, 4), batch, channels, height, width)

        def predict(texts):
            longest = max(len(text["embeds"]) for text in texts)
            embeds = torch.zeros(batch, longest, 16)
            mask = torch.zeros(batch, longest, dtype=torch.long)
            for row, text in enumerate(texts):
                embeds[row, : len(text["embeds"])] = text["embeds"]
                mask[row, : len(text["embeds"])] = 1
            prediction = self.transformer(
                hidden_states=packed,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=None if mask.all() else mask,
                timestep=timesteps / 1000,
                img_shapes=[(1, height // 2, width // 2)] * batch,
                return_dict=False,
            )[0]
            return QwenImagePipeline._unpack_latents(prediction, height * 8, width * 8, 8)

        prediction = predict(texts)
        weighting = compute_loss_weighting_for_sd3(self.weighting, sigmas)
        target = noise - model_input
        loss = torch.mean((weighting.float() * (prediction.float() - target.float()) ** 2).reshape(batch, -1), 1).mean()
        loss.backward()
        if preserved is not None:
            self.transformer.disable_adapters()
            with torch.no_grad():
                kept = predict(preserved[0])
            self.transformer.enable_adapters()
            distance = weighting.float() * (predict(preserved[0]).float() - kept.float()) ** 2
            preservation = torch.mean(distance.reshape(batch, -1), 1).mean()
            (preserved[1] * preservation).backward()
            self.preservation = preservation.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def make_trainer(model, weighting, preservation=None):
    family, method = models.get("qwen-image"), methods.get("lora")
    loaded = models.load_model(family, model, (), torch.float32, CPU)
    settings = method.Config(rank=4, targets=tuple(TARGETS))
    parameters = method.attach(loaded, settings, seed=3)
    config = TrainConfig(
        learning_rate=1e-3,
        precision="fp32",
        sigma=SigmaConfig(weighting=weighting),
        optimizer=OptimizerConfig(weight_decay=1e-4),
        loss=LossConfig(preservation=preservation),
    )
    trainer = Trainer(
        model=loaded,
        method=method,
        optimizer=MasterOptimizer(parameters, config),
        schedule=optim.schedule(config.schedule, config.steps),
        config=config,
        device=CPU,
    )
    return trainer, {name: parameter.detach().clone() for name, parameter in parameters.items()}


def make_batch(family, table, clean, noise, u, texts):
    sigma = table[(u * len(table)).long()]
    weight = torch.ones(len(sigma))
    conditions = Conditions(texts=family.collate_texts(texts))
    return Batch(latents_BCHW=clean, noise_BCHW=noise, sigma_B=sigma, weight_B=weight, conditions=conditions)


def make_step(*batches):
    return Step(batches=list(enumerate(batches)), num_samples=sum(len(batch) for batch in batches))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("lengths", [[7], [5, 5], [3, 9]])
def test_three_optimizer_steps_give_the_reference_losses(tiny_model, weighting, lengths):
    trainer, state = make_trainer(tiny_model, weighting)
    reference = Reference(tiny_model, state, weighting)
    table = trainer.model.schedule.sigmas
    ours, theirs = [], []
    for step in range(3):
        inputs = make_inputs(step, lengths)
        ours.append(trainer.update(make_step(make_batch(trainer.model.family, table, *inputs))).loss.item())
        theirs.append(reference.step(*inputs))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert len({round(loss, 4) for loss in ours}) == 3
    for ours_now, theirs_now in zip(trainer.optimizer.weights().values(), reference.parameters, strict=True):
        assert torch.allclose(ours_now, theirs_now, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["none", "cosmap"])
def test_preserving_gives_the_steps_of_a_loop_that_switches_the_adapter_off(tiny_model, weighting):
    trainer, state = make_trainer(tiny_model, weighting, PreservationConfig(prompt="a dog", weight=0.7))
    reference, family = Reference(tiny_model, state, weighting), trainer.model.family
    ours, theirs = [], []
    for step in range(3):
        inputs, (_, _, _, others) = make_inputs(step, [3, 9]), make_inputs(step + 10, [6, 6])
        batch = make_batch(family, trainer.model.schedule.sigmas, *inputs)
        preserved = replace(batch, preserved=Conditions(texts=family.collate_texts(others)), preserved_B=torch.ones(2))
        result = trainer.update(make_step(preserved))
        ours.append((result.loss.item(), result.preservation_loss.item()))
        theirs.append((reference.step(*inputs, preserved=(others, 0.7)), reference.preservation))
    assert np.array(ours) == pytest.approx(np.array(theirs), rel=1e-4, abs=1e-12)
    # An adapter begins as nothing: the first step is at the base model exactly.
    assert ours[0][1] == 0
    assert ours[2][1] > 0
    for ours_now, theirs_now in zip(trainer.optimizer.weights().values(), reference.parameters, strict=True):
        assert torch.allclose(ours_now, theirs_now, rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad for parameter in trainer.optimizer.parameters.values())


def test_samples_that_take_no_part_are_not_preserved(tiny_model):
    trainer, _ = make_trainer(tiny_model, "none", PreservationConfig(prompt="a dog"))
    family, table = trainer.model.family, trainer.model.schedule.sigmas
    with torch.no_grad():
        for parameter in trainer.optimizer.parameters.values():
            parameter += 0.1
    batch = make_batch(family, table, *make_inputs(0, [3, 9]))
    batch = replace(batch, preserved=batch.conditions, preserved_B=torch.tensor([0.0, 1.0]))
    losses_B = trainer.preservation_losses(batch)
    assert losses_B[0] == 0 < losses_B[1]
    first, second = (trainer.update(make_step(batch)).preservation_loss for _ in range(2))
    assert first == pytest.approx(float(losses_B[1].detach()), rel=1e-6)
    nothing = trainer.update(make_step(replace(batch, preserved=None, preserved_B=None)))
    assert torch.isnan(nothing.preservation_loss)
    assert second != first


def test_the_schedulers_table_is_plain_although_a_shift_is_asked_for(tiny_model):
    table = models.get("qwen-image").load_schedule(tiny_model).sigmas
    assert torch.allclose(table, torch.arange(1000, 0, -1) / 1000)


def test_a_padded_batch_equals_its_samples_alone(tiny_model):
    trainer, _ = make_trainer(tiny_model, "none")
    table = trainer.model.schedule.sigmas
    clean, noise, u, texts = make_inputs(0, [4, 11, 7])
    together = trainer.losses(make_batch(trainer.model.family, table, clean, noise, u, texts))
    for row in range(3):
        one = slice(row, row + 1)
        alone = trainer.losses(make_batch(trainer.model.family, table, clean[one], noise[one], u[one], texts[one]))
        assert together[row].item() == pytest.approx(alone.item(), rel=1e-6)


def test_padding_without_its_mask_would_be_noticed(tiny_model):
    trainer, _ = make_trainer(tiny_model, "none")
    table = trainer.model.schedule.sigmas
    batch = make_batch(trainer.model.family, table, *make_inputs(0, [4, 11]))
    unmasked = replace(batch, conditions=Conditions(texts={**batch.conditions.texts, "mask": None}))
    difference = (trainer.losses(batch) - trainer.losses(unmasked)).abs()
    assert difference[0] > 1e-4
    assert difference[1] < 1e-6


def test_uneven_micro_batches_weigh_each_sample_alike(tiny_model):
    whole, _ = make_trainer(tiny_model, "none")
    parts, _ = make_trainer(tiny_model, "none")
    table = whole.model.schedule.sigmas
    clean, noise, u, texts = make_inputs(0, [6, 6, 6])
    one = whole.update(make_step(make_batch(whole.model.family, table, clean, noise, u, texts)))
    halves = [
        make_batch(parts.model.family, table, clean[part], noise[part], u[part], texts[part])
        for part in (slice(2), slice(2, 3))
    ]
    two = parts.update(make_step(*halves))
    assert one.loss.item() == pytest.approx(two.loss.item(), rel=1e-6)
    assert one.grad_norm.item() == pytest.approx(two.grad_norm.item(), rel=1e-5)
    assert (one.num_samples, two.num_samples) == (3, 3)
