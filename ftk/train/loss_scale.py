"""Loss scaling: float16 gradients below 6e-8 become 0, so the loss is multiplied before the backward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_FIRST = 2.0**16
_GROWTH_INTERVAL = 2000
_LEAST = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """What the scale did to one step; scalars on the device.

    `is_overflow`: the loss was finite, and at a smaller scale its gradients may be too.
    """

    scale: torch.Tensor
    is_overflow: torch.Tensor


class LossScale:
    """The factor on the loss: half of it after a step that was skipped, twice of it after 2,000 good steps in a row.

    All of it stays on the device, which is not waited for. Every process has the same, because gradients are summed over the
    processes before they are judged. It is a power of two, so scaling rounds nothing that is within the range.

    The rule and its constants are those of `torch.amp.GradScaler`, with 1 as the lowest scale: gradients that are not finite
    there are no fault of the scale. GradScaler itself judges the gradients of one process.

    Source: Micikevicius et al. 2018 (arXiv 1710.03740).
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(_FIRST, device=device)
        self._num_good = torch.tensor(0, dtype=torch.int32, device=device)

    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Divide fp32 gradients by the scale, in place."""
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    def adapt(self, loss: torch.Tensor, is_skipped: torch.Tensor) -> Scaled:
        """Choose the next step's scale.

        Args:
            loss: scalar, unscaled.
            is_skipped: bool scalar: the loss or a gradient was not finite.
        """
        scaled = Scaled(scale=self.scale, is_overflow=is_skipped & torch.isfinite(loss) & (self.scale > _LEAST))
        num_good = torch.where(is_skipped, 0, self._num_good + 1)
        is_due, larger = num_good == _GROWTH_INTERVAL, self.scale * 2
        grown = torch.where(is_due & torch.isfinite(larger), larger, self.scale)
        self.scale = torch.where(is_skipped, (self.scale / 2).clamp(min=_LEAST), grown)
        self._num_good = torch.where(is_due, 0, num_good)
        return scaled

    def facts(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {"scale": float(self.scale), "good_steps": int(self._num_good)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Inverse of `facts`."""
        self.scale.fill_(facts["scale"])
        self._num_good.fill_(facts["good_steps"])
