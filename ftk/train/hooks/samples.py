"""Draws the sample prompts while training. Prompts come from the cache; the VAE is loaded for the moment and freed."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ftk import storage
from ftk.cache.store import CacheStore
from ftk.configs.load import run_path
from ftk.configs.schema import RunConfig
from ftk.errors import CacheError
from ftk.train import drawing, sheet
from ftk.train.hooks.recorder import Recorder
from ftk.train.loop import StepResult, Trainer


def check(config: RunConfig, store: CacheStore) -> None:
    """Before anything is loaded, not at the first picture: is all there that is to be drawn, and can it be drawn?

    Raises:
        CacheError: a prompt is not in the cache.
        ConfigError: the family has no images of that size.
    """
    if not (config.sample.every and config.sample.prompts):
        return
    drawing.size(config)
    wanted = {**dict.fromkeys(config.sample.prompts, "prompts"), config.sample.negative_prompt: "negative_prompt"}
    missing = [prompt for prompt in wanted if prompt not in store.manifest.prompts]
    if missing:
        raise CacheError(
            f"sample.{wanted[missing[0]]}: {missing[0]!r} is not in the cache. Run `ftk cache RUN.yaml`: it encodes that text "
            f"alone."
        )


class Samples:
    """Writes `samples/step-NNNNNNNN.png`, one image a prompt.

    Args:
        renew_cards: shows the images of a step on the cards of the weights that are of this step.
        is_sharded: every process holds a part of the weights alone, so all must draw; else the main one does.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Path,
        store: CacheStore,
        recorder: Recorder,
        renew_cards: Callable[[int], None],
        *,
        is_sharded: bool,
    ) -> None:
        self._directory = run_path(config) / "samples"
        self._model = model
        self._config = config
        self._store = store
        self._recorder = recorder
        self._renew_cards = renew_cards
        self._is_sharded = is_sharded

    def on_start(self, trainer: Trainer) -> None:
        """Draw what a kill between this step's checkpoint and its images left out, or between those and the cards."""
        is_missing = trainer.ranks.is_main and self._is_due(trainer.step) and not self._sheet(trainer.step).exists()
        (is_missing,) = trainer.ranks.agree(is_missing)
        if is_missing:
            self._show(trainer)
        elif trainer.ranks.is_main and self._is_due(trainer.step):
            self._renew_cards(trainer.step)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Draw at every `sample.every`-th step."""
        if self._is_due(result.step):
            self._show(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Nothing to close."""

    def _is_due(self, step: int) -> bool:
        every = self._config.sample.every
        return bool(every and step and step % every == 0)

    def _sheet(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.png"

    def _show(self, trainer: Trainer) -> None:
        self._recorder.flush(trainer)
        if not (trainer.ranks.is_main or self._is_sharded):
            return
        with self._recorder.paused(trainer), trainer.optimizer.averaged():
            images = self._draw(trainer)
        if trainer.ranks.is_main:
            prompts = list(self._config.sample.prompts)
            page = sheet.grid([[image] for image in images], prompts, [f"step {trainer.step}"])
            storage.commit_bytes(self._sheet(trainer.step), sheet.png_bytes(page))
            self._recorder.images(trainer.step, images, prompts)
            self._renew_cards(trainer.step)

    def _draw(self, trainer: Trainer) -> list[Image.Image]:
        """One image a prompt from the denoiser as it is now."""
        family = trainer.family
        components = {family.denoiser_components[0]: trainer.denoiser, **dict.fromkeys(family.text_components)}
        pipeline = family.pipeline(self._model, trainer.dtype, trainer.device, **components)
        vae = weakref.ref(pipeline.vae)
        with torch.no_grad(), trainer.evaluating():
            images = [
                drawing.generate(pipeline, family, self._config, self._texts(trainer, prompt), position)
                for position, prompt in enumerate(self._config.sample.prompts)
            ]
        del pipeline
        gc.collect()
        assert vae() is None, "something keeps the VAE in memory"
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        return images

    def _texts(self, trainer: Trainer, prompt: str) -> dict[str, Any]:
        """The pipeline's text arguments, the negative ones with their prefix."""

        def arguments(text: str) -> dict[str, Any]:
            item = {
                name: tensor.to(trainer.device, trainer.dtype if tensor.is_floating_point() else None)
                for name, tensor in self._store.prompt(text).items()
            }
            if trainer.encoders:
                batch = trainer.encoded(trainer.family.collate_texts([item]))
                item = {name: tensor[0] for name, tensor in batch.items() if tensor is not None}
            return trainer.family.pipeline_texts(item)

        positive = arguments(prompt)
        if self._config.sample.guidance_scale <= 1:
            return positive
        negative = arguments(self._config.sample.negative_prompt)
        return {**positive, **{f"negative_{name}": tensor for name, tensor in negative.items()}}
