"""Draws the sample prompts while training. Prompts come from the cache; the VAE is loaded for the moment and freed."""

import gc
from pathlib import Path
from typing import Any

import torch

from ftk import storage
from ftk.cache.store import CacheStore
from ftk.configs.schema import RunConfig
from ftk.errors import CacheError
from ftk.train import sample
from ftk.train.loop import StepResult, Trainer


class Samples:
    """Writes `samples/step-NNNNNNNN.png`, one image a prompt."""

    def __init__(self, directory: Path, model: Path, config: RunConfig, store: CacheStore) -> None:
        self._directory = directory
        self._model = model
        self._config = config
        self._store = store

    def on_start(self, trainer: Trainer) -> None:
        """Every prompt must be in the cache before the first step, not at the first picture."""
        wanted = [*self._config.sample.prompts, self._config.sample.negative_prompt]
        missing = [prompt for prompt in wanted if prompt not in self._store.manifest.prompts]
        if missing:
            raise CacheError(
                f"sample.prompts: {missing[0]!r} is not in the cache. Run `ftk cache RUN.yaml`: it encodes that text alone."
            )

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Draw at every `sample.every`-th step."""
        every = self._config.sample.every
        if every and result.step % every == 0:
            self.draw(trainer, result.step)

    def on_end(self, trainer: Trainer) -> None:
        """Nothing to close."""

    def draw(self, trainer: Trainer, step: int) -> None:
        """One image a prompt from the denoiser as it is now."""
        denoiser = trainer.denoiser
        dtype = next(denoiser.parameters()).dtype
        pipeline = trainer.family.pipeline(
            self._model, dtype, trainer.device, transformer=denoiser, text_encoder=None, tokenizer=None
        )
        denoiser.eval()
        try:
            images = [
                sample.generate(pipeline, trainer.family, self._config, self._texts(trainer, prompt, dtype), position)
                for position, prompt in enumerate(self._config.sample.prompts)
            ]
        finally:
            denoiser.train()
            del pipeline
            gc.collect()
            if trainer.device.type == "cuda":
                torch.cuda.empty_cache()
        grid = sample.grid([[image] for image in images], list(self._config.sample.prompts), [f"step {step}"])
        storage.commit_bytes(self._directory / f"step-{step:08d}.png", sample.png_bytes(grid))

    def _texts(self, trainer: Trainer, prompt: str, dtype: torch.dtype) -> dict[str, Any]:
        """The pipeline's text arguments, the negative ones with their prefix."""

        def arguments(text: str) -> dict[str, Any]:
            item = {name: tensor.to(dtype) for name, tensor in self._store.prompt(text).items()}
            return {name: tensor.to(trainer.device) for name, tensor in trainer.family.pipeline_texts(item).items()}

        positive = arguments(prompt)
        if self._config.sample.guidance_scale <= 1:
            return positive
        negative = arguments(self._config.sample.negative_prompt)
        return {**positive, **{f"negative_{name}": tensor for name, tensor in negative.items()}}
