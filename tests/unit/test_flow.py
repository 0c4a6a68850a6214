import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ftk.train import flow

TABLE = torch.arange(1000, 0, -1) / 1000


def test_sigma_is_the_tables_entry_and_u_zero_is_noise():
    u = torch.tensor([0.0, 0.0005, 0.5, 0.9999, 1.0])
    assert flow.sigma_at(u, TABLE).tolist() == pytest.approx([1.0, 1.0, 0.5, 0.001, 0.001])


def test_a_static_shift_has_its_closed_form():
    assert flow.sigma_at(torch.tensor(0.5), TABLE, shift=3.0).item() == pytest.approx(0.75)


@pytest.mark.parametrize("sampling", ["logit_normal", "mode"])
def test_samplers_agree_with_diffusers_in_distribution(sampling):
    generator = torch.Generator().manual_seed(0)
    ours = torch.stack([flow.draw_u(sampling, generator, 0.3, 0.8, 1.1) for _ in range(20_000)]).sort().values
    theirs = compute_density_for_timestep_sampling(
        sampling, 20_000, logit_mean=0.3, logit_std=0.8, mode_scale=1.1, generator=torch.Generator().manual_seed(1)
    )
    assert (ours - theirs.sort().values).abs().max() < 0.03


def test_uniform_u_has_the_uniform_moments():
    generator = torch.Generator().manual_seed(0)
    u = torch.stack([flow.draw_u("uniform", generator) for _ in range(20_000)])
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.005)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_equal_diffusers(weighting):
    sigma = torch.linspace(0.01, 1, 50)
    assert torch.equal(flow.weight(sigma, weighting), compute_loss_weighting_for_sd3(weighting, sigma).float())


def test_the_path_ends_at_data_and_at_noise_and_its_slope_is_the_target():
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    at = lambda s: flow.interpolate(clean, noise, torch.full((2,), s, dtype=torch.float64))  # noqa: E731
    assert torch.equal(at(0.0), clean)
    assert torch.equal(at(1.0), noise)
    slope = (at(0.6) - at(0.4)) / 0.2
    assert torch.allclose(slope, flow.velocity(clean, noise), atol=1e-12)


def test_loss_is_a_mean_over_each_sample_alone():
    prediction, target = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    target[1] *= 3
    loss = flow.loss_per_sample(prediction, target, torch.tensor([1.0, 0.5]))
    assert loss.tolist() == [1.0, 4.5]


def test_cosmap_integrates_to_one():
    # 2 / pi * integral of 1 / (1 - 2 s + 2 s^2) over [0, 1] is (2 / pi) (pi / 2)
    sigma = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert flow.weight(sigma, "cosmap").mean().item() == pytest.approx(1.0, rel=1e-6)
    assert math.isfinite(flow.weight(torch.ones(1), "sigma_sqrt").item())
