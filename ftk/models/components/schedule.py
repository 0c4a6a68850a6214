"""What a model was trained to predict, at which noise levels. Shape legend: B batch, N entries of the training table."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Objective = Literal["flow", "epsilon", "v"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShift:
    """A shift of sigma to exp(mu) / (exp(mu) + 1 / sigma - 1), where mu grows linearly with an image's tokens.

    It is `base_shift` at `base_tokens` and `max_shift` at `max_tokens`, and goes on beyond both: diffusers' `calculate_shift`.
    """

    base_tokens: int
    max_tokens: int
    base_shift: float
    max_shift: float

    def mu(self, tokens: int) -> float:
        """mu for an image of this many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """What the model is trained to predict, and its training table of sigmas: [N], fp32, falling, from noise downwards.

    A sample at an entry is signal x + sigma n. In flow matching the signal is 1 - sigma and the model's time is sigma itself,
    at any sigma between 0 and 1. Elsewhere both stand in tables of their own, and only the table's sigmas can be trained.

    Attributes:
        token_shift: how sampling shifts sigmas with an image's size; None where the model's scheduler does not.
        signals: [N] fp32: what the image is multiplied by at each entry.
        times: [N] fp32: what the model takes as time at each entry.
    """

    objective: Objective
    sigmas: "torch.Tensor"
    token_shift: TokenShift | None = None
    signals: "torch.Tensor | None" = None
    times: "torch.Tensor | None" = None

    def scales(self, sigma_B: "torch.Tensor", dtype: "torch.dtype") -> "tuple[torch.Tensor, torch.Tensor]":
        """What image and noise are multiplied by, each [B], in the working dtype; sigma is rounded to it first."""
        rounded_B = sigma_B.to(dtype)
        if self.signals is None:
            return 1.0 - rounded_B, rounded_B
        return self.signals[self._entry(sigma_B)].to(dtype), rounded_B

    def time(self, sigma_B: "torch.Tensor") -> "torch.Tensor":
        """[B] fp32: the model's time at these sigmas; sigma itself where there is no table of times."""
        return sigma_B if self.times is None else self.times[self._entry(sigma_B)]

    def to(self, device: "torch.device") -> "NoiseSchedule":
        """The same with its tables on the device."""
        signals = None if self.signals is None else self.signals.to(device)
        times = None if self.times is None else self.times.to(device)
        return replace(self, sigmas=self.sigmas.to(device), signals=signals, times=times)

    def _entry(self, sigma_B: "torch.Tensor") -> "torch.Tensor":
        """[B]: where in the table each of these sigmas of it stands."""
        import torch

        return torch.searchsorted(-self.sigmas, -sigma_B.contiguous()).clamp(max=len(self.sigmas) - 1)
