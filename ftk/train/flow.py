"""The maths of flow matching: pure, generator passed in, no device choice, per-sample results.

sigma lies in [0, 1] and 1 is pure noise: x_sigma = (1 - sigma) x + sigma n, and the model predicts the velocity n - x.
Sources: Liu et al. 2022 (rectified flow, arXiv 2209.03003); Lipman et al. 2022 (flow matching, arXiv 2210.02747); samplers
and weightings: Esser et al. 2024 (arXiv 2403.03206), sections 3.1 and B, as diffusers' `training_utils` computes them.

Shape legend: B batch, C channels, H W latent cells.
"""

import math
from typing import Literal

import torch

Sampling = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]


def draw_u(
    sampling: Sampling,
    generator: torch.Generator,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> torch.Tensor:
    """One position u in [0, 1] of the training table, fp32 scalar; u = 0 is pure noise."""
    if sampling == "logit_normal":
        return torch.sigmoid(torch.randn((), generator=generator) * logit_std + logit_mean)
    u = torch.rand((), generator=generator)
    if sampling == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def sigma_at(u: torch.Tensor, table: torch.Tensor, shift: float | None = None) -> torch.Tensor:
    """The table's sigma at u: entry floor(N u) of N, any shape; `shift` s maps it to s sigma / (1 + (s - 1) sigma)."""
    index = (u * len(table)).long().clamp(0, len(table) - 1)
    sigma = table[index]
    return sigma if shift is None else shift * sigma / (1 + (shift - 1) * sigma)


def interpolate(clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """x_sigma, in the dtype of the latents: sigma is rounded to it first, as the reference step does."""
    sigma = sigma_B.to(clean_BCHW.dtype).view(-1, 1, 1, 1)
    return (1.0 - sigma) * clean_BCHW + sigma * noise_BCHW


def velocity(clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor) -> torch.Tensor:
    """The target n - x."""
    return noise_BCHW - clean_BCHW


def weight(sigma_B: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """[B] loss weights: sigma^-2 (`sigma_sqrt`), 2 / (pi (1 - 2 sigma + 2 sigma^2)) (`cosmap`), or 1."""
    if weighting == "sigma_sqrt":
        return sigma_B**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    return torch.ones_like(sigma_B)


def loss_per_sample(prediction_BCHW: torch.Tensor, target_BCHW: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """[B] fp32: the weighted squared error's mean over each sample's latent."""
    error = (prediction_BCHW.float() - target_BCHW.float()) ** 2
    return weight_B.float() * error.flatten(1).mean(1)
