"""Draws the sample prompts while training. Prompts come from the cache; the VAE is loaded for the moment and freed."""

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftk import storage
from ftk.cache.store import CacheStore
from ftk.configs.schema import PromptConfig, negative_key
from ftk.errors import CacheError
from ftk.methods.base import HasControls
from ftk.models.base import encoded
from ftk.run import Run
from ftk.train import drawing, sheet
from ftk.train.controls import control_tensor
from ftk.train.hooks.recorder import Recorder
from ftk.train.loop import StepResult, Trainer


def check(run: Run, store: CacheStore, model: Path) -> None:
    """Before anything is loaded, not at the first picture: is all there that is to be drawn, and can it be drawn?

    Raises:
        CacheError: a prompt is not in the cache.
        ConfigError: the family has no images of that size.
    """
    config = run.config
    if not config.sample.draws_in_training:
        return
    _ = run.sample_size  # refuses a size that the family does not have
    needed = [(entry.key(), entry.prompt, "prompts") for entry in config.sample.entries]
    negative = run.negative_prompt(model)
    needed.append((negative_key(negative), negative or "no text", "negative_prompt"))
    for key, prompt, setting in needed:
        # With references that texts depend on there is a negative prompt beside those of each prompt instead.
        is_there = key in store.manifest.prompts or (setting == "negative_prompt" and store.manifest.prompt_images)
        if not is_there:
            raise CacheError(
                f"sample.{setting}: {prompt!r} is not in the cache. Run `ftk cache RUN.yaml`: it encodes that text alone."
            )


class Samples:
    """Writes `samples/step-NNNNNNNN.png`, one image a prompt.

    Args:
        renew_cards: shows the images of a step on the cards of the weights that are of this step.
        is_sharded: every process holds a part of the weights alone, so all draw every image; else they share them.
    """

    def __init__(
        self,
        run: Run,
        model: Path,
        store: CacheStore,
        recorder: Recorder,
        renew_cards: Callable[[int], None],
        *,
        is_sharded: bool,
    ) -> None:
        self._directory = run.paths.run / "samples"
        self._model = model
        self._run = run
        self._config = run.config
        self._store = store
        self._recorder = recorder
        self._renew_cards = renew_cards
        self._is_sharded = is_sharded

    def on_start(self, trainer: Trainer) -> None:
        """Draw what training begins with, if asked for; and what a kill left out after this step's checkpoint."""
        is_missing = trainer.ranks.is_main and self._is_due(trainer.step) and not self._sheet(trainer.step).exists()
        (is_missing,) = trainer.ranks.agree(is_missing)
        if is_missing:
            self._show(trainer)
        elif self._is_due(trainer.step):
            with trainer.ranks.unhurried():
                if trainer.ranks.is_main:
                    self._renew_cards(trainer.step)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Draw at every `sample.every`-th step."""
        if self._is_due(result.step):
            self._show(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Nothing to close."""

    def _is_due(self, step: int) -> bool:
        settings = self._config.sample
        return settings.at_start if step == 0 else settings.every is not None and step % settings.every == 0

    def _sheet(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.png"

    def _show(self, trainer: Trainer) -> None:
        with self._recorder.paused(trainer), trainer.optimizer.averaged():
            images = self._drawn_by_all(trainer)
        with trainer.ranks.unhurried():
            if images and trainer.ranks.is_main:
                prompts = [entry.prompt for entry in self._config.sample.entries]
                page = sheet.grid([[image] for image in images], prompts, [f"step {trainer.step}"])
                storage.commit_bytes(self._sheet(trainer.step), sheet.png_bytes(page))
                self._recorder.images(trainer.step, images, prompts)
                self._renew_cards(trainer.step)

    def _drawn_by_all(self, trainer: Trainer) -> list[Image.Image]:
        """All: one image per prompt, on every process; each draws its share, or all of them where weights are split.

        No image where the run is to stop: it saves first, and draws when it goes on.
        """
        ranks, count = trainer.ranks, len(self._config.sample.entries)
        if ranks.agree(self._stops(trainer))[0]:
            return []
        if self._is_sharded:
            return list(self._draw(trainer, range(count)).values())
        share = range(count)[ranks.rank :: ranks.size]
        with ranks.unhurried():
            drawn = self._draw(trainer, share) if share else {}
        if ranks.agree(len(drawn) < len(share))[0]:
            return []
        if ranks.size == 1:
            return list(drawn.values())
        width, height = self._run.sample_size
        pixels = torch.zeros(count, height, width, 3, dtype=torch.uint8)
        for position, image in drawn.items():
            pixels[position] = torch.from_numpy(np.array(image.convert("RGB")))
        ranks.sum([pixels])
        return [Image.fromarray(each) for each in pixels.numpy()]

    def _stops(self, trainer: Trainer) -> bool:
        """Whether a signal asks this process to save instead; the last step is saved already."""
        return trainer.ranks.stop_requested and trainer.step < trainer.config.steps

    def _draw(self, trainer: Trainer, positions: Sequence[int]) -> dict[int, Image.Image]:
        """The images of the prompts at these positions, from the denoiser as it is now; fewer where the run is to stop."""
        family = trainer.model.family
        components = {family.denoiser_attribute: trainer.model.denoiser, **dict.fromkeys(family.text_components)}
        pipeline = family.pipeline(self._model, trainer.dtype, trainer.device, **components)
        vae = weakref.ref(pipeline.vae)
        if isinstance(trainer.method, HasControls):
            pipeline = trainer.method.sampling_pipeline(trainer.model, pipeline)
        images: dict[int, Image.Image] = {}
        with torch.no_grad(), trainer.model.evaluating():
            for position in positions:
                if self._stops(trainer) and not self._is_sharded:
                    break
                entry = self._config.sample.entries[position]
                images[position] = drawing.generate(pipeline, self._run, self._arguments(trainer, entry), position)
        del pipeline
        gc.collect()
        assert vae() is None, "something keeps the VAE in memory"
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        return images

    def _arguments(self, trainer: Trainer, entry: PromptConfig) -> dict[str, Any]:
        """The pipeline's arguments for a prompt: its texts, the negative ones with their prefix, and its images."""
        family, sample = trainer.model.family, self._config.sample

        def texts(key: str) -> dict[str, Any]:
            item = {
                name: tensor.to(trainer.device, trainer.dtype if tensor.is_floating_point() else None)
                for name, tensor in self._store.prompt(key).items()
            }
            if trainer.model.encoders:
                batch = encoded(trainer.model, family.collate_texts([item]))
                item = {name: tensor[0] for name, tensor in batch.items() if tensor is not None}
            return family.pipeline_texts(item)

        def batch_of_one(item: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return control_tensor(item)[None].to(trainer.device, trainer.dtype)

        arguments = texts(entry.key())
        if sample.guidance_scale > 1:
            without = self._run.negative_prompt(self._model)
            key = entry.key(without)
            negative = texts(key if key in self._store.manifest.prompts else negative_key(without))
            arguments |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        references, controls = (
            [batch_of_one(item) for item in self._store.prompt_images(entry.key(), part)] for part in ("references", "controls")
        )
        return arguments | drawing.image_arguments(self._run, references, controls)
