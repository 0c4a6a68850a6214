"""The optimizer over fp32 masters, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping
from typing import Literal

import torch

from ftk.configs.schema import OptimizerConfig

Schedule = Literal["constant", "cosine", "linear"]


def learning_rate_factor(step: int, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """The factor on the learning rate for the update that follows `step` finished ones; as diffusers' `get_scheduler`."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if schedule == "constant":
        return 1.0
    left = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / left)))


class MasterOptimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) on fp32 masters of the trained parameters.

    A bf16 parameter gets an fp32 master that accumulates gradients and takes the update, and is rounded back into it: bf16
    keeps 8 bits, so an update below 1/256 of a weight would vanish. An fp32 parameter is its own master.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = dict(parameters)
        self.masters: dict[str, torch.Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in parameters.items()
        }
        self._optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=0.0,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=next(iter(self.masters.values())).is_cuda,
        )

    def accumulate(self) -> None:
        """Add the gradients of the last backward pass to the masters'."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def step(self, learning_rate: float, max_grad_norm: float | None) -> torch.Tensor:
        """Clip by the global norm, update, round back, clear; returns the norm before clipping, on the device."""
        masters = list(self.masters.values())
        bound = math.inf if max_grad_norm is None else max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(masters, bound)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._round_back()
        return norm

    def weights(self) -> dict[str, torch.Tensor]:
        """The fp32 masters by parameter name."""
        return {name: master.detach() for name, master in self.masters.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors as `NAME/STATE`."""
        return {
            f"{name}/{kind}": tensor
            for name, master in self.masters.items()
            for kind, tensor in self._optimizer.state[master].items()
        }

    def restore(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `weights` and `moments`."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(weights[name])
        for key, tensor in moments.items():
            name, _, kind = key.rpartition("/")
            master = self.masters[name]
            # AdamW keeps its step count on the CPU unless it is fused
            device = "cpu" if kind == "step" and not self._optimizer.defaults["fused"] else master.device
            self._optimizer.state[master][kind] = tensor.to(device)
        self._round_back()

    def _round_back(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
