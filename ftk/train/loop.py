"""The training loop: one update, readable in one screen. Everything that is not the update is a hook.

Shape legend: B batch, C channels, H W latent cells, K sigma bands.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ftk import devices
from ftk.configs.schema import TrainConfig
from ftk.errors import Preempted
from ftk.methods.base import HasBasePrediction, Method
from ftk.models.base import Model
from ftk.train import flow
from ftk.train.data import Batch, Step
from ftk.train.loss_scale import Scaled
from ftk.train.optim import MasterOptimizer
from ftk.train.order import keyed_seed
from ftk.train.ranks import Ranks

NUM_BANDS = 4
"""Losses are recorded apart for sigma in [0, 1/4), [1/4, 1/2), [1/2, 3/4) and [3/4, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One update, over all processes. Tensors are still on the device: reading them waits for it.

    `is_bad`: the loss or the gradient was not finite, so nothing was updated, and `scaled` does not say that the loss scale
    was too large. `scaled` is None where the loss is not scaled. `band_loss_K` are sums of the samples' losses.
    """

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    is_bad: torch.Tensor
    band_loss_K: torch.Tensor
    band_count_K: torch.Tensor
    learning_rate: float
    num_samples: int
    data_seconds: float
    """How long the loop waited for its batches."""
    preservation_loss: torch.Tensor | None = None
    """The mean over the samples that took part, NaN where none did; None where the run preserves nothing."""
    scaled: Scaled | None = None


class Hook(Protocol):
    """A side effect of the loop. `step` counts finished updates."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first update of this process."""

    def on_step(self, trainer: "Trainer", result: StepResult) -> None:
        """After each update."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last update, or after the one that a stop let finish."""


@dataclass(kw_only=True)
class Trainer:
    """The state of a run between two updates: weights and moments (in `optimizer`) and `step`. Nothing else is random."""

    model: Model
    method: Method
    optimizer: MasterOptimizer
    schedule: Callable[[int], float]
    """The factor on the learning rate after so many steps."""
    config: TrainConfig
    device: torch.device
    dtype: torch.dtype = torch.float32
    ranks: Ranks = field(default_factory=Ranks)
    hooks: Sequence[Hook] = ()
    step: int = 0
    num_samples_seen: int = 0
    is_finished: bool = False
    """Set by a hook that ends the training before its last step."""

    def fit(self, steps: Iterable[Step]) -> None:
        """Update once for each step; raises `Preempted` after the step in which a process was asked to stop."""
        for hook in self.hooks:
            hook.on_start(self)
        is_stopped, self.is_finished = self.ranks.agree(False, self.is_finished)
        freed = devices.FreedMemory()
        waiting_since = time.perf_counter()
        for step in () if self.is_finished else steps:
            result = self.update(step, time.perf_counter() - waiting_since)
            for hook in self.hooks:
                hook.on_step(self, result)
            freed.release()
            is_stopped, self.is_finished = self.ranks.agree(self.ranks.stop_requested, self.is_finished)
            if is_stopped or self.is_finished:
                break
            waiting_since = time.perf_counter()
        for hook in self.hooks:
            hook.on_end(self)
        if is_stopped and not self.is_finished and self.step < self.config.steps:
            raise Preempted(f"Stopped by a signal at step {self.step}, which is saved. The same command goes on from there.")

    def update(self, step: Step, data_seconds: float = 0.0) -> StepResult:
        """One optimizer step over the global batch: the sum of the samples' losses over the number of samples."""
        totals, preserved = torch.zeros(2, NUM_BANDS, device=self.device), torch.zeros(2, device=self.device)
        loss_scale = self.optimizer.loss_scale
        for number, batch in step.batches:
            # What is random in the model itself (adapter dropout) hangs on the micro-batch alone: not on who computes it.
            seed_generators(self.device, keyed_seed(self.config.seed, "model", self.step, number))
            losses_B = self.losses(batch)
            self._backward(losses_B, batch.share / step.num_samples)
            totals += batch.share * band_totals(batch.sigma_B, losses_B.detach())
            if batch.preserved is not None:
                # After the backward pass, whose activations are gone: only one graph is in memory at a time.
                seed_generators(self.device, keyed_seed(self.config.seed, "preservation", self.step, number))
                preserved += batch.share * self._preserve(batch, step.num_samples)
        preserves = self.config.loss.preservation is not None
        self.ranks.sum([totals, *([preserved] if preserves else []), *self.optimizer.gradients()])
        loss = totals[0].sum() / step.num_samples
        factor = self.schedule(self.step)
        grad_norm, is_skipped = self.optimizer.step(factor, self.config.max_grad_norm, loss)
        scaled = None if loss_scale is None else loss_scale.adapt(loss, is_skipped)
        self.step += 1
        self.num_samples_seen += step.num_samples
        return StepResult(
            step=self.step,
            loss=loss,
            grad_norm=grad_norm,
            is_bad=is_skipped if scaled is None else is_skipped & ~scaled.is_overflow,
            band_loss_K=totals[0],
            band_count_K=totals[1],
            learning_rate=self.config.learning_rate * factor,
            num_samples=step.num_samples,
            data_seconds=data_seconds,
            preservation_loss=preserved[0] / preserved[1] if preserves else None,
            scaled=scaled,
        )

    def _backward(self, losses_B: torch.Tensor, factor: float) -> None:
        """Add the gradient of the losses' sum times a factor."""
        part, loss_scale = losses_B.sum() * factor, self.optimizer.loss_scale
        (part if loss_scale is None else part * loss_scale.scale).backward()
        self.optimizer.accumulate()

    def losses(self, batch: Batch) -> torch.Tensor:
        """[B] fp32 weighted loss of each sample: noise it to its sigma, predict, compare with the target."""
        # In flow matching: x_sigma = (1 - sigma) x + sigma n, and the model learns n - x. Other objectives have tables of both.
        noisy_BCHW, signal_B, sigma_B = self._noisy(batch)
        prediction_BCHW = self.method.predict(self.model, noisy_BCHW, batch.sigma_B, batch.conditions)
        objective = self.model.schedule.objective
        target_BCHW = flow.target(objective, batch.latents_BCHW, batch.noise_BCHW, signal_B, sigma_B)
        return batch.weight_B * self._compared(prediction_BCHW, target_BCHW, batch, batch.cell_weight_BHW)

    def preservation_losses(self, batch: Batch) -> torch.Tensor:
        """[B] fp32: how far the prediction for the preserved texts is from the base model's, of samples that take part.

        Both see the same noisy latents at the same sigma. Masks, and the weight of class images, do not count. As the
        "differential output preservation" of ai-toolkit (ostris 2025); the idea is that of learning without forgetting (Li &
        Hoiem 2016, arXiv 1606.09282).
        """
        assert isinstance(self.method, HasBasePrediction)
        assert batch.preserved is not None
        noisy_BCHW, _, _ = self._noisy(batch)
        target_BCHW = self.method.base_prediction(self.model, noisy_BCHW, batch.sigma_B, batch.preserved)
        prediction_BCHW = self.method.predict(self.model, noisy_BCHW, batch.sigma_B, batch.preserved)
        return batch.preserved_B * self._compared(prediction_BCHW, target_BCHW, batch, None)

    def _preserve(self, batch: Batch, num_samples: int) -> torch.Tensor:
        """Add the gradient of the preservation loss; [2]: its sum without its weight, and how many samples took part."""
        assert self.config.loss.preservation is not None
        assert batch.preserved_B is not None
        losses_B = self.preservation_losses(batch)
        self._backward(losses_B, self.config.loss.preservation.weight * batch.share / num_samples)
        return torch.stack([losses_B.detach().sum(), batch.preserved_B.sum()])

    def _noisy(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The noised latents [B,C,H,W], and the factors of image and noise in them, each [B]."""
        signal_B, sigma_B = self.model.schedule.scales(batch.sigma_B, batch.latents_BCHW.dtype)
        seen_BCHW = batch.noise_BCHW if batch.seen_noise_BCHW is None else batch.seen_noise_BCHW
        return flow.interpolate(batch.latents_BCHW, seen_BCHW, signal_B, sigma_B), signal_B, sigma_B

    def _compared(
        self, prediction_BCHW: torch.Tensor, target_BCHW: torch.Tensor, batch: Batch, cell_weight_BHW: torch.Tensor | None
    ) -> torch.Tensor:
        """[B] fp32 loss by `train.loss` and the weighting of sigmas."""
        signal_B, sigma_B = (each.float() for each in self.model.schedule.scales(batch.sigma_B, batch.latents_BCHW.dtype))
        kind, delta = self.config.loss.kind, self._huber_delta(batch.sigma_B, signal_B, sigma_B)
        weight_B = self._weights(signal_B, sigma_B)
        return flow.loss_per_sample(
            prediction_BCHW,
            target_BCHW,
            weight_B / delta if kind == "smooth_l1" and delta is not None else weight_B,
            cell_weight_BHW=cell_weight_BHW,
            huber_delta=delta,
            is_absolute=kind == "l1",
        )

    def _huber_delta(
        self, table_sigma_B: torch.Tensor, signal_B: torch.Tensor, sigma_B: torch.Tensor
    ) -> float | torch.Tensor | None:
        loss = self.config.loss
        if loss.kind not in ("huber", "smooth_l1"):
            return None
        if loss.huber_schedule == "constant":
            return loss.huber_delta
        schedule = self.model.schedule
        time_B = table_sigma_B if schedule.times is None else schedule.time(table_sigma_B) / len(schedule.sigmas)
        return flow.huber_deltas(loss.huber_delta, loss.huber_schedule, signal_B, sigma_B, time_B)

    def _weights(self, signal_B: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """[B]: of the sigma that was applied, rounded to the working dtype as in the interpolation."""
        settings = self.config.sigma
        if settings.weighting == "none" or settings.weighting == "sigma_sqrt" or settings.weighting == "cosmap":
            return flow.weight(sigma_B, settings.weighting)
        return flow.snr_weight(signal_B, sigma_B, self.model.schedule.objective, settings.weighting, settings.min_snr_gamma)


def band_totals(sigma_B: torch.Tensor, losses_B: torch.Tensor) -> torch.Tensor:
    """[2,K]: the sum of the losses, and the number of samples, of each sigma band."""
    band_B = (sigma_B * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)
    rows_2B = torch.stack([losses_B.float(), torch.ones_like(losses_B, dtype=torch.float32)])
    # Not `index_add_`, whose order of adding differs from run to run on a GPU; not a product, which spreads a NaN.
    is_in_KB = band_B == torch.arange(NUM_BANDS, device=losses_B.device)[:, None]
    return torch.where(is_in_KB, rows_2B[:, None], 0.0).sum(2)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the default generators of the CPU and of `device`.

    `torch.manual_seed` would do, but where CUDA is not in use it formats a stack trace at every call: 200 microseconds.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
