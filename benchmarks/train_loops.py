"""What `ftk train` is measured against, written without ftk: a loop by hand, and the loop of diffusers' own script.

As a program it trains with one of the two and prints, as JSON, the most memory that its process held.

Shape legend: B batch, C channels, H W latent cells, L text tokens, D text width.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from safetensors.torch import load_file

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one step takes, on the device already. `mask_BL` is None where all texts are of one length."""

    clean_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    sigma_B: torch.Tensor
    text_BLD: torch.Tensor
    mask_BL: torch.Tensor | None


class RawLoop:
    """The loop that one writes by hand: tensors in memory, no logging, nothing that is not the step."""

    def __init__(self, transformer: Any, parameters: Sequence[torch.nn.Parameter], rate: float) -> None:
        self.transformer, self.parameters = transformer, list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.01, fused=True)

    def step(self, sample: Sample) -> torch.Tensor:
        """Noise, pack, predict, unpack, squared error, backward, clip, update."""
        clean, noise = sample.clean_BCHW, sample.noise_BCHW
        batch, channels, height, width = clean.shape
        sigma = sample.sigma_B.to(clean.dtype).view(-1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        packed = noisy.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        output = self.transformer(
            hidden_states=packed.reshape(batch, (height // 2) * (width // 2), channels * 4),
            timestep=sample.sigma_B,
            encoder_hidden_states=sample.text_BLD,
            encoder_hidden_states_mask=sample.mask_BL,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        unpacked = output.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        prediction = unpacked.reshape(batch, channels, height, width)
        loss = F.mse_loss(prediction.float(), (noise - clean).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class DiffusersLoop:
    """One step as diffusers' script takes it with cached latents and texts, without accelerate and its progress bar.

    Source: diffusers 0.42, `examples/dreambooth/train_dreambooth_lora_qwen_image.py`, with diffusers' own helpers.
    """

    def __init__(self, transformer: Any, parameters: Sequence[torch.nn.Parameter], rate: float, model: Path) -> None:
        self.transformer, self.parameters = transformer, list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        self.rate = get_scheduler("constant", self.optimizer)
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler", shift=3.0)

    def sigmas(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The script's `get_sigmas`: each timestep is looked for in the table, which waits for the device."""
        sigmas = self.scheduler.sigmas.to(timesteps.device, dtype)
        schedule = self.scheduler.timesteps.to(timesteps.device)
        steps = [(schedule == t).nonzero().item() for t in timesteps]
        return sigmas[steps].flatten().view(-1, 1, 1, 1, 1)

    def step(self, sample: Sample) -> float:
        """Draw latents, noise and u; noise, pack, predict, unpack, weighted squared error, clip, update, log the loss."""
        mean = sample.clean_BCHW.unsqueeze(2)
        device, dtype = mean.device, mean.dtype
        # Its VAE's posterior, drawn, then normalised; here both are the identity, at the same cost.
        model_input = ((mean + 0.1 * torch.randn_like(mean)) - 0.0) * 1.0
        noise = torch.randn_like(model_input)
        batch, channels, _, height, width = model_input.shape
        u = compute_density_for_timestep_sampling("none", batch, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
        indices = (u * self.scheduler.config.num_train_timesteps).long()
        timesteps = self.scheduler.timesteps[indices].to(device)
        sigmas = self.sigmas(timesteps, dtype)
        noisy = (1.0 - sigmas) * model_input + sigmas * noise
        packed = QwenImagePipeline._pack_latents(noisy.permute(0, 2, 1, 3, 4), batch, channels, height, width)
        prediction = self.transformer(
            hidden_states=packed,
            encoder_hidden_states=sample.text_BLD,
            encoder_hidden_states_mask=sample.mask_BL,
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * batch,
            return_dict=False,
        )[0]
        prediction = QwenImagePipeline._unpack_latents(prediction, height * 8, width * 8, 8)
        weighting = compute_loss_weighting_for_sd3("none", sigmas)
        target = noise - model_input
        loss = torch.mean((weighting.float() * (prediction.float() - target.float()) ** 2).reshape(batch, -1), 1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        return loss.detach().item()


def load(model: Path, rank: int, targets: Sequence[str]) -> tuple[Any, list[torch.nn.Parameter]]:
    """The transformer with an adapter, and what of it is trained."""
    transformer = QwenImageTransformer2DModel.from_pretrained(model / "transformer", use_safetensors=True)
    transformer.requires_grad_(False).train()
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)))
    return transformer, [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def make_loop(kind: str, model: Path, rank: int, targets: Sequence[str], rate: float) -> RawLoop | DiffusersLoop:
    """`raw` or `diffusers`, on a transformer of its own."""
    transformer, parameters = load(model, rank, targets)
    return RawLoop(transformer, parameters, rate) if kind == "raw" else DiffusersLoop(transformer, parameters, rate, model)


def resident_bytes(fact: str) -> int:
    """Of this process, on Linux: `VmRSS` is now, `VmHWM` its greatest so far."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{fact}:"))
    return int(found.split()[1]) * 1024


def main() -> None:
    """Train, and print what memory it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=("raw", "diffusers"))
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path, help="safetensors: clean, noise, sigma, text and, where there is one, mask")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    imported = resident_bytes("VmRSS")
    loop = make_loop(options.kind, options.model, options.rank, ("to_q", "to_k", "to_v", "to_out.0"), 1e-4)
    found = load_file(options.samples)
    sample = Sample(
        clean_BCHW=found["clean"],
        noise_BCHW=found["noise"],
        sigma_B=found["sigma"],
        text_BLD=found["text"],
        mask_BL=found.get("mask"),
    )
    for _ in range(options.steps):
        loop.step(sample)
    print(json.dumps({"imported_bytes": imported, "peak_bytes": resident_bytes("VmHWM")}))


if __name__ == "__main__":
    main()
