"""What the loop itself adds up; the step as a whole is held by test_parity.py."""

import math

import torch

from ftk.train.loop import NUM_BANDS, band_totals


def test_losses_are_added_up_by_the_band_of_their_sigma():
    sigma_B = torch.tensor([0.0, 0.249, 0.25, 0.6, 0.75, 1.0])
    losses_B = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    totals = band_totals(sigma_B, losses_B)
    assert totals.shape == (2, NUM_BANDS)
    assert totals.tolist() == [[3.0, 4.0, 8.0, 48.0], [2.0, 1.0, 1.0, 2.0]]


def test_a_loss_that_is_no_number_stays_in_its_band():
    totals = band_totals(torch.tensor([0.1, 0.9]), torch.tensor([1.0, math.nan]))
    assert totals[0, :3].tolist() == [1.0, 0.0, 0.0]
    assert math.isnan(totals[0, 3])
