import io

import numpy as np
import pytest
import torch
from PIL import Image

from ftk.models.components.schedule import TokenShift
from ftk.train import sigma_plot
from ftk.train.flow import SigmaDistribution

TABLE = torch.arange(1000, 0, -1) / 1000
BY_TOKENS = TokenShift(base_tokens=256, max_tokens=8192, base_shift=0.5, max_shift=0.9)
SIZES = {"1024x1024 px": 4096, "512x512 px": 1024, "1664x928 px": 6032}


def bars(text):
    return [line.split("│", 1)[1] for line in text.splitlines() if "│" in line]


def test_a_uniform_distribution_fills_all_bins_alike():
    bins = sigma_plot.histogram(SigmaDistribution(table=TABLE), tokens=64, num_bins=50)
    assert bins.sum() == pytest.approx(100)
    assert bins.tolist() == pytest.approx([2.0] * 50, abs=0.02)


def test_a_histogram_has_the_probabilities_of_the_closed_form():
    # Beta(3, 1) has the cumulative distribution sigma^3.
    distribution = SigmaDistribution(table=TABLE, sampling="beta", beta_alpha=3.0, continuous=True)
    bins = sigma_plot.histogram(distribution, tokens=64, num_bins=4)
    expected = 100 * np.diff(np.array([0, 0.25, 0.5, 0.75, 1]) ** 3)
    assert bins.tolist() == pytest.approx(expected.tolist(), abs=0.05)
    squeezed = SigmaDistribution(table=TABLE, minimum=0.5, maximum=0.75)
    assert sigma_plot.histogram(squeezed, tokens=64, num_bins=4).tolist() == pytest.approx([0, 0, 100, 0], abs=0.2)


def test_equal_seeds_give_equal_histograms():
    distribution = SigmaDistribution(table=TABLE, sampling="logit_normal")
    first, again, other = (sigma_plot.histogram(distribution, 64, num=999, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_text_keeps_to_its_width_and_labels_its_axes(width):
    distribution = SigmaDistribution(table=TABLE, sampling="mode", shift=BY_TOKENS, minimum=0.1)
    text = sigma_plot.text(distribution, SIZES, width)
    lines = [line for line in text.splitlines() if "tokens" not in line and "sigma" not in line]
    assert max(map(len, lines)) <= width
    assert text.count("sigma (1 = noise)") == 2
    assert "%" in text
    assert all(not line.endswith(" ") for line in text.splitlines())


def test_text_bars_are_as_high_as_their_bins():
    noise_only = sigma_plot.text(SigmaDistribution(table=TABLE, minimum=0.5), {"one": 64}, 57)
    for bar in bars(noise_only):
        assert set(bar[:24]) == {" "}
        assert set(bar[25:]) <= set("▅▆▇█")
    rising = sigma_plot.text(SigmaDistribution(table=TABLE, sampling="beta", beta_alpha=2.0), {"one": 64}, 57)
    heights = [sum(row[column : column + 1] not in {" ", ""} for row in bars(rising)) for column in range(50)]
    assert heights == sorted(heights)
    assert heights[0] == 1
    assert heights[-1] == 8


def test_only_a_shift_by_resolution_has_a_histogram_for_each_end():
    assert "tokens)" not in sigma_plot.text(SigmaDistribution(table=TABLE, shift=3.0), SIZES, 80)
    by_tokens = SigmaDistribution(table=TABLE, shift=BY_TOKENS)
    text = sigma_plot.text(by_tokens, SIZES, 80)
    assert "512x512 px (1,024 tokens)" in text
    assert "1664x928 px (6,032 tokens)" in text
    assert "4,096" not in text
    assert sigma_plot.text(by_tokens, {"one": 64}, 80).count("tokens)") == 1


def test_settings_are_named_as_in_the_run_file():
    distribution = SigmaDistribution(table=TABLE, sampling="beta", beta_alpha=2.0, shift=3.0, continuous=True, maximum=0.9)
    assert sigma_plot.describe(distribution) == "beta (beta_alpha 2, beta_beta 1), shift 3, continuous, within [0, 0.9]"


def test_the_png_has_a_panel_for_each_histogram_and_bars_where_sigmas_are():
    def opened(distribution):
        return np.asarray(Image.open(io.BytesIO(sigma_plot.png(distribution, SIZES))).convert("RGB")).astype(int)

    one = opened(SigmaDistribution(table=TABLE, minimum=0.5))
    two = opened(SigmaDistribution(table=TABLE, shift=BY_TOKENS))
    assert len(two) == 2 * len(one)
    is_bar = one[:, :, 2] - one[:, :, 0] > 60
    columns = np.flatnonzero(is_bar.any(0))
    width = one.shape[1]
    assert columns.min() > 0.48 * width
    assert columns.max() > 0.95 * width
    # Bars of one height, but for the lowest bin's edge: the distribution is uniform there.
    heights = is_bar.sum(0)[columns]
    assert np.median(heights) > 0.5 * len(one) * 0.5
    assert np.percentile(heights, 90) - np.percentile(heights, 10) <= 0.1 * np.median(heights)
