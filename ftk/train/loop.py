"""The training loop: one update, readable in one screen. Everything that is not the update is a hook."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ftk.configs.schema import TrainConfig
from ftk.errors import Preempted
from ftk.models.base import Family
from ftk.train import flow
from ftk.train.data import Batch
from ftk.train.optim import MasterOptimizer, learning_rate_factor
from ftk.train.order import keyed_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One update; loss and norm are still on the device: reading them waits for it."""

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    learning_rate: float
    num_samples: int


class Hook(Protocol):
    """A side effect of the loop. `step` counts finished updates."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first update of this process."""

    def on_step(self, trainer: "Trainer", result: StepResult) -> None:
        """After each update."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last update, or after the one that a stop signal let finish."""


@dataclass(kw_only=True)
class Trainer:
    """The state of a run between two updates: weights and moments (in `optimizer`) and `step`. Nothing else is random."""

    family: Family
    denoiser: Any
    predict: Callable[..., torch.Tensor]
    optimizer: MasterOptimizer
    config: TrainConfig
    device: torch.device
    hooks: Sequence[Hook] = ()
    step: int = 0
    num_samples_seen: int = 0
    stop_requested: bool = field(default=False)

    def fit(self, batches: Iterable[list[Batch]]) -> None:
        """Update once for each step's batches; raises `Preempted` after the step in which a stop was asked for."""
        for hook in self.hooks:
            hook.on_start(self)
        for micro_batches in batches:
            result = self.update(micro_batches)
            for hook in self.hooks:
                hook.on_step(self, result)
            if self.stop_requested and self.step < self.config.steps:
                break
        for hook in self.hooks:
            hook.on_end(self)
        if self.step < self.config.steps:
            raise Preempted(f"Stopped by a signal at step {self.step}, which is saved. The same command goes on from there.")

    def update(self, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over the global batch: the sum of the samples' losses over the number of samples."""
        config = self.config
        # Whatever is random in the model itself (adapter dropout) depends on the step alone, so a resume repeats it.
        seed_generators(self.device, keyed_seed(config.seed, "model", self.step))
        num_samples = sum(len(batch) for batch in micro_batches)
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            share = self.losses(batch.to(self.device)).sum() / num_samples
            share.backward()
            self.optimizer.accumulate()
            loss += share.detach()
        learning_rate = config.learning_rate * learning_rate_factor(
            self.step, config.schedule, config.warmup_steps, config.steps
        )
        grad_norm = self.optimizer.step(learning_rate, config.max_grad_norm)
        self.step += 1
        self.num_samples_seen += num_samples
        return StepResult(step=self.step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, num_samples=num_samples)

    def losses(self, batch: Batch) -> torch.Tensor:
        """[B] fp32 loss of each sample: noise it to its sigma, predict, compare with the velocity."""
        noisy_BCHW = flow.interpolate(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B)
        prediction_BCHW = self.predict(self.denoiser, noisy_BCHW, batch.sigma_B, batch.texts)
        # The weight is of the sigma that was applied: rounded to the working dtype, as in the interpolation.
        applied_B = batch.sigma_B.to(noisy_BCHW.dtype).float()
        weight_B = flow.weight(applied_B, self.config.sigma.weighting)
        return flow.loss_per_sample(prediction_BCHW, flow.velocity(batch.latents_BCHW, batch.noise_BCHW), weight_B)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the default generators of the CPU and of `device`.

    `torch.manual_seed` would do, but where CUDA is not in use it formats a stack trace at every call: 200 microseconds.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def exact_settings(config: TrainConfig, others: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one it continues, so that it ends where an uninterrupted one would.

    A longer constant schedule is the same run; a longer cosine is another curve.
    """
    free = {"checkpoint_every", "keep_last", "log_every", "tensorboard", "device", "gradient_checkpointing"}
    if config.schedule == "constant":
        free.add("steps")
    return {"train": config.model_dump(mode="json", exclude=free), **others}
