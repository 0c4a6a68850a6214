"""The maths of a training step: pure, generator passed in, no device choice, per-sample results.

sigma lies in [0, 1] and 1 is pure noise: x_sigma = signal x + sigma n. In flow matching the signal is 1 - sigma, and the model
predicts the velocity n - x; in diffusion it is sqrt(1 - sigma^2), and the model predicts n, or v = signal n - sigma x.
Sources: Liu et al. 2022 (rectified flow, arXiv 2209.03003); Lipman et al. 2022 (flow matching, arXiv 2210.02747); samplers
and weightings: Esser et al. 2024 (arXiv 2403.03206), sections 3.1 and B, as diffusers' `training_utils` computes them; Ho et
al. 2020 (diffusion, arXiv 2006.11239), equations 4 and 14; v: Salimans and Ho 2022 (arXiv 2202.00512), section D.

Shape legend: B batch, C channels, H W latent cells.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ftk.models.components.schedule import Objective, TokenShift

Sampling = Literal["uniform", "logit_normal", "sigmoid", "mode", "beta"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]
SnrWeighting = Literal["min_snr", "soft_min_snr", "debiased", "like_epsilon"]
HuberSchedule = Literal["exponential", "snr"]

_BELOW_1 = 1 - 2.0**-24
SMALLEST_WEIGHTED_SIGMA = 2.0**-10
"""Smaller sigmas weigh as this one does. Below 1/1000, the end of the usual training table, also when rounded to bf16."""
LEAST_SNR, MOST_SNR = 1e-4, 1e3
"""Bounds of the signal-to-noise ratio where a weight would otherwise be infinite; tables of usual models reach 0.0047."""
_BETA_POINTS = 2**16
_BETA_LOGIT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaDistribution:
    """The noise levels that training draws, as a map of uniform numbers: equal shares of [0, 1) have equal probability.

    A number becomes a position in `table` [N] by the quantile function of the sampling; 0 is the table's start, noise. There
    stands sigma: the entry at it, or, `continuous`, what lies between two entries (behind the last one comes 0). Then sigma
    is shifted, by a number or by an image's tokens, and at last squeezed linearly into [minimum, maximum].

    Attributes:
        logit_mean, logit_std: of `logit_normal`: the position is sigmoid(mean + std n), so a mean above 0 means less noise.
        sigmoid_scale: of `sigmoid`: the position is sigmoid(scale n).
        mode_scale: of `mode`: Esser et al. 2024, equation 20, at the position.
        beta_alpha, beta_beta: of `beta`: sigma itself follows Beta(alpha, beta), so alpha above 1 thins out clean images
            and beta above 1 thins out noise.
    """

    table: torch.Tensor
    sampling: Sampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    sigmoid_scale: float = 1.0
    mode_scale: float = 1.29
    beta_alpha: float = 1.0
    beta_beta: float = 1.0
    shift: float | TokenShift | None = None
    minimum: float = 0.0
    maximum: float = 1.0
    continuous: bool = False

    def sigma(self, u_B: torch.Tensor, tokens: int) -> torch.Tensor:
        """sigma [B] fp32 of uniform numbers in [0, 1], for images of this many tokens (latent cells / patch^2)."""
        position_B = self.position(u_B)
        table = self.table.to(u_B.device)
        sigma_B = between_at(position_B, table) if self.continuous else sigma_at(position_B, table)
        factor = math.exp(self.shift.mu(tokens)) if isinstance(self.shift, TokenShift) else self.shift
        sigma_B = sigma_B if factor is None else shifted(sigma_B, factor)
        return self.minimum + (self.maximum - self.minimum) * sigma_B

    def position(self, u: torch.Tensor) -> torch.Tensor:
        """The position in [0, 1] of the table; what is computed is computed in float64."""
        if self.sampling == "uniform":
            return u
        u = u.double()
        if self.sampling == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        if self.sampling == "beta":
            # The position is 1 - sigma, and 1 - Beta(a, b) is Beta(b, a).
            return beta_quantile(u, self.beta_beta, self.beta_alpha)
        is_logit_normal = self.sampling == "logit_normal"
        mean, std = (self.logit_mean, self.logit_std) if is_logit_normal else (0.0, self.sigmoid_scale)
        return torch.sigmoid(torch.special.ndtri(u) * std + mean)


def sigma_at(position: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The table's sigma at a position: entry floor(N position) of N, any shape."""
    return table[(position * len(table)).long().clamp(0, len(table) - 1)]


def between_at(position: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The table's sigma at N position, interpolated linearly between its entries [N] and 0 behind them: in (0, 1]."""
    ends = torch.cat([table.double(), table.new_zeros(1, dtype=torch.float64)])
    place = position.double().clamp(0, _BELOW_1) * len(table)
    entry = place.long().clamp(max=len(table) - 1)
    return torch.lerp(ends[entry], ends[entry + 1], place - entry).to(table.dtype)


def shifted(sigma: torch.Tensor, factor: float) -> torch.Tensor:
    """s sigma / (1 + (s - 1) sigma). With s = exp(mu) that is diffusers' exponential time shift: Esser et al., equation 23."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def beta_quantile(u: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """x in [0, 1] below which a share u of the beta distribution lies; float64, within 1e-6 for exponents of 0.05 to 1000."""
    cumulative, logit = (values.to(u.device) for values in _beta_table(alpha, beta))
    u = u.double().contiguous()
    right = torch.searchsorted(cumulative, u).clamp(1, len(cumulative) - 1)
    below, above = cumulative[right - 1], cumulative[right]
    share = ((u - below) / (above - below).clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return torch.sigmoid(torch.lerp(logit[right - 1], logit[right], share))


@lru_cache(maxsize=8)
def _beta_table(alpha: float, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The cumulative distribution over evenly spaced logits of x.

    Over t = logit(x) the density is x^alpha (1-x)^beta: smooth and bounded where that over x is not, for exponents below 1.
    The tails outside the grid, x^alpha / alpha and its mirror image, have closed forms there.
    """
    logit = torch.linspace(-_BETA_LOGIT, _BETA_LOGIT, _BETA_POINTS, dtype=torch.float64)
    log_density = alpha * torch.nn.functional.logsigmoid(logit) + beta * torch.nn.functional.logsigmoid(-logit)
    density = torch.exp(log_density - log_density.max())
    cells = torch.cumulative_trapezoid(density, logit)
    cumulative = torch.cat([cells.new_zeros(1), cells]) + density[0] / alpha
    return cumulative / (cumulative[-1] + density[-1] / beta), logit


def interpolate(
    clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, signal_B: torch.Tensor, sigma_B: torch.Tensor
) -> torch.Tensor:
    """x_sigma = signal x + sigma n, in the dtype of all four: `NoiseSchedule.scales` gives the last two."""
    return signal_B.view(-1, 1, 1, 1) * clean_BCHW + sigma_B.view(-1, 1, 1, 1) * noise_BCHW


def target(
    objective: Objective, clean_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, signal_B: torch.Tensor, sigma_B: torch.Tensor
) -> torch.Tensor:
    """What the model is to predict: n - x (`flow`), n (`epsilon`), or signal n - sigma x (`v`)."""
    if objective == "flow":
        return noise_BCHW - clean_BCHW
    if objective == "epsilon":
        return noise_BCHW
    return signal_B.view(-1, 1, 1, 1) * noise_BCHW - sigma_B.view(-1, 1, 1, 1) * clean_BCHW


def min_snr_weight(signal_B: torch.Tensor, sigma_B: torch.Tensor, objective: Objective, gamma: float) -> torch.Tensor:
    """[B] loss weights of diffusion: with SNR = (signal / sigma)^2, min(SNR, gamma) / SNR, for v over SNR + 1; sigma above 0.

    Source: Hang et al. 2023 (min-SNR weighting, arXiv 2303.09556), section 3.4. Pure noise has SNR 0: weight 1, and 0 for v.
    """
    snr_B = (signal_B / sigma_B) ** 2
    if objective == "v":
        return snr_B.clamp(max=gamma) / (snr_B + 1)
    return (gamma / snr_B).clamp(max=1.0)


def snr_weight(
    signal_B: torch.Tensor, sigma_B: torch.Tensor, objective: Objective, weighting: SnrWeighting, gamma: float
) -> torch.Tensor:
    """[B] loss weights of diffusion by SNR = (signal / sigma)^2; sigma above 0.

    `min_snr`: see `min_snr_weight`. `soft_min_snr`: the same with a smooth minimum, SNR gamma / (SNR + gamma) (Crowson et al.
    2024, arXiv 2401.11605, section 4.3). `debiased`: 1 / sqrt(SNR) (Yu et al. 2023, arXiv 2310.08442), for v 1 / (SNR + 1),
    with SNR between `LEAST_SNR` and `MOST_SNR`. `like_epsilon`: SNR / (SNR + 1), which turns a loss of v into one of the
    noise, with SNR at most `MOST_SNR`. The last two are those of sd-scripts, and so is the upper bound.
    """
    if weighting == "min_snr":
        return min_snr_weight(signal_B, sigma_B, objective, gamma)
    snr_B = (signal_B / sigma_B) ** 2
    if weighting == "soft_min_snr":
        return gamma / (snr_B + gamma) * (snr_B / (snr_B + 1) if objective == "v" else 1.0)
    if weighting == "like_epsilon":
        bounded_B = snr_B.clamp(max=MOST_SNR)
        return bounded_B / (bounded_B + 1)
    bounded_B = snr_B.clamp(LEAST_SNR, MOST_SNR)
    return 1 / (bounded_B + 1) if objective == "v" else bounded_B.rsqrt()


def huber_deltas(
    delta: float, schedule: HuberSchedule, signal_B: torch.Tensor, sigma_B: torch.Tensor, time_B: torch.Tensor
) -> torch.Tensor:
    """[B] the delta of `loss_per_sample` at noise levels, from `delta` for pure noise to 1 without noise.

    `exponential`: delta^t, t in [0, 1] the share of the training table. `snr`: (1 - delta) / (1 + sigma / signal)^2 + delta.
    Source: Khrapov et al. 2024 (arXiv 2403.16728), section 3, as sd-scripts computes them.
    """
    if schedule == "exponential":
        return torch.exp(math.log(delta) * time_B)
    # Without the division: signal may be 0.
    return (1 - delta) * (signal_B / (signal_B + sigma_B)) ** 2 + delta


def pyramid_noise(noise_CHW: torch.Tensor, levels: int, discount: float, generator: torch.Generator) -> torch.Tensor:
    """[C,H,W] noise plus layers of noise, each coarser by a random factor's power and weighted by the discount's power.

    The result has a standard deviation of 1. Source: Whitaker 2023 (multi-resolution noise), as sd-scripts computes it, but
    with a deviation of each sample's own instead of one over its batch.
    """
    height, width = noise_CHW.shape[-2:]
    for level in range(levels):
        factor = (float(torch.rand((), generator=generator)) * 2 + 2) ** level
        sides = max(1, int(height / factor)), max(1, int(width / factor))
        layer = torch.randn(1, len(noise_CHW), *sides, generator=generator)
        upsampled = torch.nn.functional.interpolate(layer, (height, width), mode="bilinear", align_corners=False)
        noise_CHW = noise_CHW + upsampled[0] * discount**level
        if 1 in sides:
            break
    return noise_CHW / noise_CHW.std()


def weight(sigma_B: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """[B] loss weights: sigma^-2 (`sigma_sqrt`), 2 / (pi (1 - 2 sigma + 2 sigma^2)) (`cosmap`), or 1.

    For sigma^-2, sigma is at least `SMALLEST_WEIGHTED_SIGMA`: a weight is at most 2^20, and never infinite.
    """
    if weighting == "sigma_sqrt":
        return sigma_B.clamp(min=SMALLEST_WEIGHTED_SIGMA) ** -2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    return torch.ones_like(sigma_B)


def loss_per_sample(
    prediction_BCHW: torch.Tensor,
    target_BCHW: torch.Tensor,
    weight_B: torch.Tensor,
    cell_weight_BHW: torch.Tensor | None = None,
    huber_delta: float | torch.Tensor | None = None,
    is_absolute: bool = False,
) -> torch.Tensor:
    """[B] fp32: the weight times the mean error over each sample's latent.

    Args:
        cell_weight_BHW: 0 or more; the mean is weighted with it and divided by its sum. A sample without any weight has 0.
        huber_delta: the error e counts e^2, or with a delta pseudo-Huber (Charbonnier et al. 1997), 2 delta (sqrt(e^2 +
            delta^2) - delta), as diffusers' scripts scale it: e^2 for small errors and for delta to infinity, 2 delta |e|
            for large errors. A tensor [B] has each sample's own.
        is_absolute: the error e counts |e| instead.
    """
    difference = prediction_BCHW.float() - target_BCHW.float()
    error = difference.abs() if is_absolute else difference**2
    if huber_delta is not None:
        if isinstance(huber_delta, torch.Tensor):
            huber_delta = huber_delta.view(-1, 1, 1, 1)
        # The same without the difference, in which small errors would be lost.
        error = 2 * error / (1 + torch.sqrt(1 + error / huber_delta**2))
    if cell_weight_BHW is None:
        return weight_B.float() * error.flatten(1).mean(1)
    cell_weight_BHW = cell_weight_BHW.float()
    total_B = cell_weight_BHW.flatten(1).sum(1)
    sum_B = (cell_weight_BHW * error.mean(1)).flatten(1).sum(1)
    return weight_B.float() * sum_B / torch.where(total_B > 0, total_B, 1)
