import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

from ftk.models import base as models
from ftk.models.components.schedule import NoiseSchedule, TokenShift
from ftk.train import flow
from ftk.train.flow import SigmaDistribution

TABLE = torch.arange(1000, 0, -1) / 1000
QWEN = TokenShift(base_tokens=256, max_tokens=8192, base_shift=0.5, max_shift=0.9)
EXTREMES = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
ALL = [
    {"sampling": "uniform"},
    {"sampling": "logit_normal", "logit_mean": 0.7, "logit_std": 3.0},
    {"sampling": "sigmoid", "sigmoid_scale": 4.0},
    {"sampling": "mode", "mode_scale": 1.29},
    {"sampling": "beta", "beta_alpha": 0.5, "beta_beta": 30.0},
]


def shares(number):
    """The middles of so many equal shares of [0, 1)."""
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


def test_sigma_is_the_tables_entry_and_u_zero_is_noise():
    u = torch.tensor([0.0, 0.0005, 0.5, 0.9999, 1.0])
    assert flow.sigma_at(u, TABLE).tolist() == pytest.approx([1.0, 1.0, 0.5, 0.001, 0.001])
    assert torch.equal(SigmaDistribution(table=TABLE).sigma(u, tokens=64), flow.sigma_at(u, TABLE))


@pytest.mark.parametrize("sampling", ["logit_normal", "mode"])
def test_samplers_agree_with_diffusers_in_distribution(sampling):
    ours = SigmaDistribution(table=TABLE, sampling=sampling, logit_mean=0.3, logit_std=0.8, mode_scale=1.1)
    theirs = compute_density_for_timestep_sampling(
        sampling, 20_000, logit_mean=0.3, logit_std=0.8, mode_scale=1.1, generator=torch.Generator().manual_seed(1)
    )
    assert (ours.position(shares(20_000)).sort().values - theirs.double().sort().values).abs().max() < 0.03


def test_a_position_above_the_logits_mean_has_half_of_the_probability():
    logit_normal = SigmaDistribution(table=TABLE, sampling="logit_normal", logit_mean=0.7, logit_std=2.0)
    assert logit_normal.position(torch.tensor(0.5)).item() == pytest.approx(1 / (1 + math.exp(-0.7)))
    # one standard deviation above
    assert logit_normal.position(torch.tensor(0.8413447461, dtype=torch.float64)).item() == pytest.approx(
        1 / (1 + math.exp(-2.7))
    )
    sigmoid = SigmaDistribution(table=TABLE, sampling="sigmoid", sigmoid_scale=3.0)
    assert sigmoid.position(torch.tensor(0.8413447461, dtype=torch.float64)).item() == pytest.approx(1 / (1 + math.exp(-3)))


@pytest.mark.parametrize(
    ("alpha", "beta", "quantile"),
    [
        (1.0, 1.0, lambda u: u),
        (2.0, 1.0, lambda u: u**0.5),
        (1.0, 2.0, lambda u: 1 - (1 - u) ** 0.5),
        (0.5, 0.5, lambda u: torch.sin(math.pi * u / 2) ** 2),
        (0.05, 1.0, lambda u: u**20),
        (1.0, 0.05, lambda u: 1 - (1 - u) ** 20),
        (1000.0, 1.0, lambda u: u**0.001),
    ],
)
def test_beta_quantiles_have_their_closed_forms(alpha, beta, quantile):
    u = torch.cat([shares(50_000), EXTREMES.double()])
    assert (flow.beta_quantile(u, alpha, beta) - quantile(u)).abs().max() < 1e-6


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 5.0), (0.6, 0.6), (3.0, 0.8), (400.0, 700.0)])
def test_beta_quantiles_agree_with_samples(alpha, beta):
    number = 200_000
    torch.manual_seed(0)
    drawn = torch.distributions.Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64))
    samples = drawn.sample((number,)).sort().values
    ours = flow.beta_quantile(shares(number), alpha, beta)
    assert (ours - samples).abs().max() < 0.03
    assert (ours - samples).abs().mean() < 0.002
    assert ours.mean().item() == pytest.approx(alpha / (alpha + beta), abs=1e-5)
    variance = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert ours.var().item() == pytest.approx(variance, rel=1e-3)


def test_beta_is_of_sigma():
    thins_out_clean_images = SigmaDistribution(table=TABLE, sampling="beta", beta_alpha=3.0, beta_beta=1.0, continuous=True)
    sigma = thins_out_clean_images.sigma(shares(10_000), tokens=64)
    assert sigma.mean().item() == pytest.approx(0.75, abs=1e-3)
    assert (sigma < 0.5).float().mean().item() == pytest.approx(0.125, abs=1e-3)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings["sampling"])
def test_extreme_numbers_give_sigmas_within_the_table(settings, continuous):
    sigma = SigmaDistribution(table=TABLE, continuous=continuous, **settings).sigma(EXTREMES, tokens=64)
    assert sigma.dtype == torch.float32
    assert torch.isfinite(sigma).all()
    assert (sigma > 0).all()
    assert (sigma <= 1).all()
    assert sigma.max() > 0.99
    assert sigma.min() < 0.1


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings["sampling"])
def test_equal_shares_of_numbers_are_equal_shares_of_the_distribution(settings):
    """Quantile functions are monotone: strata of u are strata of sigma."""
    position = SigmaDistribution(table=TABLE, **settings).position(shares(5000))
    steps = position.diff()
    assert (steps >= 0).all() or (steps <= 0).all()


def test_continuous_sigmas_lie_between_the_entries_and_reach_towards_zero():
    continuous = SigmaDistribution(table=TABLE, continuous=True)
    u = shares(7777)
    assert torch.allclose(continuous.sigma(u, tokens=64).double(), 1 - u, atol=1e-6)
    table = torch.tensor([1.0, 0.6, 0.4])
    sigma = flow.between_at(torch.tensor([0.0, 0.5 / 3, 1 / 3, 1.5 / 3, 2.5 / 3, 1.0]), table)
    assert sigma.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.5, 0.2, 0.0], abs=1e-6)
    assert sigma.min() > 0
    assert len(set(continuous.sigma(u, tokens=64).tolist())) > 7000
    assert len(set(SigmaDistribution(table=TABLE).sigma(u, tokens=64).tolist())) == 1000


def test_a_static_shift_has_its_closed_form():
    shifted = SigmaDistribution(table=TABLE, shift=3.0)
    assert shifted.sigma(torch.tensor([0.0, 0.5]), tokens=64).tolist() == pytest.approx([1.0, 0.75])
    assert torch.equal(flow.shifted(TABLE, 1.0), TABLE)


@pytest.mark.parametrize("tokens", [64, 256, 4096, 8192, 10_000])
def test_a_shift_by_resolution_is_that_of_the_scheduler(tokens):
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    assert QWEN.mu(tokens) == pytest.approx(mu)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    distribution = SigmaDistribution(table=TABLE, shift=QWEN)
    ours = distribution.sigma((torch.arange(1000) + 0.5) / 1000, tokens)
    assert torch.allclose(ours, scheduler.time_shift(mu, 1.0, TABLE), atol=1e-6)


def test_more_tokens_mean_more_noise():
    small, large = (SigmaDistribution(table=TABLE, shift=QWEN).sigma(torch.tensor([0.5]), tokens) for tokens in (256, 4096))
    assert 0.5 < small < large


def test_sigmas_are_squeezed_after_the_shift():
    distribution = SigmaDistribution(table=TABLE, shift=3.0, minimum=0.2, maximum=0.6)
    assert distribution.sigma(torch.tensor([0.0, 0.5]), tokens=64).tolist() == pytest.approx([0.6, 0.2 + 0.4 * 0.75])


def test_the_family_reads_the_token_shift_of_its_scheduler(tmp_path):
    family = models.get("qwen-image")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192
    ).save_pretrained(tmp_path / "scheduler")
    assert family.load_schedule(tmp_path).token_shift == QWEN
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    schedule = family.load_schedule(tmp_path)
    # A static shift is in the table already.
    assert schedule.token_shift is None
    assert torch.allclose(schedule.sigmas, flow.shifted(TABLE, 3.0))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_equal_diffusers(weighting):
    sigma = torch.cat([TABLE, TABLE.bfloat16().float()])
    assert torch.equal(flow.weight(sigma, weighting), compute_loss_weighting_for_sd3(weighting, sigma).float())


def test_no_weight_is_infinite():
    weights = flow.weight(torch.tensor([0.0, 1e-8, 2.0**-10, 1.0]), "sigma_sqrt")
    assert weights.tolist() == [2.0**20, 2.0**20, 2.0**20, 1.0]


def test_cosmap_integrates_to_one():
    # 2 / pi * integral of 1 / (1 - 2 s + 2 s^2) over [0, 1] is (2 / pi) (pi / 2)
    assert flow.weight(shares(100_000), "cosmap").mean().item() == pytest.approx(1.0, rel=1e-6)


def test_the_path_ends_at_data_and_at_noise_and_its_slope_is_the_target():
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    schedule = NoiseSchedule(objective="flow", sigmas=TABLE)
    at = lambda s: flow.interpolate(clean, noise, *schedule.scales(torch.full((2,), s), torch.float64))  # noqa: E731
    assert torch.equal(at(0.0), clean)
    assert torch.equal(at(1.0), noise)
    slope = (at(0.75) - at(0.25)) / 0.5
    half = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.allclose(slope, flow.target("flow", clean, noise, half, half), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_path_of_flow_matching_keeps_its_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 16, 8, 12, generator=generator).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.001, 0.3337, 1.0])
    rounded = sigma.to(dtype).view(-1, 1, 1, 1)
    scales = NoiseSchedule(objective="flow", sigmas=TABLE).scales(sigma, dtype)
    assert torch.equal(flow.interpolate(clean, noise, *scales), (1.0 - rounded) * clean + rounded * noise)
    assert torch.equal(flow.target("flow", clean, noise, *scales), noise - clean)


def test_noise_and_v_give_back_what_was_noised():
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.99], dtype=torch.float64)
    signal = (1 - sigma**2).sqrt()
    noisy = flow.interpolate(clean, noise, signal, sigma)
    signal_, sigma_ = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    epsilon, v = (flow.target(objective, clean, noise, signal, sigma) for objective in ("epsilon", "v"))
    assert torch.allclose((noisy - sigma_ * epsilon) / signal_, clean, atol=1e-12)
    assert torch.allclose(signal_ * noisy - sigma_ * v, clean, atol=1e-12)
    assert torch.allclose(sigma_ * noisy + signal_ * v, noise, atol=1e-12)


@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_min_snr_weights_equal_diffusers(objective):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    times = torch.arange(1000)
    snr = compute_snr(scheduler, times)
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / (snr + (1 if objective == "v" else 0))
    signal, sigma = scheduler.alphas_cumprod**0.5, (1 - scheduler.alphas_cumprod) ** 0.5
    assert torch.allclose(flow.min_snr_weight(signal, sigma, objective, 5.0), expected, rtol=1e-6)


def test_min_snr_weights_of_pure_noise_are_finite():
    zero, one = torch.zeros(1), torch.ones(1)
    assert flow.min_snr_weight(zero, one, "epsilon", 5.0).item() == 1.0
    assert flow.min_snr_weight(zero, one, "v", 5.0).item() == 0.0


def levels_of_stable_diffusion():
    """(signal, sigma, SNR) of each entry of the usual table, in float64."""
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    return alphas**0.5, (1 - alphas) ** 0.5, alphas / (1 - alphas)


def test_relatives_of_min_snr_equal_the_formulas_of_their_papers():
    signal, sigma, snr = levels_of_stable_diffusion()

    def weight(name, objective):
        return flow.snr_weight(signal, sigma, objective, name, 4.0)

    # The weight of a loss on the image itself, 1 / (sigma^2 / signal^2 + 1 / gamma), carried over to noise and v.
    soft = 1 / (1 / snr + 1 / 4.0)
    assert torch.allclose(weight("soft_min_snr", "epsilon"), soft / snr, rtol=1e-6)
    assert torch.allclose(weight("soft_min_snr", "v"), soft / (snr + 1), rtol=1e-6)
    # As sd-scripts has them, where no SNR is above 1000.
    bounded = snr.clamp(max=1000)
    assert torch.allclose(weight("debiased", "epsilon"), 1 / bounded.sqrt(), rtol=1e-6)
    assert torch.allclose(weight("debiased", "v"), 1 / (bounded + 1), rtol=1e-6)
    assert torch.allclose(weight("like_epsilon", "v"), bounded / (bounded + 1), rtol=1e-6)
    assert torch.equal(weight("min_snr", "v"), flow.min_snr_weight(signal, sigma, "v", 4.0))


def test_a_loss_of_v_weighted_like_epsilon_is_the_loss_of_the_noise():
    clean, noise, guess = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signal, sigma = torch.tensor([0.9, 0.3], dtype=torch.float64), torch.tensor([0.19**0.5, 0.91**0.5], dtype=torch.float64)
    v = flow.target("v", clean, noise, signal, sigma)
    noisy = flow.interpolate(clean, noise, signal, sigma)
    noise_guessed = signal.view(-1, 1, 1, 1) * guess + sigma.view(-1, 1, 1, 1) * noisy
    expected = ((noise_guessed - noise) ** 2).mean((1, 2, 3))
    weight = flow.snr_weight(signal, sigma, "v", "like_epsilon", 5.0)
    assert torch.allclose(flow.loss_per_sample(guess, v, weight).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["soft_min_snr", "debiased", "like_epsilon"])
@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_no_weight_of_pure_noise_is_infinite(weighting, objective):
    assert torch.isfinite(flow.snr_weight(torch.zeros(1), torch.ones(1), objective, weighting, 5.0)).all()


def test_l1_and_smooth_l1_equal_their_closed_forms():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    difference, weight, delta = (prediction - target).double(), torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.1, 0.5, 1.0])
    absolute = flow.loss_per_sample(prediction, target, weight, is_absolute=True)
    assert torch.allclose(absolute.double(), weight * difference.abs().mean((1, 2, 3)), rtol=1e-6)
    # As sd-scripts and diffusers scale it: 2 (sqrt(e^2 + delta^2) - delta).
    smooth = flow.loss_per_sample(prediction, target, weight / delta, huber_delta=delta)
    wide = delta.double().view(-1, 1, 1, 1)
    expected = weight * (2 * ((difference**2 + wide**2).sqrt() - wide)).mean((1, 2, 3))
    assert torch.allclose(smooth.double(), expected, rtol=1e-5)


def test_schedules_of_huber_are_those_of_sd_scripts():
    signal, sigma, snr = levels_of_stable_diffusion()
    share = torch.arange(1000, dtype=torch.float64) / 1000
    exponential = flow.huber_deltas(0.1, "exponential", signal, sigma, share)
    assert torch.allclose(exponential, torch.exp(-(-math.log(0.1) / 1000) * torch.arange(1000).double()))
    ratio = (1 / snr) ** 0.5
    assert torch.allclose(flow.huber_deltas(0.1, "snr", signal, sigma, share), (1 - 0.1) / (1 + ratio) ** 2 + 0.1)
    assert flow.huber_deltas(0.1, "snr", torch.zeros(1), torch.ones(1), share).item() == pytest.approx(0.1)


def test_pyramid_noise_has_unit_variance_and_coarse_structure():
    def smoothness(levels):
        generator = torch.Generator().manual_seed(0)
        noise = flow.pyramid_noise(torch.randn(8, 64, 48, generator=generator), levels, 0.6, generator)
        assert noise.shape == (8, 64, 48)
        assert noise.std().item() == pytest.approx(1, abs=1e-5)
        return (noise[:, 1:] * noise[:, :-1]).mean().item()

    assert abs(smoothness(1)) < 0.02  # one level is as fine as the noise itself
    assert 0.05 < smoothness(3) < smoothness(16) < 0.5


def test_loss_is_a_mean_over_each_sample_alone():
    prediction, target = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    target[1] *= 3
    loss = flow.loss_per_sample(prediction, target, torch.tensor([1.0, 0.5]))
    assert loss.tolist() == [1.0, 4.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_loss_keeps_its_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 16, 8, 12, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(3, generator=generator)
    expected = weight.float() * ((prediction.float() - target.float()) ** 2).flatten(1).mean(1)
    assert torch.equal(flow.loss_per_sample(prediction, target, weight), expected)


def test_cells_count_by_their_weight_and_none_at_all_is_no_loss():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 2, 3, 4, generator=generator, requires_grad=True)
    target, cells = torch.randn(3, 2, 3, 4, generator=generator), torch.rand(3, 3, 4, generator=generator)
    cells[1], cells[2] = 0, 0.25
    loss = flow.loss_per_sample(prediction, target, torch.tensor([2.0, 1.0, 1.0]), cell_weight_BHW=cells)
    error = (prediction.double() - target.double()).detach() ** 2
    first = sum(
        cells[0, row, column].item() * error[0, :, row, column].mean().item() for row in range(3) for column in range(4)
    )
    assert loss[0].item() == pytest.approx(2 * first / cells[0].double().sum().item(), rel=1e-5)
    assert loss[1].item() == 0
    assert loss[2].item() == pytest.approx(error[2].mean().item(), rel=1e-5)
    loss.sum().backward()
    assert torch.isfinite(prediction.grad).all()
    assert (prediction.grad[1] == 0).all()


def test_huber_is_a_square_for_small_errors_and_a_line_for_large_ones():
    def of(error, delta):
        return flow.loss_per_sample(torch.full((1, 1, 1, 1), error), torch.zeros(1, 1, 1, 1), torch.ones(1), None, delta).item()

    assert of(1e-4, 0.1) == pytest.approx(1e-8, rel=1e-5)
    assert of(1000.0, 0.1) == pytest.approx(2 * 0.1 * 1000, rel=1e-3)
    for error in (0.01, 0.1, 0.3, 2.0):
        assert of(error, 0.1) == pytest.approx(2 * 0.1 * (math.sqrt(error**2 + 0.1**2) - 0.1), rel=1e-4)
        assert of(error, 1e12) == pytest.approx(error**2, rel=1e-6)


def test_huber_has_the_gradient_of_its_closed_form():
    error = torch.linspace(-2, 2, 41, dtype=torch.float32).view(1, 1, 1, 41).requires_grad_()
    flow.loss_per_sample(error, torch.zeros_like(error), torch.ones(1), None, 0.3).sum().backward()
    expected = 2 * 0.3 * error / torch.sqrt(error**2 + 0.3**2) / 41
    assert torch.allclose(error.grad, expected, rtol=1e-4, atol=1e-7)
